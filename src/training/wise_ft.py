"""WiSE-FT: weights between the zero-shot classifier and the fine-tuned one (Wortsman et al. 2022, Eq. 1)."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .errors import UserError, reason
from .evaluation.results import table
from .sharding import gathered, load_full_state_dict

ALPHAS = tuple(i / 10 for i in range(11))  # of a curve


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict, whole on the CPU of every process; a collective call for a sharded model."""
    return {
        name: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().to("cpu", copy=True)
        for name, v in model.state_dict().items()
    }


def interpolate(zero_shot: Mapping[str, Tensor], fine_tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * zero_shot + alpha * fine_tuned, in float32 at least; exactly one of them where alpha is 0 or 1.

    What is not floating point (counters) is the fine-tuned model's.
    """

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
) -> list[dict[str, float]]:
    """Metrics at each alpha, `alpha` first; the model has its own weights again afterwards. A collective call.

    zero_shot, fine_tuned: whole state dicts of the model (sharded or not), the same on every process.
    """
    own, rows = whole_weights(model), []
    try:
        for alpha in ALPHAS:
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


def write(rows: Sequence[Mapping[str, float]], folder: Path, mixtures: Mapping[float, dict[str, Any]]) -> None:
    """`wise_ft.json` and `wise_ft.txt` (the table), and checkpoints by their alpha, in an existing folder."""
    try:
        (folder / "wise_ft.json").write_text(json.dumps(list(rows), indent=2) + "\n")
        (folder / "wise_ft.txt").write_text(describe(rows) + "\n")
        for alpha, state in mixtures.items():
            checkpoint.save(state, folder / f"wise_ft_{alpha:g}.pt")
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        raise UserError(f"The WiSE-FT curve cannot be written to {folder} ({reason(error)}).") from error
