"""The process group, and agreement between ranks: what fails on one rank ends, with the same words, on all."""
from __future__ import annotations

import atexit
import logging
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from open_clip_train.distributed import init_distributed_device_so, is_using_distributed

from .errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. Plain Python or CPU tensors."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Mean over the ranks of scalar tensors; waits for the device."""
        stacked = torch.stack([v.detach().float() for v in values.values()])
        if self.world_size > 1:
            dist.all_reduce(stacked)
            stacked /= self.world_size
        return dict(zip(values, stacked.tolist(), strict=True))

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Runs its block on every rank; a `UserError` on any of them is raised on all of them, of the same class."""
        problem = None
        try:
            yield
        except UserError as error:
            problem = error
        for found in self.gather(problem):
            if found is not None:
                raise found


def launch_rank() -> int:
    """This process's rank as the launcher tells it, before any process group exists."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def init_ranks(device: str, backend: str | None, url: str | None, no_set_device_rank: bool) -> Ranks:
    """Starts the process group if a launcher (torchrun, SLURM) asks for one, else a single process.

    A device that is not there falls back to the CPU, as in OpenCLIP, and says so.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        info = init_distributed_device_so(
            device=device, dist_backend=backend, dist_url=url, no_set_device_rank=no_set_device_rank
        )
    if launch_rank() == 0:
        for warning in caught:
            logging.warning(str(warning.message))
    return Ranks(torch.device(info["device"]), info["global_rank"], info["local_rank"], info["world_size"])


def leave(patience: float = 5.0) -> None:
    """Ends the process group, if there is one, once all processes are about to (or after `patience` seconds).

    A process that ends first would cut off the last exchange for one that is still reading it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    with suppress(Exception):  # the process that keeps the store may be gone already: then all have come so far
        store, until = dist.distributed_c10d._get_default_store(), time.monotonic() + patience
        store.add("leaving", 1)
        while store.add("leaving", 0) < dist.get_world_size() and time.monotonic() < until:
            time.sleep(0.01)
    dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """Ends this process, the last thing a command does; as `sys.exit`, but one of several does not tear Python down.

    A thread of gloo's that lets go of its last tensor only while Python is torn down would abort the process
    (github.com/pytorch/pytorch/issues/190489), and the launcher take a run that is complete for a failed one.
    """
    if not is_using_distributed():
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def seed_everything(seed: int) -> None:
    """Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
