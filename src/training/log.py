"""Where a run's numbers go: console, progress bar, out.log, train.csv, results.jsonl, TensorBoard, wandb."""
from __future__ import annotations

import csv
import io
import json
import logging
import re
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from .errors import UserError, reason
from .files import append, expendable, written_whole

if TYPE_CHECKING:
    from numpy import ndarray

T = TypeVar("T")


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        print(f"{self.baseFilename} cannot be written ({reason(sys.exc_info()[1])}).", file=sys.stderr)
        self.handleError = lambda record: None  # told once


class _Console(logging.Handler):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(level: int, file: Path | None, console: bool) -> None:
    """Root logger to the console and/or a file, and to no earlier handler."""
    handlers: list[logging.Handler] = [shown := _Console()]
    if not console:  # which worker of a rank is stuck is known to that rank alone
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
        report_to: names joined by commas, or "all" (csv is always written). UserError: one of them cannot be used.
        enabled: False on all ranks but the main one, where every method does nothing.
        step: rows of train.csv from this step on are dropped: they were written after the checkpoint that is resumed.
        wandb_options: for `wandb.init`.

    Attributes:
        results: of all evaluations, those of the resumed run included.
    """

    def __init__(
        self, folder: Path | None, report_to: str = "", *, enabled: bool = True, step: int = 0,
        wandb_options: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.folder = folder if enabled else None
        self.columns: list[str] | None = None
        self.results: list[dict[str, float]] = []
        self.writers: dict[str, Any] = {}
        wanted = report_to.split(",")
        for kind in ("tensorboard", "wandb") if enabled else ():
            try:
                if kind not in wanted and "all" not in wanted:
                    continue
                if kind == "wandb":
                    self.writers[kind] = _start_wandb(folder, wandb_options or {})
                elif folder is None:
                    logging.warning("TensorBoard's files belong into the run folder: with --logs none there are none.")
                else:
                    from torch.utils.tensorboard import SummaryWriter

                    self.writers[kind] = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)
            except Exception as error:  # of many kinds: the package, the network, a login, a name
                what = f"--report-to {kind} cannot be used ({reason(error)})"
                raise UserError(f"{what}; install or set up what is missing, or leave it out.") from error
        if self.folder is not None:
            results = folder / "checkpoints" / "results.jsonl"
            self.results = _kept(results, _result, lambda result: result.get("step", 0) <= step)
            _kept(folder / "train.csv", self._step_of_row, lambda at: at < step)

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

    def picture(self, name: str, picture: ndarray, step: int) -> None:
        """(H, W, 3) uint8, for TensorBoard and wandb."""

        def write(kind: str, writer: Any) -> None:
            if kind == "wandb":
                import wandb

                writer.log({name: wandb.Image(picture), "step": step}, step=step)
            else:
                writer.add_image(name, picture, step, dataformats="HWC")

        self._to_each(write)

    def close(self) -> None:
        for writer in self.writers.values():
            with suppress(Exception):  # what is left to be written on a full disk
                writer.finish() if hasattr(writer, "finish") else writer.close()

    def _report(self, prefix: str, values: dict[str, float], step: int) -> None:
        named = {f"{prefix}/{k}": v for k, v in values.items() if k != "step"}

        def write(kind: str, writer: Any) -> None:
            if kind == "wandb":
                writer.log(named | {"step": step}, step=step)
            else:
                for name, value in named.items():
                    writer.add_scalar(name, value, step)

        self._to_each(write)

    def _to_each(self, write: Callable[[str, Any], None]) -> None:
        for kind, writer in list(self.writers.items()):
            try:
                write(kind, writer)
            except Exception as error:
                logging.error(f"{kind} does not take any more figures ({reason(error)}); the run goes on without it.")
                del self.writers[kind]

    def _step_of_row(self, line: str) -> int | None:
        """Of a row of train.csv; -1 of the first one with names, which are remembered; None of a damaged one."""
        row = line.strip().split(",")
        if self.columns is None and "step" in row:
            self.columns = row
            return -1
        whole = self.columns is not None and len(row) == len(self.columns) and "\0" not in line
        step = row[self.columns.index("step")] if whole else ""
        return int(step) if step.isdigit() else None


def _start_wandb(folder: Path | None, options: dict[str, Any]) -> Any:
    import wandb

    name = options.get("name") or ""
    plain = re.sub(r"[:;,#?/']|^\s|\s$", "-", name)  # what wandb does not take in an id
    plain = plain if plain == name else f"{plain}-{zlib.crc32(name.encode()):08x}"
    return wandb.init(dir=None if folder is None else str(folder), id=plain, **options)


def _result(line: str) -> dict[str, float] | None:
    """A line of results.jsonl; None: it is damaged."""
    with suppress(ValueError):
        result = json.loads(line)
        return result if isinstance(result, dict) and all(isinstance(v, int | float) for v in result.values()) else None


def _kept(path: Path, read: Callable[[str], T | None], keep: Callable[[T], bool]) -> list[T]:
    """What the lines of an expendable file say; those that are not to be kept, or are damaged (None), are dropped."""
    text = ""
    with expendable(path):
        text = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    lines = text.splitlines(keepends=True)
    said = [read(line) if line.endswith("\n") else None for line in lines]
    kept = {i: value for i, value in enumerate(said) if value is not None and keep(value)}
    if None in said:
        logging.warning(f"{said.count(None)} line(s) of {path} are damaged and passed over; the run goes on.")
    if len(kept) < len(lines) and any(value is not None for value in said):  # else it stays as it is
        with expendable(path), written_whole(path) as file:
            file.write("".join(lines[i] for i in kept).encode())
    return list(kept.values())
