"""How long a run is, in steps, epochs and samples, and what a resumed run must have in common with the one before."""
from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from .durations import Duration
from .errors import UserError
from .optim import create_schedule


@dataclasses.dataclass(frozen=True)
class Plan:
    """
    Attributes:
        batch_size, accum_freq, world_size, workers: the flags, and the number of processes.
        steps_per_epoch: optimizer steps.
        reference_batch, reference_steps_per_epoch: global batch and epoch length that the schedule counts in; those at
            the start of the run, also after an elastic resume.
        total_steps, warmup_steps, cooldown_steps: of the schedule, in steps of the reference batch.
        full_token_steps: the last steps, in which no token is removed, in steps of the reference batch.
    """

    batch_size: int
    accum_freq: int
    world_size: int
    workers: int
    steps_per_epoch: int
    reference_batch: int
    reference_steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    cooldown_steps: int | None
    full_token_steps: int = 0

    @classmethod
    def of(cls, args: argparse.Namespace, num_batches: int, world_size: int, reference: dict | None = None) -> Plan:
        """The plan of a run whose epochs have `num_batches` batches on each rank.

        Raises:
            UserError: an epoch is shorter than one step, or a duration cannot be read.
        """
        steps_per_epoch = num_batches // args.accum_freq
        if not steps_per_epoch:
            raise UserError(
                f"One optimizer step needs {args.accum_freq} batches but an epoch has {num_batches}; "
                "lower --accum-freq or --batch-size."
            )
        batch = args.batch_size * args.accum_freq * world_size
        reference_batch = reference["reference_batch"] if reference else batch
        reference_epoch = reference["reference_steps_per_epoch"] if reference else steps_per_epoch

        def steps(text: Any, unit: str, total: int | None = None) -> int:
            try:
                return Duration.parse(str(text), unit).steps(reference_epoch, reference_batch, total)
            except ValueError as error:
                raise UserError(str(error)) from error

        total = steps(args.epochs, "epochs") if args.duration is None else steps(args.duration, "steps")
        cooldown = None if args.epochs_cooldown is None else steps(args.epochs_cooldown, "epochs")
        last = getattr(args, "full_tokens_last", None)
        full_tokens = 0 if last is None else steps(last, "steps", total)
        return cls(
            args.batch_size, args.accum_freq, world_size, args.workers, steps_per_epoch, reference_batch,
            reference_epoch, total, steps(args.warmup, "steps", total), cooldown, full_tokens,
        )  # fmt: skip

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

    def uses_all_tokens(self, samples: int) -> bool:
        """Whether the step after `samples` samples is in the last part of the run, in which no token is removed."""
        return samples >= self.total_samples - self.full_token_steps * self.reference_batch

    def steps_left(self, epoch_steps: int, samples: int) -> int:
        """Steps still to do in an epoch of which `epoch_steps` are done, after `samples` samples in all."""
        in_run = math.ceil((self.total_samples - samples) / self.global_batch)
        return max(0, min(self.steps_per_epoch - epoch_steps, in_run))

    def schedule(self, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> Callable[[float], float] | None:
        return create_schedule(
            optimizer,
            args,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            cooldown_steps=self.cooldown_steps,
        )

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def change_from(self, state: dict[str, Any], mid_epoch: bool) -> str:
        """What differs from the plan of a checkpoint, in words; empty if the run can go on bit for bit.

        At the end of an epoch another number of workers is no such change: it only concerns epochs to come.
        """
        names = {
            "world_size": "process(es)",
            "batch_size": "samples in a batch",
            "accum_freq": "batches in a step",
            "steps_per_epoch": "steps in an epoch",
        }
        if mid_epoch:
            names["workers"] = "loader worker(s)"
        changed = [
            f"{state[name]} {words} (now {getattr(self, name)})"
            for name, words in names.items()
            if state[name] != getattr(self, name)
        ]
        return ", ".join(changed)

    def continued(self, state: dict[str, Any], args: argparse.Namespace) -> Plan:
        """This plan with the schedule counted as in the checkpoint's."""
        return Plan.of(args, self.steps_per_epoch * self.accum_freq, self.world_size, reference=state)
