"""What may end or interrupt a run between two steps: signals, the clock, a data error; decided alike on all ranks."""
from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from .distributed import Ranks
from .errors import Stopped, UserError

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved after a signal; start again with --resume latest
EXIT_NONFINITE = 76  # stopped by --nonfinite stop, at the last good state

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # torchrun and schedulers; Ctrl-C; SLURM --signal=USR1


class Control:
    """Collects this process's reasons to stop, and finds out between two steps whether any process has one.

    As a context manager it turns the signals in `SIGNALS` into a wish to stop; a second Ctrl-C stops at once, and so
    does any signal in the first step of a single process, which may take minutes: nothing is to be saved yet.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks.on_cpu()
        self.signal = 0
        self.begun = False  # a step has been made
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Control:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if not self.begun and self.ranks.world_size == 1:
            raise Stopped(f"Stopped by signal {number} before the end of the first step.", EXIT_INTERRUPTED)
        if self.ranks.is_main:  # not by logging, which may be at work just now
            os.write(2, f"Signal {number}: the run is saved and stops after this step.\n".encode())

    def agree(self, save: bool, nonfinite: bool, error: UserError | None) -> tuple[int, bool, bool]:
        """One small exchange between all ranks: what any of them wants, all do; any rank's `error` is raised on all.

        Returns the signal (0: none), whether to save, and whether the last step was not finite.
        """
        found = self.ranks.gather((self.signal, save, nonfinite, error))
        signals, saves, nonfinites, errors = zip(*found, strict=True)
        for problem in filter(None, errors):
            raise problem
        return max(signals), any(saves), any(nonfinites)
