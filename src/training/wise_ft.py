"""WiSE-FT: weights between the zero-shot classifier and the fine-tuned one (Wortsman et al. 2022, Eq. 1).

Of one fine-tuning, a curve: accuracy on the training distribution against accuracy on others, for each mixing weight.
"""
from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import UserError
from .evaluation.results import table
from .sharding import gathered, load_full_state_dict

ALPHAS = tuple(i / 10 for i in range(11))


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict, whole on the CPU of every process; a collective call for a sharded model."""
    return {
        name: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().to("cpu", copy=True)
        for name, v in model.state_dict().items()
    }


def interpolate(zero_shot: Mapping[str, Tensor], fine_tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * zero_shot + alpha * fine_tuned, in float32 at least; exactly one of them where alpha is 0 or 1.

    What is not floating point (counters) is the fine-tuned model's. Raises ValueError for other names or shapes.
    """
    if zero_shot.keys() != fine_tuned.keys() or any(zero_shot[k].shape != v.shape for k, v in fine_tuned.items()):
        raise ValueError("The weights to interpolate between are not those of one model.")

    def between(a: Tensor, b: Tensor) -> Tensor:
        if not b.is_floating_point() or alpha == 1:
            return b
        if alpha == 0:
            return a.to(b.dtype)
        wide = torch.promote_types(b.dtype, torch.float32)
        return ((1 - alpha) * a.to(wide) + alpha * b.to(wide)).to(b.dtype)

    return {name: between(zero_shot[name], value) for name, value in fine_tuned.items()}


def curve(
    model: nn.Module,
    zero_shot: Mapping[str, Tensor],
    fine_tuned: Mapping[str, Tensor],
    evaluate: Callable[[nn.Module], dict[str, float]],
    alphas: Sequence[float] = ALPHAS,
) -> list[dict[str, float]]:
    """Metrics at each alpha, `alpha` first; the model has its own weights again afterwards. A collective call.

    zero_shot, fine_tuned: whole state dicts of the model (sharded or not), the same on every process.
    """
    own = whole_weights(model)
    rows = []
    try:
        for alpha in alphas:
            load_full_state_dict(model, None, interpolate(zero_shot, fine_tuned, alpha), None)
            with gathered(model):
                rows.append({"alpha": alpha, **evaluate(model)})
    finally:
        load_full_state_dict(model, None, own, None)
    return rows


def describe(rows: Sequence[Mapping[str, float]]) -> str:
    """A table of top-1 on each data set, one line for each alpha, the highest of each column starred."""
    names = [key for key in rows[0] if key.endswith("-top1")]
    best = {name: max(row[name] for row in rows) for name in names}
    lines = [["alpha", *(name.removesuffix("-top1") + " " for name in names)]]
    for row in rows:
        cells = (f"{row[name]:.2%}{'*' if row[name] == best[name] else ' '}" for name in names)
        lines.append([f"{row['alpha']:.2f}", *cells])
    return table(lines)


def write(rows: Sequence[Mapping[str, float]], folder: Path) -> None:
    """`wise_ft.csv`, `wise_ft.json` and `wise_ft.txt` (the table), in an existing folder, or a UserError."""
    try:
        with (folder / "wise_ft.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        (folder / "wise_ft.json").write_text(json.dumps(list(rows), indent=2) + "\n")
        (folder / "wise_ft.txt").write_text(describe(rows) + "\n")
    except OSError as error:
        raise UserError(f"The WiSE-FT curve cannot be written to {folder} ({error.strerror}).") from error
