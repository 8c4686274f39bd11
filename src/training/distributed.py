"""The process group, and agreement between ranks: what fails on one rank ends, with the same words, on all."""
from __future__ import annotations

import logging
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from open_clip_train.distributed import init_distributed_device_so

from .errors import UserError, reason
from .launch import launch_rank, several_processes

if TYPE_CHECKING:
    from .options.evaluation import EvaluationOptions


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None  # over which `gather` and `broadcast` go; None: the one of all

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. Plain Python or CPU tensors."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def mean(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Mean over the ranks of scalar tensors; waits for the device."""
        stacked = torch.stack([v.detach().float() for v in values.values()])
        if self.world_size > 1:
            dist.all_reduce(stacked)
            stacked /= self.world_size
        return dict(zip(values, stacked.tolist(), strict=True))

    def gather_tensor(self, rows: torch.Tensor) -> torch.Tensor:
        """The (B, ...) rows of all processes, in the order of their ranks; each has as many."""
        if self.world_size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def gather_with_gradient(self, rows: torch.Tensor) -> torch.Tensor:
        """As `gather_tensor`; the gradient of a row, summed over the processes, goes to the one that it comes from."""
        if self.world_size == 1:
            return rows
        return torch.cat(torch.distributed.nn.functional.all_gather(rows.contiguous()))

    def on_cpu(self, patience: timedelta | None = None) -> Ranks:
        """The same processes, talking over the CPU, so that they never wait for the device. A collective call."""
        group = dist.new_group(backend="gloo", timeout=patience) if self.world_size > 1 else None
        return replace(self, group=group)

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
        for found in filter(None, self.gather(problem)):
            raise found


def init_ranks(device: str, backend: str | None, url: str | None, no_set_device_rank: bool) -> Ranks:
    """Starts the process group if a launcher (torchrun, SLURM) asks for one; a device that is not there is the CPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            info = init_distributed_device_so(device, backend, url, no_set_device_rank=no_set_device_rank)
            torch.empty(0, device=info["device"])  # there may be fewer of them than processes
        except (AssertionError, ImportError, ValueError, RuntimeError, OSError) as error:
            if not several_processes():
                raise UserError(f"--device {device} cannot be used here ({reason(error)}); take another.") from error
            advice = "start them with torchrun or srun; for one process in an allocation of SLURM, unset SLURM_NTASKS"
            raise UserError(f"The processes cannot meet, each on a device ({reason(error)}): {advice}.") from error
    for warning in caught if launch_rank() == 0 else ():
        logging.warning(str(warning.message))
    return Ranks(torch.device(info["device"]), info["global_rank"], info["local_rank"], info["world_size"])


def leave() -> None:
    """Ends the process group, if there is one, once all are about to; who ends first may cut off the last exchange."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    with suppress(Exception):  # the process that keeps the store may be gone already: then all have come so far
        store, until = dist.distributed_c10d._get_default_store(), time.monotonic() + 5.0
        store.add("leaving", 1)
        while store.add("leaving", 0) < dist.get_world_size() and time.monotonic() < until:
            time.sleep(0.01)
    dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def choose_device(options: EvaluationOptions) -> None:
    """Sets device and precision where they are not given; UserError: there is no such device."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    options.device = options.device or ("cuda" if cuda else "cpu")
    options.precision = options.precision or ("amp_bf16" if cuda else "fp32")
    try:
        device = torch.device(options.device)
    except RuntimeError:
        device = None
    there = {"cpu": 1, "cuda": cuda, "mps": int(torch.backends.mps.is_available())}
    if device is None or device.type not in there:
        raise UserError(f"There is no device {options.device!r}; use cpu, cuda or mps.")
    if (device.index or 0) >= there[device.type]:
        raise UserError(f"--device {options.device} is not available; use --device cpu.")
