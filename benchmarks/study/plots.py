"""Plots of the study, as PNG."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pandas import DataFrame

from .cells import Table

PLOTTED = {"seen_top1": "zero-shot top-1, seen names (%)", "heldout_top1": "zero-shot top-1, held-out names (%)"}
LAM, SCALE = 0.6, "match"  # the defaults


def draw_plots(tables: Sequence[Table], runs: DataFrame, folder: Path, values: Callable) -> list[Path]:
    """Quality against operations for tables of methods, and against lam; returns the files, none without matplotlib.

    `values` gives (runs, cell, key) -> a figure of the cell by seed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed (pip install '.[profile]'): no plots")
        return []
    drawn = {folder / f"{t.name}.png": t for t in tables if t.cells and (t.part == "methods" or t.name == "lam")}
    for file, table in drawn.items():
        figure = Figure(figsize=(10.4, 3.8), layout="constrained")
        figure.suptitle(table.title)
        for axis, (key, label) in zip(figure.subplots(1, len(PLOTTED)), PLOTTED.items(), strict=True):
            axis.set(ylabel=label, xlabel="GFLOP a pair in training")
            axis.grid(alpha=0.3)
            lines: dict[str, dict[float, tuple[float, float]]] = {"match": {}, "none": {}}
            for number, cell in enumerate(table.cells):
                found = 100 * values(runs, cell, key)
                gflops = values(runs, cell, "gflops")[found.index]
                if table.name != "lam":
                    axis.plot(gflops, found, ".", color=f"C{number % 10}", alpha=0.4)
                    axis.plot(gflops.mean(), found.mean(), "o", color=f"C{number % 10}", label=cell.name)
                    continue
                own = {"lam": LAM, "text_scale": SCALE, **cell.options.get("token-reduction", {})}
                for scale in lines if own["lam"] == 1 else [own["text_scale"]]:  # at 1 the scale does not matter
                    lines[scale][own["lam"]] = found.mean(), found.std()
            for scale, points in ((scale, points) for scale, points in lines.items() if points):
                x, means, spreads = zip(*((lam, *points[lam]) for lam in sorted(points)), strict=True)
                axis.errorbar(x, means, spreads, marker="o", capsize=3, label=f"text_scale {scale}")
                axis.set_xlabel("lam (0: text only, 1: image only)")
        figure.axes[0].legend(fontsize=7)
        figure.savefig(file, metadata={"Software": None})
    return list(drawn)
