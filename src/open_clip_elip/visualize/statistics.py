"""Figures over a set of pictures and captions: where attention goes, how alike tokens are, and which patches stay."""
from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import run_block
from ..errors import ModelError
from ..reduction.elip import cls_attention
from .trace import Stage, trace


@dataclass
class Statistics:
    """Means over all pictures."""

    layers: list[dict[str, Any]]  # by depth, with all tokens: `concentration`, `similarity`
    stages: list[dict[str, Any]]  # `kept`, and for a method that looks at texts what sets of kept patches share
    survival: dict[int, Tensor]  # by the stage's layer, (rows, columns) share of pictures that keep this patch
    pictures: int


@torch.no_grad()
def collect(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Statistics:
    """Of images (B, 3, H, W) and texts (B, T).

    Raises ModelError: the method looks at texts and there are none, or nobody to compare a picture with.
    """
    reduction, grid = model.tower.reduction, model.visual.grid_size
    by_layer, by_stage, kept = defaultdict(list), defaultdict(list), defaultdict(list)
    for image, text in batches:
        for layer, values in enumerate(by_depth(model, image), 1):
            by_layer[layer].append(values)
        found = trace(model, image, text)
        for stage in found:
            kept[stage.layer].append(stage.kept)
        if reduction.uses_text:
            if text is None:
                raise ModelError("The figures of ELIP need a caption for each picture; give shards or .txt files.")
            if len(image) > 1:  # a last picture by itself has no other's caption
                other, alone = trace(model, image, text.roll(1, dims=0)), trace(model, image)
                for one, two, three in zip(found, other, alone, strict=True):
                    by_stage[one.layer].append(torch.stack([shared(one, two), shared(one, three)]))
    rows = []
    for layer, sets in kept.items():
        all_kept = torch.cat(sets).float()
        row = {"layer": layer, "kept": all_kept.sum(dim=1).mean().item()}
        if reduction.uses_text:
            if not by_stage:
                raise ModelError("One picture has no other's caption to be compared under; give more.")
            other, alone = torch.cat(by_stage[layer], dim=1).mean(dim=1).tolist()
            chance = row["kept"] / all_kept.shape[1]
            row |= {"shared_with_other_caption": other, "shared_with_image_alone": alone, "shared_by_chance": chance}
        rows.append(row)
    depth = [torch.cat(values, dim=1).mean(dim=1).tolist() for values in by_layer.values()]
    layers = [{"layer": i, "concentration": a, "similarity": b} for i, (a, b) in enumerate(depth, 1)]
    survival = {layer: torch.cat(sets).float().mean(dim=0).view(grid) for layer, sets in kept.items()}
    return Statistics(layers, rows, survival, sum(map(len, next(iter(kept.values()), []))))


def by_depth(model: nn.Module, image: Tensor) -> list[Tensor]:
    """(2, B) for each layer, with all tokens: how concentrated the attention of `[CLS]` is on patches, 1 - entropy /
    log(patches), 0 for a uniform one and 1 for a single patch; and the mean cosine of two patch tokens behind it."""
    weight = model.visual.conv1.weight
    x, found = model.visual._embeds(image.to(weight.device, weight.dtype)), []
    for block in model.visual.transformer.resblocks:
        share = F.normalize(cls_attention(block, x), p=1, dim=1)
        concentration = 1 - torch.special.entr(share).sum(dim=1) / torch.tensor(share.shape[1]).log()
        x = run_block(block, x)
        unit = F.normalize(x[:, 1:].float(), dim=2)
        count = unit.shape[1]
        similarity = (unit.sum(dim=1).square().sum(dim=1) - count) / (count * (count - 1))
        found.append(torch.stack([concentration, similarity]).cpu())
    return found


def shared(one: Stage, other: Stage) -> Tensor:
    """(B,) share of the kept patches that both keep (Dice)."""
    kept = one.kept.sum(dim=1) + other.kept.sum(dim=1)
    return 2 * (one.kept & other.kept).sum(dim=1) / kept.clamp_min(1)


def save(found: Statistics, title: str, folder: Path) -> list[Path]:
    """layers.csv, stages.csv, survival.csv and statistics.png; their paths."""
    survival = [
        {"layer": layer, "row": row, "column": column, "share": share}
        for layer, shares in found.survival.items()
        for row, line in enumerate(shares.tolist())
        for column, share in enumerate(line)
    ]
    tables = {"layers.csv": found.layers, "stages.csv": found.stages, "survival.csv": survival}
    for name, rows in tables.items():
        _write(folder / name, rows)
    _plot(found, title).savefig(folder / "statistics.png", dpi=150)
    return [folder / name for name in (*tables, "statistics.png")]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows)


def _plot(found: Statistics, title: str):
    from matplotlib.figure import Figure

    compared = [name for name in found.stages[0] if name.startswith("shared")]
    maps = list(found.survival.items())
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(f"{title}: {found.pictures:,} pictures", fontsize=8)
    above, below = figure.subfigures(2, 1)
    axes = above.subplots(1, 2 + bool(compared))
    layers = [row["layer"] for row in found.layers]
    labels = {"concentration": "attention of [CLS]: concentration", "similarity": "patch tokens: mean cosine"}
    for one, (name, label) in zip(axes, labels.items(), strict=False):
        one.plot(layers, [row[name] for row in found.layers], marker="o")
        one.set_title(label, fontsize=8)
        one.set_xlabel("layer", fontsize=8)
    for name in compared:
        shares = [row[name] for row in found.stages]
        axes[2].plot([row["layer"] for row in found.stages], shares, marker="o", label=name[7:].replace("_", " "))
    if compared:
        axes[2].set_title("kept patches in common", fontsize=8)
        axes[2].set_xlabel("stage of layer", fontsize=8)
        axes[2].set_ylim(0, 1.02)
        axes[2].legend(fontsize=7)
    drawn = below.subplots(1, len(maps), squeeze=False)[0]
    for one, (layer, shares) in zip(drawn, maps, strict=True):
        image = one.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis")
        one.set_title(f"layer {layer}", fontsize=7)
        one.set_axis_off()
    below.colorbar(image, ax=list(drawn), label="share of pictures that keep a patch")
    return figure
