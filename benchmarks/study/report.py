"""Rows of finished runs to CSV, Markdown and plots, of whatever is finished; n says how many seeds there are.

Runs are a table with a row for each; "cells" names those that it is the result of, with spaces between.
"""
from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
from pandas import DataFrame, Series

from training.errors import UserError

from .cells import REDUCED, Cell, Run, Study, Table
from .plots import draw_plots

# Measured figures by their key in a row, with their headings; `runs.csv` has more.
METRICS = {
    "seen_top1": "seen top-1", "seen_top5": "seen top-5", "heldout_top1": "held-out top-1",
    "heldout_top5": "held-out top-5", "category_top1": "category probe", "fashion_top1": "Fashion-MNIST probe",
    "image_to_text_R@10": "TR@10", "text_to_image_R@10": "IR@10", "val_loss": "val. loss", "train_loss": "train loss",
}  # fmt: skip
T95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of Student's t, two-sided, from 2 degrees of freedom


def as_table(rows: Iterable[tuple[Run, Mapping[str, Any] | None]]) -> DataFrame:
    """Of the runs that have a row."""
    table = DataFrame([{"cells": " ".join(sorted(run.cells)), **row} for run, row in rows if row is not None])
    return table if table.empty else table.sort_values(["cells", "seed"])


def read_runs(file: Path) -> DataFrame:
    """A `runs.csv`, with its digits; UserError if it is not there."""
    if not file.is_file():
        raise UserError(f"There is no {file}, and no finished run: nothing to report.")
    return pandas.read_csv(file, keep_default_na=False, na_values=[""], dtype={"id": str, "weights": str})


def tables_of(study: Study, runs: DataFrame) -> list[Table]:
    """The study's tables, of the cells that have runs, those too that configs/study no longer has."""
    names = dict.fromkeys(name for cells in runs["cells"] for name in cells.split(" "))
    tables = []
    for table in study.tables:
        known = {cell.full_name: cell for cell in table.cells}
        cells = known | {name: Cell(name) for name in names if name.startswith(f"{table.name}/")} | known
        tables.append(replace(table, cells=[cell for name, cell in cells.items() if name in names]))
    return tables


def runs_of(cell: Cell, runs: DataFrame) -> DataFrame:
    """By seed."""
    return runs[[cell.full_name in cells.split(" ") for cells in runs["cells"]]].set_index("seed").sort_index()


def values(runs: DataFrame, cell: Cell, key: str) -> Series:
    """A figure of a cell by seed, of reduced evaluation where the cell asks for it; without seeds that lack it."""
    own = runs_of(cell, runs)
    key = f"reduced_{key}" if cell.evaluation == REDUCED and key not in ("gflops", "train_loss") else key
    return own[key].dropna() if key in own else Series(dtype=float)


def paired(runs: DataFrame, table: Table, cell: Cell, key: str) -> Series:
    """Differences to the table's reference, by seed: both began with the same weights and saw the same data."""
    return (values(runs, cell, key) - values(runs, Cell(f"{table.name}/{table.reference}"), key)).dropna()


def mean_std(figures: Series) -> tuple[float, float]:
    """Mean and sample standard deviation (0 of one value)."""
    return statistics.fmean(figures), statistics.stdev(figures) if len(figures) > 1 else 0.0


def is_clear(differences: Series) -> bool:
    """Whether a paired t-test at 5 % tells the mean difference from 0, over at least three seeds."""
    if (n := len(differences)) < 3:
        return False
    mean, std = mean_std(differences)
    return abs(mean) > T95[min(n - 3, len(T95) - 1)] * std / math.sqrt(n)


