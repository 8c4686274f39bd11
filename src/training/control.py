"""What may end or interrupt a run between two steps: signals, the clock, a data error; decided alike on all ranks."""
from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from .distributed import Ranks
from .errors import UserError

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved after a signal; start again with --resume latest
EXIT_NONFINITE = 76  # stopped by --nonfinite stop, at the last good state

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # torchrun and schedulers; Ctrl-C; SLURM --signal=USR1


class Stopped(Exception):
    """The run ended early, in order and with its state saved; `code` is the exit code of the process."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Wishes(NamedTuple):
    """What the ranks want between two steps."""

    signal: int  # 0: none
    save: bool
    nonfinite: bool


class Control:
    """Collects this process's reasons to stop, and finds out between two steps whether any process has one.

    As a context manager it turns the signals in `SIGNALS` into a wish to stop; a second Ctrl-C stops at once.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        # A group of its own, on the CPU: asking it never waits for the device.
        self.group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Control:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def agree(self, *, save: bool = False, nonfinite: bool = False, error: UserError | None = None) -> Wishes:
        """One small exchange between all ranks: what any of them wants, all do; any rank's `error` is raised on all."""
        if self.group is None:
            if error is not None:
                raise error
            return Wishes(self.signal or 0, save, nonfinite)
        wishes = torch.tensor([self.signal or 0, save, nonfinite, error is not None], dtype=torch.int32)
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=self.group)
        number, save, nonfinite, failed = wishes.tolist()
        if failed:
            texts: list[str | None] = [None] * self.ranks.world_size
            dist.all_gather_object(texts, None if error is None else str(error), group=self.group)
            raise UserError(next(text for text in texts if text is not None))
        return Wishes(number, bool(save), bool(nonfinite))
