"""One run: train, evaluate, write its row. And many of them, side by side and resumable."""
from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from training import main as trainer
from training.checkpoint import newest
from training.data.sets.folders import list_shards
from training.errors import UserError

from .cells import FULL, REDUCED, Run, Study, words
from .measure import measure

LOG_LINES = 8  # of a failed run's log that are shown


@dataclass(frozen=True)
class Setting:
    """What all runs of a call share.

    Attributes:
        out: a row `<id>.json` for each finished run, and the folders of the runs.
        fashion_mnist: folder, for a probe on it; None: no such probe.
        fashion_parts: parts of the study whose runs get it.
        keep_weights: keep the last checkpoint of each run.
    """

    study: Study
    out: Path
    device: str | None = None
    fashion_mnist: Path | None = None
    keep_weights: bool = False

    def row_file(self, run: Run) -> Path:
        return self.out / f"{run.id}.json"

    def log_file(self, run: Run) -> Path:
        return self.out / "logs" / f"{run.id}.log"

    def probes_fashion(self, run: Run) -> bool:
        """The methods' runs get this probe: the first part's."""
        first = self.study.tables[0].part
        tables = {table.name for table in self.study.tables if table.part == first}
        return self.fashion_mnist is not None and any(cell.partition("/")[0] in tables for cell in run.cells)

    def finished(self, run: Run) -> dict[str, Any] | None:
        """The row of a run that has been trained and evaluated as it should be; else None."""
        try:
            row = json.loads(self.row_file(run).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        missing = (FULL in run.evaluations and "seen_top1" not in row) or (
            REDUCED in run.evaluations and "reduced_seen_top1" not in row
        )
        return None if missing or (self.probes_fashion(run) and "fashion_top1" not in row) else row


# ------------------------------------------------------------------------------------------------------------- one run


def command_line(run: Run, setting: Setting) -> list[str]:
    """Arguments of `training.main` for a run."""
    train = setting.study.data / "train"
    last = len(list_shards(train)) - 1
    return [
        "--config", str(setting.study.base_file), *words({**setting.study.overrides, **run.options}),
        "--train-data", f"{train}/{{00000..{last:05d}}}.tar",
        "--duration", f"{run.samples}samples", "--seed", str(run.seed),
        "--logs", str(setting.out / "runs"), "--name", run.id, "--resume", "latest", "--no-progress",
        *(("--device", setting.device) if setting.device else ()),
    ]  # fmt: skip


def execute(run: Run, setting: Setting) -> dict[str, Any]:
    """Trains and evaluates in this process; writes the row and returns it. An interrupted training is continued.

    Raises:
        UserError: the training refused, or the evaluation did.
    """
    torch.set_num_threads(run.threads)
    begin = time.perf_counter()
    folder = setting.out / "runs" / run.id
    code = trainer.main(command_line(run, setting))
    if code:
        raise UserError(f"The training of {run.name}, seed {run.seed}, ended with exit code {code}.")
    row = {
        "id": run.id, "seed": run.seed, "threads": run.threads, "device": setting.device or "auto",
        "model": setting.study.base["model"], "options": run.options, **read_training(folder),
    }  # fmt: skip
    weights = newest(folder / "checkpoints")
    torch.set_num_threads(run.threads)
    if FULL in run.evaluations:
        fashion = setting.fashion_mnist if setting.probes_fashion(run) else None
        row |= measure(weights, setting.study.data, fashion_mnist=fashion, device=setting.device)
    if REDUCED in run.evaluations:
        figures = measure(weights, setting.study.data, reduced=True, device=setting.device)
        row |= {f"reduced_{key}": value for key, value in figures.items() if key != "weights"}
    row["seconds"] = round(time.perf_counter() - begin, 1)
    path = setting.row_file(run)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    if not setting.keep_weights:
        shutil.rmtree(folder / "checkpoints")
    return row


def read_training(folder: Path) -> dict[str, Any]:
    """What a run's own log says of it.

    `gflops` is the mean over the logged steps of what the trainer counts for a pair, `pflops` that times the samples;
    `train_loss` is the mean over the last tenth of the logged steps.
    """
    with (folder / "train.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    log = (folder / "out.log").read_text(encoding="utf-8")
    counts = re.search(r"tokens per layer (\[.*?\])\)", log)
    row: dict[str, Any] = {
        "rrt": statistics.fmean(row.get("rrt", 0.0) for row in rows),
        "tokens_per_layer": json.loads(counts[1]) if counts else None,
        "samples": int(rows[-1]["samples"]),
        "steps": int(rows[-1]["step"]) + 1,
        "train_loss": statistics.fmean(row["loss"] for row in rows[-max(1, len(rows) // 10) :]),
        "train_seconds": round(sum(_seconds(rows)), 1),
    }
    if "gflops_per_pair" in rows[0]:
        gflops = statistics.fmean(row["gflops_per_pair"] for row in rows)
        row |= {"gflops": gflops, "pflops": gflops * row["samples"] / 1e6}
    return row


def _seconds(rows: Sequence[dict[str, float]]) -> list[float]:
    """Of the steps since the row before."""
    seconds, done = [], 0.0
    for row in rows:
        seconds.append((row["samples"] - done) / row["samples_per_second"])
        done = row["samples"]
    return seconds


# ------------------------------------------------------------------------------------------------------------ many runs


def _child(run: Run, setting: Setting) -> None:
    """In a process of its own: everything that is printed goes to the run's log."""
    log = setting.log_file(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        execute(run, setting)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def run_all(
    runs: Sequence[Run],
    setting: Setting,
    *,
    jobs: int,
    minutes: float | None = None,
    show: Callable[[str], None] = print,
) -> list[Run]:
    """Does the runs that are not finished, `jobs` at a time in their order, and returns those that failed.

    Args:
        minutes: start no further run after that time; those that are under way end.
        show: is called with a line for each run that ends.
    """
    setting.out.mkdir(parents=True, exist_ok=True)
    waiting = [run for run in runs if setting.finished(run) is None]
    show(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
    begin, failed, done = time.monotonic(), [], len(runs) - len(waiting)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.main", "benchmarks.study.run"])  # torch and open_clip are imported once
    busy: dict[int, tuple[Any, Run]] = {}
    try:
        while waiting or busy:
            late = minutes is not None and time.monotonic() - begin > 60 * minutes
            while waiting and len(busy) < jobs and not late:
                run = waiting.pop(0)
                process = context.Process(target=_child, args=(run, setting))
                process.start()
                busy[process.sentinel] = process, run
            if not busy:
                show(f"{len(waiting)} runs are left for another time")
                break
            for sentinel in connection.wait(list(busy)):
                process, run = busy.pop(sentinel)
                process.join()
                row = setting.finished(run) if process.exitcode == 0 else None
                if row is None:
                    failed.append(run)
                    show(f"FAILED {run.name}, seed {run.seed} (exit code {process.exitcode}):\n{tail(run, setting)}")
                else:
                    done += 1
                    show(f"[{done}/{len(runs)}] {describe(run, row)}")
    finally:
        for process, _ in busy.values():
            process.terminate()
        for process, _ in busy.values():
            process.join()
    return failed


def tail(run: Run, setting: Setting) -> str:
    try:
        lines = setting.log_file(run).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return "\n".join(f"    {line}" for line in lines[-LOG_LINES:]) or "    (nothing was logged)"


def describe(run: Run, row: dict[str, Any]) -> str:
    """A run in one line."""
    figures = ", ".join(
        f"{name} {100 * row[key]:.1f} %"
        for name, key in (("seen", "seen_top1"), ("held-out", "heldout_top1"), ("category", "category_top1"))
        if key in row
    )
    return (
        f"{run.name} seed {run.seed}: loss {row['train_loss']:.3f}, {figures}, RRT {row['rrt']:.1%}, "
        f"{row.get('gflops', 0):.3f} GFLOP/pair, {row['samples']} samples, {row['seconds']:.0f} s"
    )
