"""The figures of one model, and of several side by side: table, Markdown, plot."""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn

from ..tower import ImageTower
from .errors import ProfileError
from .flops import Flops
from .timing import Spread

NO_MATPLOTLIB = "--plot needs matplotlib, which is not installed; pip install 'open_clip_elip[profile]' brings it."

Rows = Sequence[Sequence[str]]  # of a table: its cells

# Image-text pairs in an epoch. Guo et al., Sec. 4.3.1, give 4.1 and 10.1 million; 10,108,501 is the number that the
# authors' released training command has for the latter.
EPOCHS = {"CC3M+": 4_100_000, "CC12M+": 10_108_501}


@dataclass
class Profile:
    """What one model costs in training, on one device. None: not measured.

    Attributes:
        label: the model and its options.
        batch_size: pairs in a step.
        vision_parameters, text_parameters: of the two towers.
        tokens_per_layer: that enter each layer of the image tower, `[CLS]` included; [] for a tower without tokens.
        rrt: ratio of removed tokens (Guo et al., Table 1; `reduction.TokenReduction.rrt`).
        text_tokens: columns that a caption takes up in the text tower, on average.
        flops: of the whole batch.
        seconds: of a step.
        time_ratio: step time over the first model's, of each round.
        peak: bytes in use at most, parameters, gradients and optimizer state included.
        saved: bytes that the forward pass keeps for the backward pass.
        largest_batch: pairs that fit `memory_limit` bytes; `fixed` + pairs x `per_pair` bytes, and the loss's.
    """

    label: str
    batch_size: int
    vision_parameters: int
    text_parameters: int
    tokens_per_layer: list[int]
    rrt: float
    text_tokens: float
    flops: Flops
    seconds: Spread | None = None
    time_ratio: Spread | None = None
    peak: int | None = None
    saved: int | None = None
    largest_batch: int | None = None
    memory_limit: float | None = None
    fixed: float | None = None
    per_pair: float | None = None

    @property
    def rate(self) -> float | None:
        """Samples a second."""
        return None if self.seconds is None else self.batch_size / self.seconds.median

    def gflops(self, name: str = "total") -> float:
        """Of one pair."""
        return getattr(self.flops, name) / self.batch_size / 1e9

    def to_dict(self) -> dict[str, Any]:
        names = ("forward", "scoring", "backward", "total", "text_forward", "text_backward", "image")
        found = asdict(self) | {"samples_per_second": self.rate}
        for name in ("seconds", "time_ratio"):
            found[name] = getattr(self, name) and getattr(self, name).to_dict()
        found["gflops_per_pair"] = {name: self.gflops(name) for name in names}
        found["tflops_per_step"] = self.flops.total / 1e12
        if self.rate is not None:
            found["hours_per_epoch"] = {data: pairs / self.rate / 3600 for data, pairs in EPOCHS.items()}
        return found


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters of the image tower, and all others but the logit scale and bias."""
    vision = sum(p.numel() for p in model.visual.parameters())
    return vision, sum(p.numel() for name, p in model.named_parameters() if p.ndim and "visual." not in name)


def tokens_per_layer(model: nn.Module) -> list[int]:
    """Tokens that enter each layer of the image tower in training; [] for a tower without tokens."""
    visual = model.visual
    if hasattr(visual, "transformer"):
        return getattr(model, "tower", ImageTower(visual)).token_counts()
    trunk = getattr(visual, "trunk", None)  # timm's
    if hasattr(trunk, "blocks") and hasattr(getattr(trunk, "patch_embed", None), "num_patches"):
        return [trunk.patch_embed.num_patches + getattr(trunk, "num_prefix_tokens", 0)] * len(trunk.blocks)
    return []


# ---------------------------------------------------------------------- tables


def table(profiles: Sequence[Profile]) -> list[list[str]]:
    """Rows of cells: the quantity, then each model's; in brackets what it is of the first model's."""
    first = profiles[0]
    batch, limit = f"batch {first.batch_size}", f"{(first.memory_limit or 0) / 1e9:g} GB"
    of_pair = "GFLOPs a pair, forward"
    quantities: list[tuple[str, str, Callable[[Profile], Any]]] = [  # name, form, value
        ("vision parameters, M", ".2f", lambda p: p.vision_parameters / 1e6),
        ("text parameters, M", ".2f", lambda p: p.text_parameters / 1e6),
        ("image tokens a layer", "", lambda p: _runs(p.tokens_per_layer) or None),
        ("RRT", ".1%", lambda p: p.rrt if p.tokens_per_layer else None),
        ("text tokens, mean", ".1f", lambda p: p.text_tokens),
        (of_pair, ".2f", lambda p: p.gflops("forward")),
        ("  of them text", ".2f", lambda p: p.gflops("text_forward")),
        ("  scoring pass, on top", ".2f", lambda p: p.gflops("scoring")),
        (f"{of_pair} + backward + scoring", ".2f", Profile.gflops),
        ("  of them text", ".2f", lambda p: p.gflops("text")),
        ("  of them image", ".2f", lambda p: p.gflops("image")),
        ("  of them scoring", ".2f", lambda p: p.gflops("scoring")),
        (f"step, s ({batch})", ".4g", lambda p: p.seconds and p.seconds.median),
        ("  quartiles, s", "", lambda p: p.seconds and f"{p.seconds.low:.4g} - {p.seconds.high:.4g}"),
        ("samples/s", ".4g", lambda p: p.rate),
        (f"peak memory, GB ({batch})", ".2f", lambda p: p.peak and p.peak / 1e9),
        ("saved activations, MB a pair", ".2f", lambda p: p.saved and p.saved / p.batch_size / 1e6),
        (f"largest batch in {limit}", ",.0f", lambda p: p.largest_batch),
        *((f"{data} epoch, h:min", "", lambda p, n=n: p.rate and _clock(n / p.rate)) for data, n in EPOCHS.items()),
    ]
    compared = {f"{of_pair} + backward + scoring", "saved activations, MB a pair"}
    compared |= {name for name, _, _ in quantities if name.startswith(("step, s", "peak memory", "largest batch"))}
    rows = [["", *(p.label for p in profiles)]]
    for name, form, value in quantities:
        cells = []
        for profile in profiles:
            found, base = value(profile), value(first)
            cell = "-" if found is None else format(found, form)
            if found is not None and name in compared and base:
                share = profile.time_ratio.median if name.startswith("step, s") else found / base
                cell += f" ({share:.3f})"
            cells.append(cell)
        if any(cell != "-" for cell in cells):
            rows.append([name, *cells])
    return rows


def text_table(rows: Rows) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Rows) -> str:
    head, *body = [[cell.strip() if i else cell.replace("  ", "&emsp;") for i, cell in enumerate(row)] for row in rows]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def save(path: Path, text: str) -> None:
    """Raises ProfileError if the file cannot be written."""
    make_folder(path.parent)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"{path} cannot be written: {error}.") from error


def make_folder(folder: Path) -> None:
    """Raises ProfileError if the folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProfileError(f"The folder {folder} cannot be made: {error}.") from error


