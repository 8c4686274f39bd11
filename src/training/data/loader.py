"""From samples to batches, in DataLoader workers or in this process, at a position that can be saved."""
from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import UserError
from .images import Unreadable
from .randomness import private_randomness, seed_globals, stable_seed
from .report import DataReport
from .samples import END_OF_PASS, Encoding, Reader, Sample
from .signals import held_back, outlive_signals
from .stalls import Board, StallWatch

Batch = dict[str, Any]


class NothingUsable(Exception):
    pass


class Cursor:
    """Walks along a source's stream and counts the samples it has passed.

    usable: set by the owner when a sample of this pass turned out well; a pass without one raises NothingUsable.
    """

    def __init__(self, stream: Iterator[Sample | None]):
        self.stream = stream
        self.position = 0
        self.usable = False

    def next(self) -> Sample | None:
        """The next sample; None where a validation stream ends."""
        for sample in self.stream:
            if sample is not END_OF_PASS:
                self.position += 1
                return sample
            if not self.usable:
                raise NothingUsable
            self.usable = False
        return None


@dataclass(kw_only=True, eq=False)
class BatchStream(IterableDataset):
    """Batches as the workers make them: pairs (batch, progress), see `__iter__`.

    samples: (reader, report) -> the source's stream
    positions: samples to skip, for each worker
    quotas: batches to make, for each worker; None makes all there are, the last one maybe smaller
    first_worker: whose turn it is; the DataLoader begins with its worker 0
    board: where the workers say what they are reading
    """

    samples: Callable[[Reader, DataReport], Iterator[Sample | None]]
    encoding: Encoding
    batch_size: int
    seed: tuple[int | str, ...]
    rank: int
    world_size: int
    positions: list[int]
    quotas: list[int] | None = None
    first_worker: int = 0
    board: Board | None = None

    def __iter__(self) -> Iterator[tuple[Batch | None, dict[str, Any]]]:
        """Yield (batch, progress). progress: worker, its position after the batch, what was skipped for it.

        The batch is None when there is only something to tell: an error for the person, or the last skipped samples.
        """
        info, board, num_workers = get_worker_info(), self.board, len(self.positions)
        worker = (self.first_worker + (info.id if info else 0)) % num_workers
        report = DataReport()
        reader = Reader(self.rank, self.world_size, worker, num_workers, partial(board.turns_to, worker))
        cursor = Cursor(self.samples(reader, report))

        def progress() -> dict[str, Any]:
            told = {"skipped": report.skipped, "examples": report.examples}
            report.clear()
            return {"worker": worker, "position": cursor.position, **told}

        try:
            board.resuming[worker] = True
            for _ in range(self.positions[worker]):
                cursor.next()
                cursor.usable = True  # unknown, but they were good enough for a saved position
            board.resuming[worker] = False
            report.clear()  # what the skipped part had to tell came with the saved position
            for _ in itertools.count() if self.quotas is None else range(self.quotas[worker]):
                if (batch := self._make_batch(cursor, reader, report)) is None:
                    break
                yield batch, progress()
        except NothingUsable:
            # Sent as a value: raised in here, the DataLoader would wrap it in a traceback.
            problem = (
                f"Worker {worker} of rank {self.rank} found not one usable sample in a whole pass over its part of the "
                f"data, {report.summary() or 'which is empty'}: repair the data or share it among fewer --workers."
            )
            yield None, {"error": problem}
            return
        if report.skipped:
            yield None, progress()
        board.finished[worker] = True

    def _make_batch(self, cursor: Cursor, reader: Reader, report: DataReport) -> Batch | None:
        encoded, keys, indices = [], [], []
        with private_randomness():
            while len(encoded) < self.batch_size and (sample := cursor.next()) is not None:
                if not all(isinstance(image, bytes) for image in sample.images):
                    reader.turns_to(sample.key)
                seed_globals(stable_seed(*self.seed, self.rank, reader.worker, cursor.position))
                try:
                    encoded.append(self.encoding.encode(sample))
                except Unreadable as error:
                    report.add("unreadable image", f"{sample.origin}: {sample.key}: {error}")
                    continue
                cursor.usable = True
                keys.append(sample.key)
                indices.append(sample.index)
            if not encoded:
                return None
            return {**self.encoding.collate(encoded), "key": keys, "index": indices}


def run(
    stream: BatchStream, workers: int, report: DataReport, stall_seconds: float
) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Run the stream in `workers` processes (0: in this one), and tell `report` what was skipped.

    Who has to wait for a batch longer than `stall_seconds` is told in the log what for.
    """
    board = Board(len(stream.positions))
    last = (stream.first_worker - 1) % board.readers

    def due() -> str:
        if not workers:
            return f"this process reads them itself and {board.describe(0)}"
        # Workers take turns, but those that are through: their last batches are here.
        for worker in ((last + turn) % board.readers for turn in range(1, board.readers + 1)):
            if not board.finished[worker]:
                return f"worker {worker} is due, which {board.describe(worker)}"
        return "all workers have made their last batch"

    loader = DataLoader(
        replace(stream, board=board),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=outlive_signals,
        # Not Python's default since 3.14: that would import torch again in each worker, every epoch.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # otherwise each iterator draws from the global one
    )
    # No name for the iterator: the traceback of an error would keep it, and its workers, alive.
    for batch, progress in StallWatch(stream.rank, stall_seconds, due).watch(_start_workers(loader)):
        if "error" in progress:
            raise UserError(progress["error"])
        last = progress["worker"]
        report.merge(progress["skipped"], progress["examples"])
        if batch is not None:
            yield batch, progress


def _start_workers(loader: DataLoader) -> Iterator[tuple[Batch | None, dict[str, Any]]]:
    with held_back():
        return iter(loader)


def _as_it_is(value: Any) -> Any:
    return value
