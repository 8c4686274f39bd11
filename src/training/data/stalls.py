"""Waiting for data: which worker is due, what it is reading, and for how long."""
from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import RawArray

log = logging.getLogger(__name__)

_NAME_BYTES = 1024


class Board:
    """What each reader is doing, in memory that the worker processes share with this one."""

    def __init__(self, readers: int):
        self.readers = readers
        self._names = [RawArray("c", _NAME_BYTES) for _ in range(readers)]
        self._since = RawArray("d", readers)  # on the monotonic clock, which is the machine's; 0 before the first shard
        self.resuming = RawArray("b", readers)  # on its way past what was used before
        self.finished = RawArray("b", readers)

    def turns_to(self, reader: int, name: str) -> None:
        """It begins with this shard or picture."""
        self._names[reader].value = name.encode()[1 - _NAME_BYTES :]  # of a long command the end tells most
        self._since[reader] = time.monotonic()

    def describe(self, reader: int) -> str:
        """Such as "has been on x.tar for 75 s"."""
        if not self._since[reader]:
            return "has not begun to read"
        name, seconds = self._names[reader].value.decode(errors="replace"), time.monotonic() - self._since[reader]
        resuming = ", on its way past the samples that were used before" if self.resuming[reader] else ""
        return f"has been on {name} for {seconds:.0f} s{resuming}"


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

    def watch(self, items: Iterable) -> Iterator:
        """The items as they are."""
        if self.seconds > 0:
            threading.Thread(target=self._run, name="stall-watch", daemon=True).start()
        try:
            self._since = time.monotonic()
            for item in items:
                with self._lock:
                    self._since, self._next = None, self.seconds
                yield item
                self._since = time.monotonic()
        finally:
            self._over.set()

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
