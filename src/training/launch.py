"""What the launcher (torchrun, SLURM) tells of this process, before any process group exists; and its end."""
from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def launch_rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def several_processes() -> bool:
    """Whether this is one of several, as OpenCLIP tells it."""
    return any(int(os.environ.get(name, "1")) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))


def end(code: int) -> NoReturn:
    """As `sys.exit`, the last thing a command does; but one of several processes does not tear Python down.

    A thread of gloo's that lets go of its last tensor only then would abort it (pytorch/pytorch issue 190489).
    """
    if not several_processes():
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
