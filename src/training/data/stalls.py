"""Waiting for data: which worker is due, what it is reading, and for how long."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import RawArray
from typing import TypeVar

log = logging.getLogger(__name__)

STALL_SECONDS = 60.0
_NAME_BYTES = 1024

Item = TypeVar("Item")


class Status:
    """Where a reader says what it is doing. This one says it to nobody."""

    def skips(self, samples: int) -> None:
        """It has to pass over so many raw samples first; 0: that is done."""

    def starts(self, name: str) -> None:
        """It turns to this shard or picture."""

    def has_read(self, samples: int) -> None:
        """It has had so many samples of the shard."""

    def finishes(self) -> None:
        """It has nothing more to do."""


class Board:
    """What each reader is doing, in memory that the worker processes share with this one."""

    def __init__(self, readers: int):
        self.readers = readers
        self._names = RawArray("c", readers * _NAME_BYTES)
        self._since = RawArray("d", readers)  # on the monotonic clock, which is the machine's; 0 before the first shard
        self._samples = RawArray("q", readers)
        self._skipping = RawArray("q", readers)
        self._finished = RawArray("b", readers)

    def status(self, reader: int) -> "Status":
        return _Line(self, reader)

    def finished(self, reader: int) -> bool:
        return bool(self._finished[reader])

    def describe(self, reader: int) -> str:
        """Such as "has been on x.tar for 75 s and has read 3 samples of it"."""
        if not self._since[reader]:
            return "has not begun to read"
        name = self._names[reader * _NAME_BYTES : (reader + 1) * _NAME_BYTES].partition(b"\0")[0]
        text = f"has been on {name.decode(errors='replace')} for {time.monotonic() - self._since[reader]:.0f} s"
        if self._samples[reader] >= 0:
            text += f" and has read {_some(self._samples[reader], 'sample')} of it"
        if self._skipping[reader]:
            text += f", on its way past the {_some(self._skipping[reader], 'sample')} that were used before"
        return text


class _Line(Status):
    def __init__(self, board: Board, reader: int):
        self.board, self.reader = board, reader

    def skips(self, samples: int) -> None:
        self.board._skipping[self.reader] = samples

    def starts(self, name: str) -> None:
        encoded = name.encode() + b"\0"
        if len(encoded) > _NAME_BYTES:  # of a long command the end tells most
            encoded = b"..." + encoded[3 - _NAME_BYTES :]
        start = self.reader * _NAME_BYTES
        self.board._names[start : start + len(encoded)] = encoded
        self.board._samples[self.reader] = -1
        self.board._since[self.reader] = time.monotonic()

    def has_read(self, samples: int) -> None:
        self.board._samples[self.reader] = samples

    def finishes(self) -> None:
        self.board._finished[self.reader] = True


class StallWatch:
    """Warns, from a thread, while an item is longer in coming than `seconds`: then, and each time the wait has doubled.

    who: says, at that moment, whom the wait is for
    seconds: 0 never warns
    """

    def __init__(self, rank: int, seconds: float, who: Callable[[], str]):
        self.rank, self.seconds, self.who = rank, seconds, who
        self._lock = threading.Lock()
        self._since: float | None = None  # when the wait began; None while there is none
        self._next = seconds  # the wait that is worth the next warning
        self._over = threading.Event()

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items as they are."""
        iterator = iter(items)
        thread = threading.Thread(target=self._run, name="stall-watch", daemon=True)
        if self.seconds > 0:
            thread.start()
        try:
            while True:
                self._since = time.monotonic()
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                self._came()
                yield item
        finally:
            self._over.set()

    def _came(self) -> None:
        with self._lock:
            waited, self._since = time.monotonic() - self._since, None
            if self._next > self.seconds:
                log.warning("Rank %d: data flow again after %.0f s.", self.rank, waited)
                self._next = self.seconds

    def _run(self) -> None:
        while not self._over.wait(min(self.seconds / 4, 5)):
            self.look()

    def look(self) -> None:
        """Warn if it is time to; the thread's work."""
        with self._lock:
            waited = 0 if self._since is None else time.monotonic() - self._since
            if waited >= self._next:
                log.warning("Rank %d has been waiting for data for %.0f s: %s.", self.rank, waited, self.who())
                while self._next <= waited:
                    self._next *= 2


def _some(count: int, thing: str) -> str:
    return f"{count:,} {thing if count == 1 else thing + 's'}"