def save_tables(folder: Path, name: str, found: dict[str, Any], title: str, text: str, rows: Rows) -> None:
    """`name`.json with all that was found, and `name`.md with `text` and the table."""
    save(folder / f"{name}.json", json.dumps(found, indent=2) + "\n")
    save(folder / f"{name}.md", f"# {title}\n\n" + text.replace("\n", "  \n") + "\n\n" + markdown_table(rows))


def _runs(tokens: Sequence[int]) -> str:
    return " ".join(f"{len(list(group))}x{count}" for count, group in groupby(tokens))


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60:,}:{minutes % 60:02d}"


# ---------------------------------------------------------------------- plot


def plot(profiles: Sequence[Profile], path: Path, title: str) -> None:
    """Bars side by side: operations by part, step time, memory.

    Raises:
        ProfileError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ProfileError(NO_MATPLOTLIB) from error
    parts = ("text", "image", "scoring")
    panels = [("GFLOPs a pair, forward + backward", [(part, [p.gflops(part) for p in profiles]) for part in parts])]
    measured = {
        "seconds a step": [p.seconds and p.seconds.median for p in profiles],
        "peak memory, GB": [p.peak and p.peak / 1e9 for p in profiles],
        "saved activations, MB a pair": [p.saved and p.saved / p.batch_size / 1e6 for p in profiles],
    }
    panels += [(name, [("", values)]) for name, values in measured.items() if None not in values]
    labels = [p.label for p in profiles]
    figure = Figure(figsize=(4 * len(panels) + 2, 0.5 * len(profiles) + 1.6), layout="constrained")
    figure.suptitle(title)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for i, (axes, (name, stacks)) in enumerate(zip(all_axes, panels, strict=True)):
        start = [0.0] * len(profiles)
        for part, values in stacks:
            axes.barh(labels, values, left=start, label=part)
            start = [a + b for a, b in zip(start, values, strict=True)]
        axes.set_title(name, fontsize="medium")
        axes.invert_yaxis()
        if i:
            axes.set_yticklabels([])
        else:
            axes.legend(fontsize="small")
        for y, value in enumerate(start):
            axes.text(value, y, f" {value:.3g} ({value / start[0]:.2f})", va="center", fontsize="small")
        axes.set_xlim(0, max(start) * 1.3)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ProfileError(f"The plot cannot be written to {path}: {error}") from error
