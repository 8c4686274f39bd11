"""One run: train, evaluate, write its row. And many of them, side by side and resumable."""
from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas
import torch

from training import linear_probe, retrieval, zero_shot
from training import main as trainer
from training.checkpoint import newest
from training.data.sets.folders import list_shards
from training.errors import UserError
from training.files import written_whole

from .cells import FULL, REDUCED, THREADS, Run, Study

LOG_LINES = 8  # of a failed run's log that are shown
EVALUATION = "--image-decode fast --precision fp32 --batch-size 128 --workers 0 --on-broken stop".split()
# Regularisation is fixed, for a sweep would cost more than the training; all runs' probes see the same pictures.
PROBE = "--regularisation 0.1 --standardize --max-iterations 300 --max-train-samples".split()


def path_of(run: Run, study: Study, kind: str) -> Path:
    """A run's file: json, log or yaml."""
    place = study.out / ("" if kind == "json" else kind)
    place.mkdir(parents=True, exist_ok=True)
    return place / f"{run.id}.{kind}"


def finished(run: Run, study: Study) -> dict[str, Any] | None:
    """The row of a run that has been trained and evaluated as it should be; else None."""
    try:
        row = json.loads(path_of(run, study, "json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    needed = {{FULL: "seen_top1", REDUCED: "reduced_seen_top1"}[kind] for kind in run.evaluations}
    return row if needed | ({"fashion_top1"} if study.fashion_mnist else set()) <= set(row) else None


def command_line(run: Run, study: Study) -> list[str]:
    """Arguments of `training.main` for a run, whose config file is written for it."""
    config = path_of(run, study, "yaml")
    config.write_text(json.dumps({**study.base, **run.options}, indent=2), encoding="utf-8")  # YAML too
    parts = {name: study.data / name for name in ("train", "heldout")}
    shards = {name: f"{folder}/{{00000..{len(list_shards(folder)) - 1:05d}}}.tar" for name, folder in parts.items()}
    return [
        "--config", str(config), "--train-data", shards["train"], "--val-data", shards["heldout"],
        "--duration", f"{run.samples}samples", "--seed", str(run.seed), "--logs", str(study.out / "runs"),
        "--name", run.id, "--resume", "latest", "--no-progress", *_device(study),
    ]  # fmt: skip


def execute(run: Run, study: Study) -> dict[str, Any]:
    """Trains (or goes on) and evaluates in this process; writes the row and returns it. UserError if one refuses."""
    torch.set_num_threads(THREADS)
    begin, folder = time.perf_counter(), study.out / "runs" / run.id
    if code := trainer.main(command_line(run, study)):
        raise UserError(f"The training of {run.cells[0]}, seed {run.seed}, ended with exit code {code}.")
    torch.set_num_threads(THREADS)
    row = {"id": run.id, "seed": run.seed, "threads": THREADS, "device": study.device or "auto"}
    row |= {"model": study.base["model"], "options": json.dumps(run.options), **read_training(folder)}
    for kind in sorted(run.evaluations):
        flags, prefix = ([], "") if kind == FULL else ([f"--{REDUCED}"], "reduced_")
        row |= {f"{prefix}{key}": value for key, value in evaluate(folder, study, *flags).items()}
    row.pop("reduced_weights", None)  # the same
    row["seconds"] = round(time.perf_counter() - begin, 1)
    with written_whole(path_of(run, study, "json")) as file:
        file.write(json.dumps(row, indent=2).encode())
    if not study.keep_weights:
        shutil.rmtree(folder / "checkpoints")
    return row


def read_training(folder: Path) -> dict[str, Any]:
    """What a run's own log says. `gflops` is the mean over the logged steps of what the trainer counts for a sample,
    `train_loss` that over the last tenth of them, `val_loss` that of the held-out pairs at the end."""
    log = pandas.read_csv(folder / "train.csv")
    counts = re.search(r"tokens per layer (\[.*?\])\)", (folder / "out.log").read_text(encoding="utf-8"))
    evaluations = (folder / "checkpoints" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    samples, gflops = int(log["samples"].iloc[-1]), float(log["gflops_per_sample"].mean())
    return {
        "rrt": float(log["rrt"].mean()) if "rrt" in log else 0.0,
        "tokens_per_layer": counts and counts[1],
        "samples": samples,
        "steps": int(log["step"].iloc[-1]) + 1,
        "train_loss": float(log["loss"].tail(max(1, len(log) // 10)).mean()),
        "train_seconds": float((log["samples"].diff().fillna(log["samples"]) / log["samples_per_second"]).sum()),
        "val_loss": json.loads(evaluations[-1])["clip_val_loss"],
        "gflops": gflops,
        "pflops": gflops * samples / 1e6,
    }


def evaluate(folder: Path, study: Study, *flags: str) -> dict[str, float | str]:
    """What the evaluation commands say of the weights of the run in `folder`; accuracies and recalls are fractions."""
    weights = str(newest(folder / "checkpoints"))

    def measured(command: ModuleType, data: str, *more: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as results:
            words = ["--pretrained", weights, "--data", data, "--results", results, *EVALUATION, *_device(study)]
            if code := command.main([*words, *flags, *more]):
                raise UserError(f"The evaluation of {weights} on {data} ended with exit code {code}.")
            (record,) = (json.loads(path.read_text(encoding="utf-8")) for path in Path(results).glob("*.json"))
            return {"weights": record["weights"], **record["metrics"]}

    figures: dict[str, float | str] = {}
    for name in ("seen", "heldout"):
        found = measured(zero_shot, f"webdataset={study.data / name}")
        keys = {"top1": "top1", "top5": "top5", "mean_per_class": "mean_per_class_recall"}
        figures |= {"weights": found["weights"], **{f"{name}_{key}": found[theirs] for key, theirs in keys.items()}}
    found = measured(retrieval, str(study.data / "heldout"))
    figures |= {key: found[key] for key in found if key.endswith(("R@1", "R@5", "R@10", "mean_rank"))}
    probes = {"category": (f"webdataset={study.data / 'categories'}", "1000")}
    probes |= {"fashion": (f"fashion-mnist={study.fashion_mnist}", "2000")} if study.fashion_mnist else {}
    for name, (data, samples) in probes.items():
        figures[f"{name}_top1"] = measured(linear_probe, data, *PROBE, samples)["top1"]
    return figures


def _device(study: Study) -> list[str]:
    return ["--device", study.device] if study.device else []


def run_all(runs: Sequence[Run], study: Study, *, jobs: int, show: Callable[[str], None] = print) -> list[Run]:
    """Does the runs that are not finished, `jobs` at a time in their order; `show` gets a line for each that ends.
    Returns those that failed."""
    done, failed = [run for run in runs if finished(run, study)], []
    waiting = [run for run in runs if run not in done]
    show(f"{len(done)} of {len(runs)} runs are finished already")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.main", "benchmarks.study.run"])  # torch and open_clip are imported once

    def do(run: Run) -> None:
        process = context.Process(target=_child, args=(run, study))
        process.start()
        process.join()
        if process.exitcode == 0 and (row := finished(run, study)):
            done.append(run)
            show(f"[{len(done)}/{len(runs)}] {describe(run, row)}")
        else:
            failed.append(run)
            lines = path_of(run, study, "log").read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            show("\n    ".join([f"FAILED {run.cells[0]}, seed {run.seed} (exit code {process.exitcode}):", *lines]))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(do, waiting))
    return failed


def _child(run: Run, study: Study) -> None:
    """In a process of its own: everything that is printed goes to the run's log."""
    with path_of(run, study, "log").open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        execute(run, study)
    except UserError as error:
        sys.exit(f"error: {error}")


def describe(run: Run, row: dict[str, Any] | None) -> str:
    """A run in one line, of what it gave or, before that, of what it will cost."""
    name = f"{' = '.join(run.cells)} seed {run.seed} ({run.id}), {run.samples:,} samples"
    if row is None:
        return f"{name}: {run.flops / 1e9:.3f} GFLOP/sample, {run.flops * run.samples / 1e15:.4f} PFLOP"
    figures = ", ".join(f"{key} {row[key]:.1%}" for key in ("seen_top1", "heldout_top1", "category_top1") if key in row)
    costs = f"RRT {row['rrt']:.1%}, {row['gflops']:.3f} GFLOP/sample, {row['seconds']:.0f} s"
    return f"{name}: loss {row['train_loss']:.3f}, {figures}, {costs}"