def write_report(study: Study, runs: DataFrame, folder: Path) -> str:
    """Writes runs.csv, README.md and the plots into `folder`; returns what there is in a line."""
    if runs.empty:
        return "no run is finished yet: nothing to report"
    folder.mkdir(parents=True, exist_ok=True)
    tables = tables_of(study, runs)
    runs.to_csv(folder / "runs.csv", index=False, float_format="%.17g")  # all digits
    texts = (f"## {table.title}\n\n{markdown(table, runs)}\n{_changes(table, runs)}" for table in tables if table.cells)
    text = "\n".join(texts)
    text += "".join(f"\n![{plot.stem}]({plot.name})\n" for plot in draw_plots(tables, runs, folder, values))
    seeds = ", ".join(map(str, sorted(set(runs["seed"]))))
    model, threads = runs["model"].iloc[0], runs["threads"].iloc[0]
    heading = (
        f"# Results of the study\n\n`python scripts/study.py`: {model}, batches of {study.batch_size}, "
        f"{study.samples:,} samples a run where compute is not matched, {threads} thread(s), seeds {seeds}. "
        "Mean (standard deviation over the seeds); accuracies and recalls in %. All runs of a seed begin with the same "
        "weights and see the same data in the same order, so differences are taken by seed. Bold: a paired t-test at "
        "5 % tells the difference from none, over at least three seeds; of so many comparisons, one in twenty is bold "
        "by chance.\n\nseen: zero-shot over names that were trained on, in a style that was not. held-out: the same "
        "over names that were not trained on; TR and IR: retrieval of their captions and pictures."
    )
    (folder / "README.md").write_text(f"{heading}\n\n{text}", encoding="utf-8")
    return f"{len(runs)} runs reported in {folder}"


def markdown(table: Table, runs: DataFrame, *, page: bool = False) -> str:
    """The figures of a table's cells. A `page` has fewer, bold where they differ clearly from the reference's."""
    metrics = [key for key in _shown(table, runs) if not (page and key == "heldout_top1")]
    costs = ["seeds", "RRT", "GFLOP a pair", "samples", *([] if page else ["PFLOP"])]
    lines = [["", *costs, *(METRICS[key] for key in metrics)]]
    for cell in table.cells:
        own = runs_of(cell, runs)
        rrt, gflops, pflops = own[["rrt", "gflops", "pflops"]].mean()
        found = [str(len(own)), f"{100 * rrt:.1f} %", f"{gflops:.3f}", f"{own['samples'].iloc[0]:,}", f"{pflops:.4f}"]
        name = f"`{cell.name}`" + " (reference)" * (cell.name == table.reference) if page else cell.name
        lines.append([name, *found[: len(costs)]])
        for key in metrics:
            text = _text(values(runs, cell, key), key, "{:.{d}f} ± {:.{d}f}" if page else "{:.{d}f} ({:.{d}f})")
            lines[-1].append(f"**{text}**" if page and is_clear(paired(runs, table, cell, key)) else text)
    return _table(lines)


def _changes(table: Table, runs: DataFrame) -> str:
    """The differences to the reference, if there are any."""
    metrics = _shown(table, runs)
    lines = [["", "seeds", *(METRICS[key] for key in metrics)]]
    for cell in (cell for cell in table.cells if cell.name != table.reference):
        lines.append([cell.name, str(len(paired(runs, table, cell, "train_loss")))])
        for changed, key in ((paired(runs, table, cell, key), key) for key in metrics):
            text = _text(changed, key, "{:+.{d}f} ({:.{d}f})")
            lines[-1].append(f"**{text}**" if is_clear(changed) else text)
    return f"Difference to `{table.reference}`, paired by seed:\n\n{_table(lines)}\n" if len(lines) > 1 else ""


def _shown(table: Table, runs: DataFrame) -> list[str]:
    return [key for key in METRICS if any(len(values(runs, cell, key)) for cell in table.cells)]


def _text(figures: Series, key: str, form: str) -> str:
    scale, digits = (1, 3) if key.endswith("loss") else (100, 1)
    return form.format(*mean_std(figures * scale), d=digits) if len(figures) else ""


def _table(lines: Iterable[Sequence[str]]) -> str:
    head, *rest = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---", *["---:"] * (len(head) - 1)], *rest))


def fill_page(page: str, study: Study, runs: DataFrame) -> str:
    """`page` with the table NAME between each pair of lines `<!-- table NAME -->` and `<!-- end -->`; UserError if the
    study does not have it."""
    tables = {table.name: table for table in tables_of(study, runs)}

    def fill(match: re.Match) -> str:
        if match[1] not in tables:
            raise UserError(f"The study has no table {match[1]}; it has {', '.join(tables)}.")
        return f"<!-- table {match[1]} -->\n{markdown(tables[match[1]], runs, page=True)}<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)
