"""What is told: the machine, the figures of models side by side as tables, and the plot.

The figures of a model are one dictionary, the same in the JSON file, the tables and the plot; docs/cost.md says what
they are. What was not measured is not in it.
"""
from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..tower import ImageTower
from . import ProfileError

Figures = dict[str, Any]
Rows = Sequence[Sequence[str]]  # of a table: its cells

PACKAGES = ("torch", "open_clip_torch", "open_clip_elip")

# Image-text pairs in an epoch. Guo et al., Sec. 4.3.1, give 4.1 and 10.1 million; 10,108,501 is the number that the
# authors' released training command has for the latter.
EPOCHS = {"CC3M+": 4_100_000, "CC12M+": 10_108_501}

GFLOPS = (
    ("GFLOPs a pair, forward", "forward"),
    ("  of them text", "text_forward"),
    ("  scoring pass, on top", "scoring"),
    ("  momentum twin, on top", "teacher"),
    ("GFLOPs a pair, all of a step", "total"),
    ("  of them text", "text"),
    ("  of them image", "image"),
    ("  of them scoring", "scoring"),
    ("  of them twin", "teacher"),
)


def machine(device: torch.device) -> dict[str, Any]:
    """What figures were measured on: device, cores and threads, versions. No names of hosts, people or folders."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", file.read_text(), re.MULTILINE) if file.exists() else []
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def describe_machine(found: dict[str, Any]) -> str:
    """One line of what `machine` returns."""
    versions = ", ".join(f"{package} {found[package]}" for package in PACKAGES)
    cores = f"{found['cores']} cores, {found['threads']} threads"
    return f"{found['device']}, {cores}; Python {found['python']}, {versions}"


def tokens_per_layer(model: nn.Module) -> list[int]:
    visual = model.visual
    if hasattr(visual, "transformer"):
        return getattr(model, "tower", ImageTower(visual)).token_counts()
    trunk = getattr(visual, "trunk", None)  # timm's
    if hasattr(trunk, "blocks") and hasattr(getattr(trunk, "patch_embed", None), "num_patches"):
        return [trunk.patch_embed.num_patches + getattr(trunk, "num_prefix_tokens", 0)] * len(trunk.blocks)
    return []


# ---------------------------------------------------------------------- tables


def table(models: Sequence[Figures]) -> list[list[str]]:
    """Rows of cells: the quantity, then each model's; in brackets what it is of the first model's."""
    batch, limit = f"batch {models[0]['batch_size']}", f"{models[0].get('memory_limit', 0) / 1e9:g} GB"
    rows = [["", *(one["label"] for one in models)]]

    def add(name: str, form: str, value: Callable[[Figures], Any], compared: bool = False) -> None:
        try:
            values = [value(one) for one in models]
        except KeyError:  # not measured
            return
        cells = [format(one, form) if one not in ("", None) else "-" for one in values]
        if compared and values[0]:
            cells = [f"{cell} ({one / values[0]:.3f})" for cell, one in zip(cells, values, strict=True)]
        if {*cells} != {"-"}:
            rows.append([name, *cells])

    add("vision parameters, M", ".2f", lambda one: one["vision_parameters"] / 1e6)
    add("text parameters, M", ".2f", lambda one: one["text_parameters"] / 1e6)
    add("image tokens a layer", "", lambda one: " ".join(_runs(one["tokens_per_layer"])))
    add("RRT", ".1%", lambda one: one["rrt"] if one["tokens_per_layer"] else None)
    add("text tokens, mean", ".1f", lambda one: one["text_tokens"])
    for name, part in GFLOPS:
        if part != "teacher" or any(one["gflops_per_pair"][part] for one in models):
            add(name, ".2f", lambda one, part=part: one["gflops_per_pair"][part], compared=part == "total")
    add(f"step, s ({batch})", "", lambda one: f"{one['seconds']['median']:.4g} ({one['time_ratio']['median']:.3f})")
    add("  quartiles, s", "", lambda one: "{low:.4g} - {high:.4g}".format(**one["seconds"]))
    add("samples/s", ".4g", lambda one: one["samples_per_second"])
    add(f"peak memory, GB ({batch})", ".2f", lambda one: one["peak"] / 1e9, compared=True)
    add(f"saved activations, GB ({batch})", ".4g", lambda one: one["saved"] / 1e9, compared=True)
    add(f"largest batch in {limit}", ",.0f", lambda one: one["largest_batch"], compared=True)
    for data in EPOCHS:
        add(f"{data} epoch, h:min", "", lambda one, data=data: _clock(one["hours_per_epoch"][data]))
    return rows


def text_table(rows: Rows, width: int | None = None) -> str:
    """Columns side by side; those that have no room in `width` (None: the terminal's, or 100) are below, beside the
    first column again."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    blocks: list[list[int]] = []
    room = 0
    for number, size in enumerate(others, 1):
        if size + 2 > room:
            blocks, room = [*blocks, []], width - first
        blocks[-1].append(number)
        room -= size + 2

    def line(row: Sequence[str], block: list[int]) -> str:
        return "  ".join([row[0].ljust(first), *(row[n].rjust(others[n - 1]) for n in block)]).rstrip()

    return "\n\n".join("\n".join(line(row, block) for row in rows) for block in blocks)


def markdown_table(rows: Rows) -> str:
    head, *body = [[name.replace("  ", "&emsp;"), *cells] for name, *cells in rows]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def make_folder(folder: Path) -> None:
    """Raises ProfileError if the folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProfileError(f"The folder {folder} cannot be made: {error}.") from error


def save(path: Path, text: str) -> None:
    """Raises ProfileError if the file cannot be written."""
    make_folder(path.parent)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"{path} cannot be written: {error}.") from error


def _runs(tokens: Sequence[int]) -> list[str]:
    counted = ((len([*run]), count) for count, run in groupby(tokens))
    return [f"{layers}x{count}" if layers > 1 else str(count) for layers, count in counted]


def _clock(hours: float) -> str:
    minutes = round(hours * 60)
    return f"{minutes // 60:,}:{minutes % 60:02d}"


def plot(models: Sequence[Figures], path: Path, title: str) -> None:
    """Bars side by side: operations by part, step time, memory."""
    from matplotlib.figure import Figure

    parts = ("text", "image", "scoring", "teacher")
    panels = {"GFLOPs a pair, forward + backward": {p: [m["gflops_per_pair"][p] for m in models] for p in parts}}
    if "seconds" in models[0]:
        panels |= {
            "seconds a step": {"": [found["seconds"]["median"] for found in models]},
            "peak memory, GB": {"": [found["peak"] / 1e9 for found in models]},
        }
    if "saved" in models[0]:
        panels["saved activations, GB"] = {"": [found["saved"] / 1e9 for found in models]}
    figure = Figure(figsize=(4 * len(panels) + 2, 0.5 * len(models) + 1.6), layout="constrained")
    figure.suptitle(title)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, stack) in zip(all_axes, panels.items(), strict=True):
        ends = [0.0] * len(models)
        for part, values in stack.items():
            bars = axes.barh([found["label"] for found in models], values, left=ends, label=part)
            ends = [a + b for a, b in zip(ends, values, strict=True)]
        axes.bar_label(bars, [f" {end:.3g} ({end / ends[0]:.2f})" for end in ends], fontsize="small")
        axes.set_title(name, fontsize="medium")
        axes.set_xlim(0, max(ends) * 1.3)
    all_axes[0].invert_yaxis()
    all_axes[0].legend(fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path} cannot be written: {error}.") from error
