"""Print a small table of a finished run: loss, zero-shot accuracy and retrieval against chance, speed.

    python scripts/quickstart_report.py logs/quickstart
    python scripts/quickstart_report.py --is-finished logs/quickstart && echo finished

Reads what the trainer leaves in the run's folder: `config.yaml`, `train.csv` and the last line of
`checkpoints/results.jsonl`.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


class UserError(Exception):
    """Something the person can put right; its text is the one sentence to show."""


@dataclass(frozen=True)
class Run:
    """A run's folder, read: all options, `train.csv` (at least one row, every value a number), the last evaluation."""

    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, float]]
    results: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises UserError if a file is missing, empty or damaged."""
        config_file, train_file = folder / "config.yaml", folder / "train.csv"
        results_file = folder / "checkpoints" / "results.jsonl"
        for file in (config_file, train_file):
            if not file.is_file():
                raise UserError(f"{folder} is not the folder of a run that has trained: it has no {file.name}")
        try:
            config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
            with train_file.open(newline="", encoding="utf-8") as file:
                rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
            lines = results_file.read_text(encoding="utf-8").splitlines() if results_file.is_file() else []
            results = json.loads(lines[-1]) if lines else {}
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the files in {folder} cannot be read ({reason}): train anew with FRESH=1") from error
        if not rows or not isinstance(config, dict):
            raise UserError(f"the run in {folder} has not logged a training step yet: let it run for longer")
        return cls(folder, config, rows, results)

    @property
    def is_finished(self) -> bool:
        """Whether the last epoch's evaluation and checkpoint, which is written after it, are both there."""
        epochs = int(self.config["epochs"])
        return self.results.get("epoch") == epochs and (self.folder / "checkpoints" / f"epoch_{epochs}.pt").is_file()


def table(run: Run) -> list[tuple[str, str, str]]:
    """Rows (what, result, what guessing would give), as text."""
    results, rows = run.results, run.rows
    # `samples` of the log counts over all processes: the first row tells the global batch. Fusion models add up losses.
    guessing = "" if "itm" in rows[0] else f"{math.log(rows[0]['samples'] / (rows[0]['step'] + 1)):.3f}"
    last_epoch = [row["loss"] for row in rows if row["epoch"] == rows[-1]["epoch"]]
    lines = [
        ("loss, first step", f"{rows[0]['loss']:.3f}", guessing),
        ("loss, mean of the last epoch", f"{statistics.fmean(last_epoch):.3f}", guessing),
    ]
    # Top-1 flatters a model that knows the largest class only; the mean weighs all classes alike.
    zero_shot = {"top-1": ("top1", 1), "top-5": ("top5", 5), "mean of classes": ("mean_per_class_recall", 1)}
    figures = [(f"zero-shot {name}", f"zeroshot-val-{key}", k) for name, (key, k) in zero_shot.items()]
    again = f", best {run.config.get('val_rerank')} re-ranked"
    for way in ("image_to_text", "text_to_image"):
        for kind, words in (("", ""), ("reranked_", again)):
            figures += [(f"{way.replace('_', ' ')} R@{k}{words}", f"{kind}{way}_R@{k}", k) for k in (1, 5, 10)]
    for name, key, k in figures:
        of, things = ("zeroshot-val-classes", "classes") if key.startswith("zeroshot") else ("num_samples", "pairs")
        if key in results and results.get(of):
            chance = min(1.0, k / results[of])
            against = f"{chance:.1%} (x {results[key] / chance:.1f})"
            lines.append((f"{name}, {results[of]} {things}", f"{results[key]:.1%}", against))
    judged = (("matching right", "val-itm_accuracy", "50.0%"), ("masked words right", "val-mlm_accuracy", ""))
    lines += [(name, f"{results[key]:.1%}", chance) for name, key, chance in judged if key in results]
    lines.append(("removed tokens in training (RRT)", f"{rows[-1].get('rrt', 0):.1%}", ""))
    # The first row's rate has the start-up in it.
    rates = [row["samples_per_second"] for row in rows[1:] or rows]
    lines.append(("samples/s, median", f"{statistics.median(rates):.1f}", ""))
    return lines


def render(run: Run) -> str:
    """The table as text, with a heading and the folder."""
    lines = [("", "result", "chance"), *table(run)]
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    body = "\n".join(f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in lines)
    samples, epochs = int(run.rows[-1]["samples"]), int(run.rows[-1]["epoch"]) + 1
    heading = f"{run.config['model']}: {epochs} epoch{'s' * (epochs > 1)}, {samples:,} samples" + (
        "" if run.is_finished else " (NOT FINISHED)"
    )
    return f"{heading}\n\n{body}\n\nThe run is in {run.folder}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--is-finished", action="store_true", help="print nothing; exit 0 if it is finished, else 1")
    options = parser.parse_args(argv)
    try:
        run = Run.read(options.run)
    except UserError as error:
        if options.is_finished:
            return 1
        print(f"quickstart_report.py: {error}.", file=sys.stderr)
        return 2
    if options.is_finished:
        return 0 if run.is_finished else 1
    print(render(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
