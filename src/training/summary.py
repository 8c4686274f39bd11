"""The curves of a run, drawn: losses, accuracies of its evaluations, throughput.

    python -m training.summary logs/my-run

Writes summary.png and, with the run's summary.txt above it, summary.html into the run's folder, which may still grow.
"""
from __future__ import annotations

import argparse
import base64
import csv
import html
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from .errors import EXIT_USER_ERROR, UserError, reason

Curves = dict[str, list[tuple[float, float]]]  # by name: (step, value)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m training.summary", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", type=Path, metavar="DIR", help="the run's folder")
    folder = parser.parse_args(argv).run
    try:
        if find_spec("matplotlib") is None:
            raise UserError("The curves need matplotlib; pip install 'open_clip_elip[profile]' brings it.")
        panels = read(folder)
        try:
            draw(panels, folder / "summary.png")
            (folder / "summary.html").write_text(_page(folder), encoding="utf-8")
        except OSError as error:
            raise UserError(f"The curves cannot be written to {folder} ({reason(error)}).") from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"{folder / 'summary.png'}\n{folder / 'summary.html'}")
    return 0


def read(folder: Path) -> dict[str, Curves]:
    """The panels by title, of train.csv and results.jsonl; lines that are cut off or damaged are passed over,
    and so are figures that were not known."""
    rows = []
    try:
        with (folder / "train.csv").open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                with suppress(TypeError, ValueError):
                    rows.append({name: float(value) for name, value in row.items() if value != ""})
        results = folder / "checkpoints" / "results.jsonl"
        lines = results.read_text(encoding="utf-8", errors="replace").splitlines() if results.is_file() else []
    except OSError as error:
        raise UserError(f"{folder} is no folder of a run that trained: no train.csv ({reason(error)}).") from error
    if not rows or not {"step", "samples", "lr", "samples_per_second"} <= rows[0].keys():
        raise UserError(f"{folder / 'train.csv'} has no whole row yet; let the run go on.")
    evaluations = []
    for line in lines:
        with suppress(ValueError):
            found = json.loads(line)
            evaluations += [found] * (isinstance(found, dict) and "step" in found)
    columns = list(rows[0])
    losses = columns[columns.index("samples") + 1 : columns.index("lr")]  # as `figures.Figures.row` orders them
    right = [losses.pop(losses.index("accuracy"))] if "accuracy" in losses else []  # fine-tuning's, of its steps
    measured = list(dict.fromkeys(name for found in evaluations for name in found))
    accuracies = [name for name in measured if re.search("top1$|R@1$|accuracy$", name)]
    panels = {
        "loss": _curves(rows, losses) | _curves(evaluations, [name for name in measured if name.endswith("loss")]),
        "accuracy": _curves(rows, right) | _curves(evaluations, accuracies),
        "samples a second": _curves(rows, ["samples_per_second"]),
    }
    return {title: curves for title, curves in panels.items() if curves}


def _curves(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> Curves:
    found = {name: [(row["step"], row[name]) for row in rows if isinstance(row.get(name), float)] for name in names}
    return {name: curve for name, curve in found.items() if curve}


def draw(panels: Mapping[str, Curves], path: Path) -> None:
    """A panel beside the other, over optimizer steps, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, curve in curves.items():
            axes.plot(*zip(*curve, strict=True), marker="." if len(curve) < 50 else None, label=name.replace("_", " "))
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _page(folder: Path) -> str:
    """summary.txt and the picture in one file."""
    told = folder / "summary.txt"
    text = html.escape(told.read_text(encoding="utf-8", errors="replace")) if told.is_file() else "not finished"
    picture = base64.b64encode((folder / "summary.png").read_bytes()).decode()
    name = html.escape(folder.resolve().name)
    return (
        f'<!DOCTYPE html>\n<meta charset="utf-8">\n<title>{name}</title>\n<h1>{name}</h1>\n<pre>{text}</pre>\n'
        f'<img alt="curves" style="max-width: 100%" src="data:image/png;base64,{picture}">\n'
    )


if __name__ == "__main__":
    sys.exit(main())
