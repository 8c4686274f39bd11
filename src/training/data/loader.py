"""From samples to batches, in DataLoader workers or in this process, at a position that can be saved."""
from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import RawArray
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import UserError
from .images import Unreadable
from .randomness import private_randomness, seed_globals, stable_seed
from .samples import DataReport, Pass, Reader, Sample
from .streams import kill_commands

log = logging.getLogger(__name__)

Batch = dict[str, Any]
_NAME_BYTES = 1024


class Board:
    """What each worker is doing, in memory that the worker processes share with this one."""

    def __init__(self, workers: int):
        self._names = [RawArray("c", _NAME_BYTES) for _ in range(workers)]
        self.since = RawArray("d", workers)  # on the monotonic clock; 0 before the first shard, infinite after the last
        self.resuming = RawArray("b", workers)  # on its way past what was used before

    def turns_to(self, worker: int, name: str) -> None:
        self._names[worker].value = name.encode()[1 - _NAME_BYTES :]  # of a long command the end tells most
        self.since[worker] = time.monotonic()

    def describe(self, worker: int) -> str:
        """Such as "worker 2 has been on x.tar for 75 s"."""
        if not self.since[worker]:
            return f"worker {worker} has not begun to read"
        name, seconds = self._names[worker].value.decode(errors="replace"), time.monotonic() - self.since[worker]
        told = f"worker {worker} has been on {name} for {seconds:.0f} s"
        return told + ", on its way past the samples that were used before" * self.resuming[worker]


@dataclass(eq=False)
class BatchStream(IterableDataset):
    """Batches as the workers make them."""

    data: Any  # with `encoding`, `options`, `rank` and `world_size`
    passes: Callable[[Reader], Iterable[Pass]]  # over the source: one for validation, any number for training
    seed: tuple[int | str, ...]
    positions: list[int]  # samples to skip, for each worker
    places: list[str | None]  # from where on, for each worker
    quotas: list[int] | None = None  # batches to make, for each worker; None: all there are, the last maybe smaller
    first_worker: int = 0  # whose turn it is; the DataLoader begins with its worker 0
    board: Board | None = None

    def __iter__(self) -> Iterator[tuple[Batch | UserError | None, int, int, str | None, DataReport]]:
        """(batch, worker, its position and maybe place then, what was skipped). An error may stand for the batch."""
        info, data, num_workers = get_worker_info(), self.data, len(self.positions)
        worker = (self.first_worker + (info.id if info else 0)) % num_workers
        report, turns_to = DataReport(), partial(self.board.turns_to, worker)
        where = self.positions[worker], self.places[worker]
        stream = self._encoded(Reader(data.rank, data.world_size, worker, num_workers, report, turns_to, *where))
        try:
            for _ in itertools.count() if self.quotas is None else range(self.quotas[worker]):
                with private_randomness():
                    found = list(itertools.islice(stream, data.options.batch_size))
                    if not found:
                        break
                    positions, samples, encoded, passes = zip(*found, strict=True)
                    batch = data.encoding.collate(list(encoded))
                batch |= {"key": [sample.key for sample in samples], "index": [sample.index for sample in samples]}
                yield batch, worker, positions[-1], passes[-1].place(positions[-1]), report.take()
        except UserError as error:  # sent as a value: raised in here, the DataLoader would wrap it in a traceback
            yield error, worker, 0, None, report.take()
            return
        if report.skipped:  # after the last batch
            yield None, worker, 0, None, report.take()
        self.board.since[worker] = math.inf

    def _encoded(self, reader: Reader) -> Iterator[tuple[int, Sample, Any, Pass]]:
        """(position after the sample, sample, what the encoding makes of it, its pass), after those to skip."""
        position, skip = 0, reader.passed
        self.board.resuming[reader.worker] = skip > 0
        for samples in self.passes(reader):
            position, usable = position + samples.passed, samples.passed > 0
            self.board.resuming[reader.worker] = position < skip
            for sample in samples:
                position += 1
                if position <= skip:
                    usable = True  # unknown, but they were good enough for a saved position
                    if position == skip:
                        reader.report.take()  # what the skipped part had to tell came with the saved position
                        self.board.resuming[reader.worker] = False
                    continue
                if not all(isinstance(image, bytes) for image in sample.images):
                    reader.turns_to(sample.key)
                seed_globals(stable_seed(*self.seed, reader.rank, reader.worker, position))
                try:
                    encoded = self.data.encoding.encode(sample)
                except Unreadable as error:
                    reader.report.add("unreadable image", f"{sample.origin}: {sample.key}: {error}")
                    continue
                usable = True
                yield position, sample, encoded, samples
            if not usable and self.quotas is not None:
                why = reader.report.summary() or "which is empty"
                raise UserError(
                    f"Worker {reader.worker} of rank {reader.rank} found not one usable sample in a whole pass over "
                    f"its part of the data, {why}: repair the data or share it among fewer --workers."
                )


