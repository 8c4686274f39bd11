"""Kept patches and the attention that chose them, drawn over pictures."""
from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor, nn

from .trace import Stage

SIDE = 256  # pixels of a panel's longer side, at least
GREY, LINE = 128, (255, 90, 0)


class Panel(NamedTuple):
    """What is seen of one stage, or of the picture before all of them."""

    title: str
    kept: Image.Image
    attention: Image.Image | None = None


class View(NamedTuple):
    """A picture, maybe under a caption."""

    name: str
    caption: str | None
    panels: list[Panel]  # the picture itself, then one a stage


def views(
    model: nn.Module, image: Tensor, names: Sequence[str], captions: Sequence[str | None], found: Sequence[Stage]
) -> list[View]:
    """Of what `trace` found in images (B, 3, H, W), as the model takes them, one each."""
    grid = model.visual.grid_size
    return [
        View(name, caption, panels(unnormalised(model, one), [_row(stage, i) for stage in found], grid))
        for i, (name, caption, one) in enumerate(zip(names, captions, image, strict=True))
    ]


def unnormalised(model: nn.Module, image: Tensor) -> ndarray:
    """(H, W, 3) uint8, what the model sees of an image (3, H, W)."""
    mean, std = (torch.tensor(model.visual.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return ((image.float().cpu() * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def panels(picture: ndarray, found: Sequence[Stage], grid: tuple[int, int]) -> list[Panel]:
    """Of one picture (H, W, 3) uint8, in whose stages there is no dimension of a batch."""
    cell = -(-SIDE // max(grid))  # pixels of a patch's side
    large = Image.fromarray(picture).resize((grid[1] * cell, grid[0] * cell), Image.Resampling.BICUBIC)
    pixels, result = np.asarray(large).astype(np.float32), [Panel("picture", large)]
    for layer, token, kept, scores in found:
        merged = len(token[~kept & (token >= 0)].unique())
        title = f"layer {layer}: {int(kept.sum())} kept" + (f" + {merged} merged" if merged else "")
        token, kept = (one.reshape(grid).numpy() for one in (token, kept))
        alike = merged and scores is None  # then it is of interest what was merged with what
        regions = np.where(kept, -2, token) if alike else kept
        shown = _averaged(pixels, regions, cell) if alike else _dimmed(pixels, kept, cell)
        heat = None if scores is None else _outlined(_heat(pixels, scores.reshape(grid).numpy(), cell), regions, cell)
        result.append(Panel(title, _outlined(shown, regions, cell), heat))
    return result


def sheet(shown: Sequence[View], title: str, beside: int = 1):
    """A matplotlib figure, one column a stage: `beside` views (captions of a picture) beside each other, then the next
    ones below them."""
    from matplotlib.figure import Figure

    columns = len(shown[0].panels)
    rows = 2 if any(panel.attention for panel in shown[0].panels) else 1
    width, height = shown[0].panels[0].kept.size
    inches = 1.6 * height / width
    lines = len(shown) // beside
    size = (1.7 * columns * beside, lines * (rows * inches + 0.5) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=8)
    parts = figure.subfigures(lines, beside, squeeze=False).ravel()
    for part, (name, caption, found) in zip(parts, shown, strict=True):
        text = textwrap.shorten(caption or f"{name}, without a caption", 24 * columns, placeholder="...")
        part.suptitle(text, x=0.01, ha="left", fontsize=8, weight="bold", parse_math=False)
        for column, axes in enumerate(part.subplots(rows, columns, squeeze=False).T):
            panel = found[column]
            axes[0].set_title(panel.title, fontsize=6)
            for one, drawn in zip(axes, (panel.kept, panel.attention), strict=False):
                one.set_axis_off()
                if drawn is not None:
                    one.imshow(drawn)
    return figure


def _row(stage: Stage, i: int) -> Stage:
    return Stage(stage.layer, stage.token[i], stage.kept[i], None if stage.scores is None else stage.scores[i])


def _large(grid: ndarray, cell: int) -> ndarray:
    """A value a patch to one a pixel."""
    return grid.repeat(cell, 0).repeat(cell, 1)


def _dimmed(pixels: ndarray, kept: ndarray, cell: int) -> ndarray:
    return np.where(_large(kept, cell)[..., None], pixels, 0.25 * pixels + 0.75 * GREY)


def _averaged(pixels: ndarray, regions: ndarray, cell: int) -> ndarray:
    """Merged patches in the mean colour of all in their token, tinted, for they may lie far apart."""
    from matplotlib import colormaps

    shown, large = pixels.copy(), _large(regions, cell)
    for number, token in enumerate(np.unique(regions[regions >= 0])):
        tint = 255 * np.array(colormaps["tab10"](number % 10)[:3])
        shown[large == token] = 0.6 * pixels[large == token].mean(axis=0) + 0.4 * tint
    return shown


def _heat(pixels: ndarray, scores: ndarray, cell: int) -> ndarray:
    """From black over red to yellow, the highest score, over the picture in grey; no colour where there is none."""
    from matplotlib import colormaps

    there = _large(np.isfinite(scores), cell)[..., None]
    share = np.nan_to_num(scores) / max(np.nanmax(scores), np.finfo(np.float32).tiny)
    grey = np.broadcast_to(pixels.mean(axis=-1, keepdims=True), pixels.shape)
    colours = 255 * colormaps["inferno"](_large(share, cell))[..., :3]
    return np.where(there, 0.25 * grey + 0.75 * colours, 0.25 * grey + 0.75 * GREY)


def _outlined(pixels: ndarray, regions: ndarray, cell: int) -> Image.Image:
    """With lines between regions."""
    large, line = _large(regions, cell), np.zeros(pixels.shape[:2], dtype=bool)
    for shift in (1, 2):
        line[shift:] |= large[shift:] != large[:-shift]
        line[:, shift:] |= large[:, shift:] != large[:, :-shift]
    shown = pixels.copy()
    shown[line] = LINE
    return Image.fromarray(shown.round().astype(np.uint8))
