"""Rows of finished runs to CSV, Markdown and plots, of whatever is finished; n says how many seeds there are."""
from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError

from .cells import REDUCED, Cell, Study, Table
from .plots import draw_plots

Row = Mapping[str, Any]
Rows = Mapping[tuple[str, int], Row]  # by (full name of a cell, seed)


@dataclass(frozen=True)
class Metric:
    """A measured figure: its key in a row, heading, factor, decimals, and whether more is better."""

    key: str
    heading: str
    scale: float = 100.0
    digits: int = 1
    higher: bool = True


METRICS = (
    Metric("seen_top1", "seen top-1"),
    Metric("seen_top5", "seen top-5"),
    Metric("heldout_top1", "held-out top-1"),
    Metric("heldout_top5", "held-out top-5"),
    Metric("category_top1", "category probe"),
    Metric("fashion_top1", "Fashion-MNIST probe"),
    Metric("image_to_text_R@1", "TR@1"),
    Metric("image_to_text_R@5", "TR@5"),
    Metric("image_to_text_R@10", "TR@10"),
    Metric("text_to_image_R@1", "IR@1"),
    Metric("text_to_image_R@5", "IR@5"),
    Metric("text_to_image_R@10", "IR@10"),
    Metric("image_to_text_mean_rank", "TR mean rank", 1.0, 1, False),
    Metric("text_to_image_mean_rank", "IR mean rank", 1.0, 1, False),
    Metric("val_loss", "val. loss", 1.0, 3, False),
    Metric("train_loss", "train loss", 1.0, 3, False),
    Metric("seen_mean_per_class", "seen mean per class"),
)
# In the Markdown tables; the CSV files have all.
SHOWN = (
    "seen_top1", "seen_top5", "heldout_top1", "heldout_top5", "category_top1", "fashion_top1",
    "image_to_text_R@10", "text_to_image_R@10", "val_loss", "train_loss",
)  # fmt: skip
TEXTS = ("id", "weights", "model", "device")  # of a row, whatever they look like
# In the shorter tables of a page of the documentation.
SHORT = (
    "seen_top1", "seen_top5", "heldout_top5", "category_top1", "fashion_top1", "image_to_text_R@10",
    "text_to_image_R@10", "val_loss", "train_loss",
)  # fmt: skip
COSTS = ("rrt", "gflops", "samples", "steps", "pflops", "seconds")


def value(row: Row, key: str, cell: Cell) -> float | None:
    """A figure of a cell; None if the run does not have it. Of reduced evaluation where the cell asks for it."""
    own = f"reduced_{key}"
    found = row.get(own) if cell.evaluation == REDUCED and key != "train_loss" else row.get(key)
    return None if found is None else float(found)


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 of one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def paired(rows: Rows, table: Table, cell: Cell, key: str) -> list[float]:
    """Differences to the table's reference, by seed: both began with the same weights and saw the same data."""
    reference = next(c for c in table.cells if c.name == table.reference)
    differences = []
    for (name, seed), row in sorted(rows.items()):
        if name == cell.full_name and (reference.full_name, seed) in rows:
            own, other = value(row, key, cell), value(rows[reference.full_name, seed], key, reference)
            if own is not None and other is not None:
                differences.append(own - other)
    return differences


# Two-sided 95 % points of Student's t, by degrees of freedom.
_T95 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def is_clear(differences: Sequence[float]) -> bool:
    """Whether a paired t-test at 5 % tells the mean difference from 0, over at least three seeds."""
    if len(differences) < 3:
        return False
    mean, std = mean_std(differences)
    return abs(mean) > _T95.get(len(differences) - 1, 2.262) * std / math.sqrt(len(differences))


