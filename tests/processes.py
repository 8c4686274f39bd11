"""Tests in several processes: how they start, and how they end so that only what they did counts."""
from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from training.distributed import leave
from training.launch import end

# Once, by the process that the others are forked from.
IMPORTED = ["pytest", "training.work.main", "training.work.downstream"]


def prepare() -> None:
    """Starts the process that the others are forked from, which has no other thread."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()


def spawn(function: Callable[..., None], *args: Any, nprocs: int = 2, group: bool = True) -> None:
    """Runs `function(rank, *args)` in `nprocs` processes, each with one thread; what one of them raises is raised.

    They are in a gloo group, and in an environment as torchrun makes it: a command under test starts a group of its
    own there, once this one is left (`training.distributed.leave`) or if there is none.

    Args:
        function: of the top level of a module.
        group: False starts no group.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store" if group else None
        context = function, args, dict(os.environ), nprocs, port, store
        mp.start_processes(_process, context, nprocs, start_method="forkserver")


def run(main: Callable[[list[str]], int], argv: list[str], code: int = 0) -> None:
    """Runs a command in two processes, each of which has to end with `code`."""
    spawn(_run, main, argv, code, group=False)


def _run(rank: int, main: Callable[[list[str]], int], argv: list[str], code: int) -> None:
    assert main(argv) == code


def _process(
    rank: int, function: Callable, args: tuple, environment: dict[str, str], world_size: int, port: int,
    store: str | None,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if store is not None:
        patience = timedelta(minutes=2)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=patience)
    function(rank, *args)
    leave()
    end(0)  # what happens while the interpreter is torn down is none of the test's business


def torchrun(*words: str, nprocs: int = 2, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs `words` in processes that torchrun starts: "-m", a module, "--", its arguments; or "--", a script, ...

    Without the two dashes torchrun takes --logs for one of its own flags.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nprocs)]
    return subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, timeout=timeout)
