"""How long a run is, in steps, epochs and samples, and what a resumed run must have in common with the one before."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from . import durations
from .errors import UserError
from .optim import create_schedule


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What both have and has another value now: name -> in words."""
    both = [name for name in before if name in now and before[name] != now[name]]
    return {name: f"{name} {now[name]} (was {before[name]})" for name in both}


@dataclasses.dataclass
class Plan:
    batch_size: int
    accum_freq: int
    world_size: int
    workers: int
    steps_per_epoch: int  # of the optimizer
    # What the schedule counts in: as at the start of the run, also after an elastic resume.
    reference_batch: int
    reference_steps_per_epoch: int
    total_steps: int | None = None  # None only while the plan is made
    warmup_steps: int = 0
    cooldown_steps: int | None = None

    @classmethod
    def of(cls, options: Any, num_batches: int, world_size: int, reference: dict | None = None) -> Plan:
        """The plan of a run whose epochs have `num_batches` batches on each rank.

        Of a plan whose state is `reference`, the reference batch and epoch are taken over. UserError: an epoch is
        shorter than one step, or a duration cannot be read.
        """
        size, accumulated = options.batch_size, options.accum_freq
        steps_per_epoch = num_batches // accumulated
        if not steps_per_epoch:
            short = f"One optimizer step needs {accumulated} batches but an epoch has {num_batches}"
            raise UserError(f"{short}; lower --accum-freq or --batch-size.")
        own = {"reference_batch": size * accumulated * world_size, "reference_steps_per_epoch": steps_per_epoch}
        counted = {name: (reference or own)[name] for name in own}
        plan = cls(size, accumulated, world_size, options.workers, steps_per_epoch, **counted)
        length = (options.epochs, "epochs") if options.duration is None else (options.duration, "steps")
        plan.total_steps = plan.steps_of(*length)
        plan.warmup_steps = plan.steps_of(options.warmup)
        if options.epochs_cooldown is not None:
            plan.cooldown_steps = plan.steps_of(options.epochs_cooldown, "epochs")
        return plan

    def steps_of(self, duration: Any, unit: str = "steps") -> int:
        """A length as an option gives it ("5%", "3ep", a number of `unit`), in steps of the reference batch."""
        lengths = self.reference_steps_per_epoch, self.reference_batch, self.total_steps
        try:
            return durations.steps(str(duration), unit, *lengths)
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accum_freq * self.world_size

    @property
    def epochs(self) -> int:
        """Epochs of the run; the last one may be cut short by `--duration`."""
        return math.ceil(self.total_steps / self.reference_steps_per_epoch)

    @property
    def total_samples(self) -> int:
        return self.total_steps * self.reference_batch

    def steps_left(self, epoch_steps: int, samples: int) -> int:
        """Steps still to do in an epoch of which `epoch_steps` are done, after `samples` samples in all."""
        in_run = math.ceil((self.total_samples - samples) / self.global_batch)
        return max(0, min(self.steps_per_epoch - epoch_steps, in_run))

    def schedule(self, optimizer: torch.optim.Optimizer, options: Any) -> Callable[[float], float] | None:
        lengths = {name: getattr(self, name) for name in ("total_steps", "warmup_steps", "cooldown_steps")}
        return create_schedule(optimizer, options, epoch_steps=self.reference_steps_per_epoch, **lengths)

    def change_from(self, state: dict[str, Any], mid_epoch: bool) -> str:
        """What differs from the plan of a checkpoint, in words; empty if the run can go on bit for bit."""
        names = {
            "world_size": "process(es)", "batch_size": "samples in a batch", "accum_freq": "batches in a step",
            "steps_per_epoch": "steps in an epoch",
        }  # fmt: skip
        if mid_epoch:  # at the end of an epoch it only concerns epochs to come
            names["workers"] = "loader worker(s)"
        changed = {name: getattr(self, name) for name in names if state[name] != getattr(self, name)}
        return ", ".join(f"{state[name]} {names[name]} (now {now})" for name, now in changed.items())


def is_due(epoch: int, frequency: int, last: bool) -> bool:
    """Whether what comes every `frequency` epochs, and after the last, comes after this one; 0: never."""
    return frequency > 0 and (last or epoch % frequency == 0)