def read_rows(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of a `runs.csv`, with its digits.

    Raises:
        UserError: it is not there.
    """
    if not file.is_file():
        raise UserError(f"There is no {file}, and no finished run: nothing to report.")
    rows = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            cells = line.pop("cells").split(" ")
            row = {key: text if key in TEXTS else _read(text) for key, text in line.items() if text}
            rows |= {(cell, row["seed"]): row for cell in cells}
    return rows


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def write_report(study: Study, rows: Rows, folder: Path) -> str:
    """Writes runs.csv, cells.csv, README.md and the plots into `folder`; returns what there is in a line.

    Args:
        rows: of the finished runs; a run that several cells share is there for each of them.
    """
    if not rows:
        return "no run is finished yet: nothing to report"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.csv").write_text(_runs_csv(rows), encoding="utf-8")
    (folder / "cells.csv").write_text(_cells_csv(study, rows), encoding="utf-8")
    tables = "\n".join(markdown(table, rows) for table in study.tables if _seeds(table, rows))
    plots = draw_plots(study, rows, folder)
    (folder / "README.md").write_text(_heading(study, rows) + tables + _pictures(plots), encoding="utf-8")
    runs = len({row["id"] for row in rows.values()})
    return f"{runs} runs reported in {folder}"


def _seeds(table: Table, rows: Rows) -> set[int]:
    names = {cell.full_name for cell in table.cells}
    return {seed for name, seed in rows if name in names}


def _runs_csv(rows: Rows) -> str:
    """One row a run; `cells` names all that it stands for."""
    cells: dict[str, list[str]] = {}
    unique: dict[str, dict[str, Any]] = {}
    for (name, _), row in sorted(rows.items()):
        cells.setdefault(row["id"], []).append(name)
        unique[row["id"]] = dict(row)
    lines = []
    for key, row in sorted(unique.items(), key=lambda item: (cells[item[0]], item[1]["seed"])):
        plain = {name: v if isinstance(v, (int, float, str)) else json.dumps(v) for name, v in row.items()}
        lines.append({"cells": " ".join(cells[key]), **plain})
    return _csv(lines, digits=17)  # all of them


def _cells_csv(study: Study, rows: Rows) -> str:
    """One row a cell of a table: seeds, mean and standard deviation of the figures and of their differences."""
    lines = []
    for table in study.tables:
        for cell in table.cells:
            own = [row for (name, _), row in sorted(rows.items()) if name == cell.full_name]
            if not own:
                continue
            line: dict[str, Any] = {"part": table.part, "table": table.name, "cell": cell.name, "n": len(own)}
            for key in COSTS:
                line[key] = statistics.fmean([float(row[key]) for row in own if row.get(key) is not None] or [math.nan])
            for metric in METRICS:
                values = [v for row in own if (v := value(row, metric.key, cell)) is not None]
                if values:
                    mean, std = mean_std(values)
                    line |= {f"{metric.key}_mean": mean, f"{metric.key}_std": std}
                    if cell.name != table.reference and (differences := paired(rows, table, cell, metric.key)):
                        mean, std = mean_std(differences)
                        line |= {f"{metric.key}_difference": mean, f"{metric.key}_difference_std": std}
            lines.append(line)
    return _csv(lines)


def _csv(lines: Sequence[Mapping[str, Any]], digits: int = 6) -> str:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({key: f"{v:.{digits}g}" if isinstance(v, float) else v for key, v in line.items()})
    return text.getvalue()


def markdown(table: Table, rows: Rows) -> str:
    """Two tables: the figures, and the differences to the reference. What no run has is left out."""
    names = {cell.full_name: cell for cell in table.cells}
    mine = {key: row for key, row in rows.items() if key[0] in names}

    def is_known(metric: Metric) -> bool:
        return any(value(row, metric.key, names[name]) is not None for (name, _), row in mine.items())

    metrics = [metric for metric in METRICS if metric.key in SHOWN and is_known(metric)]
    heads = ["", "seeds", "RRT", "GFLOP a pair", "samples", "PFLOP", *(m.heading for m in metrics)]
    figures, changes = [heads], [["", "seeds", *(m.heading for m in metrics)]]
    for cell in table.cells:
        own = [row for (name, _), row in sorted(mine.items()) if name == cell.full_name]
        if not own:
            continue
        gflops, pflops = (_mean(own, key, digits) for key, digits in (("gflops", 3), ("pflops", 4)))
        line = [cell.name, str(len(own)), f"{100 * statistics.fmean(row['rrt'] for row in own):.1f} %", gflops]
        line += [f"{own[0]['samples']:,}", pflops]
        difference = [cell.name, str(len(paired(rows, table, cell, "train_loss")))]
        for metric in metrics:
            values = [v * metric.scale for row in own if (v := value(row, metric.key, cell)) is not None]
            line.append("{:.{d}f} ({:.{d}f})".format(*mean_std(values), d=metric.digits) if values else "")
            changed = [v * metric.scale for v in paired(rows, table, cell, metric.key)]
            text = "{:+.{d}f} ({:.{d}f})".format(*mean_std(changed), d=metric.digits) if changed else ""
            difference.append(f"**{text}**" if text and is_clear(changed) else text)
        figures.append(line)
        if cell.name != table.reference:
            changes.append(difference)
    text = f"## {table.title}\n\n{_table(figures)}\n"
    if len(changes) > 1:
        text += f"Difference to `{table.reference}`, paired by seed:\n\n{_table(changes)}\n"
    return text


def short_table(table: Table, rows: Rows) -> str:
    """One table of figures, bold where they differ clearly from the reference's."""
    own = [(cell, [row for (name, _), row in sorted(rows.items()) if name == cell.full_name]) for cell in table.cells]
    metrics = [
        metric for metric in METRICS if metric.key in SHORT
        and any(value(row, metric.key, cell) is not None for cell, found in own for row in found)
    ]  # fmt: skip
    lines = [["", "seeds", "RRT", "GFLOP a pair", "samples", *(metric.heading for metric in metrics)]]
    for cell, found in own:
        if not found:
            continue
        name = f"`{cell.name}`" + (" (reference)" if cell.name == table.reference else "")
        rrt = f"{100 * statistics.fmean(row['rrt'] for row in found):.1f} %"
        line = [name, str(len(found)), rrt, _mean(found, "gflops", 3), f"{found[0]['samples']:,}"]
        for metric in metrics:
            values = [v * metric.scale for row in found if (v := value(row, metric.key, cell)) is not None]
            text = "{:.{d}f} ± {:.{d}f}".format(*mean_std(values), d=metric.digits) if values else ""
            clear = cell.name != table.reference and is_clear(paired(rows, table, cell, metric.key))
            line.append(f"**{text}**" if clear else text)
        lines.append(line)
    return _table(lines)


def fill_page(page: str, study: Study, rows: Rows) -> str:
    """`page` with the table NAME between each pair of lines `<!-- table NAME -->` and `<!-- end -->`.

    Raises:
        UserError: a table that the study does not have.
    """
    tables = {table.name: table for table in study.tables}

    def fill(match: re.Match) -> str:
        if match[1] not in tables:
            raise UserError(f"The study has no table {match[1]}; it has {', '.join(tables)}.")
        return f"<!-- table {match[1]} -->\n{short_table(tables[match[1]], rows)}<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


def _mean(rows: Sequence[Row], key: str, digits: int) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return f"{statistics.fmean(values):.{digits}f}" if values else ""


def _table(lines: Sequence[Sequence[str]]) -> str:
    lines = [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _heading(study: Study, rows: Rows) -> str:
    some = next(iter(rows.values()))
    seeds = sorted({seed for _, seed in rows})
    return (
        "# Results of the study\n\n"
        f"`python scripts/study.py`: {some['model']}, batches of {study.batch_size}, {study.samples:,} samples a run "
        f"where compute is not matched, {some['threads']} thread(s), seeds {', '.join(map(str, seeds))}. "
        "Mean (standard deviation over the seeds); accuracies and recalls in %. All runs of a seed begin with the same "
        "weights and see the same data in the same order, so differences are taken by seed. Bold: a paired t-test at "
        "5 % tells the difference from none, over at least three seeds; of so many comparisons, one in twenty is bold "
        "by chance.\n\n"
        "seen: zero-shot over names that were trained on, in a style that was not. held-out: the same over names that "
        "were not trained on; TR and IR: retrieval of their captions and pictures.\n\n"
    )


def _pictures(plots: Sequence[Path]) -> str:
    return "".join(f"\n![{plot.stem}]({plot.name})\n" for plot in plots)
