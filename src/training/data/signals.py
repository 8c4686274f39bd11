"""Signals for the loader's workers: when to stop is decided by the process that trains, they work on until it has."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .streams import kill_commands


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
    middle of the step that its parent wants to finish. The commands of a worker inherit all this.

    Other workers ignore Ctrl-C alone.
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
