"""Where a run's numbers go: console, progress bar, out.log, train.csv, results.jsonl, TensorBoard, wandb."""
from __future__ import annotations

import csv
import json
import logging
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

FORMAT = "%(asctime)s | %(levelname)s | %(message)s"
DATE = "%Y-%m-%d,%H:%M:%S"


class _Console(logging.StreamHandler):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(level: int, file: Path | None, console: bool) -> None:
    """Root logger to the console and/or a file; earlier handlers are replaced, so calling it again is safe.

    Without a console (all ranks but the main one), warnings of the data still go to stderr: which worker of which rank
    is stuck is known to that rank alone.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handlers: list[logging.Handler] = [_Console()]
    if not console:
        handlers[0].setLevel(logging.WARNING)
        handlers[0].addFilter(lambda record: record.name.startswith("training.data"))
    if file is not None:
        handlers.append(logging.FileHandler(file))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT, DATE))
        root.addHandler(handler)
    root.setLevel(level)
    chatty = "PIL urllib3 fsspec matplotlib botocore aiobotocore s3fs torch._dynamo torch._inductor torch.fx"
    for name in chatty.split():
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


class RunLog:
    """Numbers of a run, on the main rank; on the others every method does nothing.

    Args:
        folder: the run's folder; None writes no files.
        enabled: False on all ranks but the main one.
        report_to: any of "tensorboard" and "wandb" ("csv" is always written).
        step: rows of train.csv from this step on are dropped: they were written after the checkpoint that is resumed.
        wandb_options: project, name, notes, config ... for `wandb.init`.

    Attributes:
        last_evaluation: the newest figures of an evaluation of this run, those of the resumed run included; {}: none.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        enabled: bool = True,
        report_to: frozenset[str] = frozenset(),
        step: int = 0,
        wandb_options: dict[str, Any] | None = None,
    ):
        self.folder = folder if enabled else None
        self.columns: list[str] | None = None
        self.tensorboard = self.wandb = None
        self.last_evaluation: dict[str, float] = {}
        if not enabled:
            return
        if self.folder is not None:
            self._keep_rows_before(step)
            self.last_evaluation = next(reversed(self._results()), {})
            if "tensorboard" in report_to:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step or None)
        if "wandb" in report_to:
            import wandb

            self.wandb = wandb.init(dir=None if folder is None else str(folder), **(wandb_options or {}))

    def train(self, row: dict[str, float]) -> None:
        """One row of training figures; `row` has `step`, and the same keys every time."""
        if self.folder is not None:
            with (self.folder / "train.csv").open("a", newline="") as file:
                writer = csv.writer(file)
                if self.columns is None:
                    self.columns = list(row)
                    writer.writerow(self.columns)
                writer.writerow([f"{v:.8g}" if isinstance(v, float) else v for v in map(row.get, self.columns)])
        self._report("train", row, row["step"])

    def evaluation(self, metrics: dict[str, float], step: int) -> None:
        """Figures of one evaluation; `metrics` has `epoch`."""
        self.last_evaluation = metrics
        if self.folder is not None:
            with (self.folder / "checkpoints" / "results.jsonl").open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        self._report("val", metrics, step)

    def has_evaluation(self, epoch: int) -> bool:
        """Whether the results of this epoch are written already."""
        return any(result.get("epoch") == epoch for result in self._results())

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _report(self, prefix: str, values: dict[str, float], step: int) -> None:
        named = {f"{prefix}/{k}": v for k, v in values.items() if k != "step"}
        if self.tensorboard is not None:
            for name, value in named.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(named | {"step": step}, step=step)

    def _results(self) -> list[dict[str, float]]:
        path = None if self.folder is None else self.folder / "checkpoints" / "results.jsonl"
        if path is None or not path.is_file():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    def _keep_rows_before(self, step: int) -> None:
        """Drops what was written after step `step`: rows of train.csv and results of evaluations."""
        results = self._results()
        kept = [result for result in results if result.get("step", 0) <= step]
        if len(kept) < len(results):
            text = "".join(json.dumps(result) + "\n" for result in kept)
            (self.folder / "checkpoints" / "results.jsonl").write_text(text)
        path = self.folder / "train.csv"
        if not path.is_file():
            return
        with path.open(newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        if "step" not in header:
            return
        at = header.index("step")
        kept = [r for r in rows if len(r) == len(header) and int(r[at]) < step]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *kept])
        self.columns = header


def peak_memory_gb(device: torch.device) -> float:
    """Peak so far in GB: allocated device memory on CUDA, resident memory of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
