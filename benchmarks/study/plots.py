"""Plots of the study, as PNG."""
from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.errors import UserError

from .cells import Study, Table

Rows = Mapping[tuple[str, int], Mapping[str, Any]]
METRICS = (("seen_top1", "zero-shot top-1, seen names (%)"), ("heldout_top1", "zero-shot top-1, held-out names (%)"))
DEFAULT_LAM, DEFAULT_SCALE = 0.6, "match"


def draw_plots(study: Study, rows: Rows, folder: Path) -> list[Path]:
    """Quality against operations for tables of methods, and against lam; returns the files, none without matplotlib.

    Raises:
        UserError: a file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed (pip install '.[profile]'): no plots")
        return []
    matplotlib.use("Agg")
    drawn = []
    for table in study.tables:
        own = {cell.name: _rows_of(cell.full_name, rows) for cell in table.cells}
        own = {name: found for name, found in own.items() if found}
        if table.part == "methods" and len(own) > 1:
            drawn.append(_quality_against_compute(table, own, folder / f"{table.name}.png"))
        elif table.name == "lam" and len(own) > 1:
            drawn.append(_lam_curve(table, own, folder / "lam.png"))
    return drawn


def _rows_of(name: str, rows: Rows) -> list[Mapping[str, Any]]:
    return [row for (cell, _), row in sorted(rows.items()) if cell == name]


def _axes(count: int):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(5.2 * count, 3.8), dpi=100, layout="constrained")
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _quality_against_compute(table: Table, own: Mapping[str, Sequence], file: Path) -> Path:
    figure, axes = _axes(len(METRICS))
    for axis, (metric, label) in zip(axes, METRICS, strict=True):
        for number, (name, rows) in enumerate(own.items()):
            points = [(row["gflops"], 100 * row[metric]) for row in rows if "gflops" in row and metric in row]
            if points:
                x, y = ([point[i] for point in points] for i in (0, 1))
                colour = f"C{number % 10}"
                axis.plot(x, y, ".", color=colour, alpha=0.4)
                axis.plot(statistics.fmean(x), statistics.fmean(y), "o", color=colour, label=name)
        axis.set(xlabel="GFLOP a pair in training", ylabel=label)
    axes[0].legend(fontsize=7)
    figure.suptitle(table.title)
    return _save(figure, file)


def _lam_curve(table: Table, own: Mapping[str, Sequence], file: Path) -> Path:
    """A line for each scale of the text. Where lam is 1 the scale does not matter: the point is on both lines."""
    options = {cell.name: cell.options for cell in table.cells}
    figure, axes = _axes(len(METRICS))
    for axis, (metric, label) in zip(axes, METRICS, strict=True):
        lines: dict[str, dict[float, list[float]]] = {}
        for name, rows in own.items():
            reduction = options[name].get("token-reduction", {})
            lam = float(reduction.get("lam", DEFAULT_LAM))
            scales = ("match", "none") if lam == 1 else (reduction.get("text_scale", DEFAULT_SCALE),)
            for scale in scales:
                lines.setdefault(scale, {})[lam] = [100 * row[metric] for row in rows if metric in row]
        for scale, points in sorted(lines.items()):
            known = sorted((lam, values) for lam, values in points.items() if values)
            means = [statistics.fmean(values) for _, values in known]
            spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in known]
            axis.errorbar([lam for lam, _ in known], means, spread, marker="o", capsize=3, label=f"text_scale {scale}")
        axis.set(xlabel="lam (0: text only, 1: image only)", ylabel=label)
    axes[0].legend(fontsize=8)
    figure.suptitle(table.title)
    return _save(figure, file)


def _save(figure, file: Path) -> Path:
    from matplotlib import pyplot

    try:
        figure.savefig(file, metadata={"Software": None})
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); check --results.") from None
    finally:
        pyplot.close(figure)
    return file