def run(stream: BatchStream, report: DataReport) -> Iterator[tuple[Batch, int, int, str | None]]:
    """Run the stream in its workers: (batch, worker, its position and maybe place). What is skipped joins `report`."""
    options, count = stream.data.options, len(stream.positions)
    board, last = Board(count), (stream.first_worker - 1) % count

    def due() -> str:
        """Workers take turns, but those that are through: their last batches are here."""
        turns = ((last + turn) % count for turn in range(1, count + 1))
        return board.describe(next((worker for worker in turns if board.since[worker] < math.inf), last))

    loader = DataLoader(
        replace(stream, board=board),
        batch_size=None,
        num_workers=options.workers,
        collate_fn=tuple,  # as they are
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=outlive_signals,
        # Not Python's default since 3.14: that would import torch again in each worker, every epoch.
        multiprocessing_context="fork" if options.workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # otherwise each iterator draws from the global one
    )
    start = held_back()(iter)  # no name for the iterator: the traceback of an error would keep it, and workers, alive
    for batch, worker, position, place, skipped in watched(start(loader), options.stall_seconds, stream.data.rank, due):
        if isinstance(batch, UserError):
            raise batch
        last = worker
        report.merge(skipped)
        if batch is not None:
            yield batch, worker, position, place


def watched(items: Iterable, seconds: float, rank: int, due: Callable[[], str]) -> Iterator:
    """The items as they are. A thread warns when one takes longer than `seconds`, and each time the wait has doubled.

    due: says, at that moment, who is waited for
    """
    begun, over = time.monotonic(), threading.Event()  # infinity while there is no wait

    def watch() -> None:
        limit = seconds
        while not over.wait(min(seconds / 4, 5)):
            waited = time.monotonic() - begun
            if waited < seconds:  # another wait, or none
                limit = seconds
            elif waited >= limit:
                log.warning("Rank %d has been waiting for data for %.0f s: %s.", rank, waited, due())
                limit = 2 * waited

    if seconds > 0:
        threading.Thread(target=watch, name="stall-watch", daemon=True).start()
    try:
        for item in items:
            begun = math.inf
            yield item
            begun = time.monotonic()
    finally:
        over.set()


# Signals: when to stop is decided by the process that trains; its workers work on until it has.


@contextmanager
def held_back() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back, also in processes started meanwhile, until these are ready for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_signals(worker: int = 0) -> None:
    """In a worker forked while signals are `held_back`: ignore Ctrl-C, and SIGTERM from anyone but the parent.

    Terminals, torchrun and SLURM signal whole process groups. A worker that died of it would raise an error in the
    middle of the step that its parent wants to finish. Its commands inherit all this. Others ignore Ctrl-C alone.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # Only threads that were born with SIGTERM blocked leave it to the one below; and macOS does not tell who sent it.
    if signal.SIGTERM not in held or not hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # for torch, which exits
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the commands: shells lift what is blocked
    threading.Thread(target=_await_parents_word, name="sigterm", daemon=True).start()


def _await_parents_word() -> None:
    parent = multiprocessing.parent_process()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid and parent.is_alive():
        pass
    kill_commands()
    os._exit(0)  # what the DataLoader expects of a worker that it terminates
