"""Where a run's numbers go: console, progress bar, out.log, train.csv, results.jsonl, TensorBoard, wandb."""
from __future__ import annotations

import csv
import io
import json
import logging
import re
import resource
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .errors import UserError, reason
from .files import append, expendable, written_whole


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        print(f"{self.baseFilename} cannot be written ({reason(sys.exc_info()[1])}).", file=sys.stderr)
        self.handleError = lambda record: None  # told once


class _Console(logging.StreamHandler):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(level: int, file: Path | None, console: bool) -> None:
    """Root logger to the console and/or a file; earlier handlers are replaced, so calling it again is safe.

    Without a console (all ranks but the main one), warnings of the data still go to stderr: which worker of which rank
    is stuck is known to that rank alone.
    """
    handlers: list[logging.Handler] = [shown := _Console()]
    if not console:
        shown.setLevel(logging.WARNING)
        shown.addFilter(lambda record: record.name.startswith("training.data"))
    if file is not None:
        with expendable(file):
            handlers.append(_File(file))
    line, date = "%(asctime)s | %(levelname)s | %(message)s", "%Y-%m-%d,%H:%M:%S"
    logging.getLogger().handlers.clear()  # and not `force`, which closes them: that may fail on a full disk
    logging.basicConfig(level=level, handlers=handlers, format=line, datefmt=date)
    chatty = "PIL urllib3 fsspec matplotlib botocore aiobotocore s3fs torch._dynamo torch._inductor torch.fx"
    for name in chatty.split():
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


class RunLog:
    """Numbers of a run. A figure that cannot be written, or a damaged file of them, is one line of the log and no more.

    Args:
        folder: the run's folder; None writes no files.
        enabled: False on all ranks but the main one, where every method does nothing.
        report_to: any of "tensorboard" and "wandb" ("csv" is always written); UserError: it cannot be used.
        step: rows of train.csv from this step on are dropped: they were written after the checkpoint that is resumed.
        wandb_options: project, name, notes, config ... for `wandb.init`.
    """

    def __init__(
        self, folder: Path | None, *, enabled: bool = True, report_to: frozenset[str] = frozenset(), step: int = 0,
        wandb_options: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.folder = folder if enabled else None
        self.columns: list[str] | None = None
        self.results: list[dict[str, float]] = []  # of all evaluations, those of the resumed run included
        self.writers: dict[str, Any] = {}
        for kind in sorted(report_to & {"tensorboard", "wandb"}) if enabled else ():
            try:
                if kind == "wandb":
                    self.writers[kind] = _start_wandb(folder, wandb_options or {})
                elif folder is not None:
                    from torch.utils.tensorboard import SummaryWriter

                    self.writers[kind] = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)
            except Exception as error:  # of many kinds: the package, the network, a login, a name
                what = f"--report-to {kind} cannot be used ({reason(error)})"
                raise UserError(f"{what}; install or set up what is missing, or leave it out.") from error
        if self.folder is not None:
            self._keep_results_until(step)
            self._keep_rows_before(step)

    @property
    def last_evaluation(self) -> dict[str, float]:
        """{}: there was none."""
        return self.results[-1] if self.results else {}

    def train(self, row: dict[str, float]) -> None:
        """One row of training figures; `row` has `step`, and the same keys every time."""
        if self.folder is not None:
            columns = self.columns or list(row)
            lines = [[f"{v:.8g}" if isinstance(v, float) else v for v in map(row.get, columns)]]
            csv.writer(text := io.StringIO()).writerows(lines if self.columns else [columns, *lines])
            if append(self.folder / "train.csv", text.getvalue()):
                self.columns = columns
        self._report("train", row, row["step"])

    def evaluation(self, metrics: dict[str, float], step: int) -> None:
        """Figures of one evaluation; `metrics` has `epoch`."""
        self.results.append(metrics)
        if self.folder is not None:
            append(self.folder / "checkpoints" / "results.jsonl", json.dumps(metrics) + "\n")
        self._report("val", metrics, step)

    def has_evaluation(self, epoch: int) -> bool:
        """Whether the results of this epoch are written already."""
        return any(result.get("epoch") == epoch for result in self.results)

    def close(self) -> None:
        for writer in self.writers.values():
            with suppress(Exception):  # what is left to be written on a full disk
                writer.finish() if hasattr(writer, "finish") else writer.close()

    def _report(self, prefix: str, values: dict[str, float], step: int) -> None:
        named = {f"{prefix}/{k}": v for k, v in values.items() if k != "step"}
        for kind, writer in list(self.writers.items()):
            try:
                if kind == "wandb":
                    writer.log(named | {"step": step}, step=step)
                else:
                    for name, value in named.items():
                        writer.add_scalar(name, value, step)
            except Exception as error:
                logging.error(f"{kind} does not take any more figures ({reason(error)}); the run goes on without it.")
                del self.writers[kind]

    def _keep_results_until(self, step: int) -> None:
        """Reads results.jsonl; what was written after step `step`, or is damaged, is dropped there."""
        lines = _lines(path := self.folder / "checkpoints" / "results.jsonl")
        whole = [result for result in map(_parsed, lines) if isinstance(result, dict)]
        self.results = [result for result in whole if result.get("step", 0) <= step]
        text = "".join(json.dumps(result) + "\n" for result in self.results)
        _rewrite(path, text, dropped=len(lines) - len(self.results), damaged=len(lines) - len(whole))

    def _keep_rows_before(self, step: int) -> None:
        """Drops rows of train.csv that were written from step `step` on, or are damaged."""
        lines = _lines(path := self.folder / "train.csv")
        rows = [line.split(",") for line in lines if "\0" not in line]
        if not rows or "step" not in rows[0]:
            return _rewrite(path, "", dropped=0, damaged=len(lines))  # nothing to go on from; it stays as it is
        self.columns = rows[0]
        at = self.columns.index("step")
        whole = [row for row in rows[1:] if len(row) == len(self.columns) and row[at].isdigit()]
        kept = [self.columns, *(row for row in whole if int(row[at]) < step)]
        text = "".join(",".join(row) + "\r\n" for row in kept)
        _rewrite(path, text, dropped=len(lines) - len(kept), damaged=len(lines) - len(whole) - 1)


def _start_wandb(folder: Path | None, options: dict[str, Any]) -> Any:
    import wandb

    name = options.get("id") or ""
    plain = re.sub(r"[:;,#?/']|^\s|\s$", "-", name)  # what wandb does not take in an id
    if plain != name:
        options = options | {"id": f"{plain}-{zlib.crc32(name.encode()):08x}"}
    return wandb.init(dir=None if folder is None else str(folder), **options)


def _lines(path: Path) -> list[str]:
    """Those of a text file that is expendable; a last one without an end gets a NUL, as a crash may leave elsewhere."""
    text = ""
    with expendable(path):
        text = path.read_text(errors="replace") if path.is_file() else ""
    return (text if not text or text.endswith("\n") else text + "\0").splitlines()


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _rewrite(path: Path, text: str, dropped: int, damaged: int) -> None:
    if damaged:
        logging.warning(f"{damaged} line(s) of {path} are damaged and passed over; the run goes on.")
    if dropped:
        with expendable(path), written_whole(path) as file:
            file.write(text.encode())


def peak_memory_gb(device: torch.device) -> float:
    """Peak so far in GB: allocated device memory on CUDA, resident memory of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
