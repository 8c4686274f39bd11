"""What is learnt: a task turns batches into losses. The trainer knows this interface and nothing else of a task."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from numpy import ndarray
from open_clip_train.precision import get_autocast
from torch import Tensor, nn

from ..options.run import OptimizationOptions
from ..plan import Plan
from ..sharding import no_sync

Batch = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """Where a step is in the run, before it is made: complete epochs, steps of the present one, and of all."""

    epoch: int
    epoch_steps: int
    steps: int
    samples: int
    plan: Plan


class Cost(NamedTuple):
    """What a sample costs in a training step. operations: forward, backward and scoring; recomputing left out."""

    operations: float
    tokens: float

    @classmethod
    def mean(cls, costs: Sequence[Cost | None]) -> Cost | None:
        """Over batches of equal size; None if there is none, or if that of one is not known."""
        if not costs or None in costs:
            return None
        return cls(*(sum(values) / len(costs) for values in zip(*costs, strict=True)))


class Engine:
    """How a model is run in training; `model` is wrapped by DDP, sharded, compiled, or bare."""

    def __init__(self, model: nn.Module, precision: str, device: torch.device):
        self.model, self.device = model, device
        self.autocast = get_autocast(precision, device_type=device.type)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "amp")

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def synchronized(self, last: bool) -> AbstractContextManager:
        """Context of a forward and backward pass; the processes average their gradients in the last one of a step."""
        return nullcontext() if last else no_sync(self.model)

    def random_state(self) -> dict[str, Tensor]:
        cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"cpu": torch.get_rng_state(), **cuda}

    def restore_random_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


class Task:
    """A training objective. A subclass writes `losses`, and of the rest what it has."""

    # What is due to be seen at the end of an epoch, (H, W, 3) uint8 on the main process; takes what `evaluate` takes.
    picture: Callable[[nn.Module, int, bool], ndarray | None] | None = None

    def losses(self, model: nn.Module, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Named scalars of one micro-batch on the device, of which `loss` is minimised; all are logged. Runs under the
        precision's autocast. The model (as it is run) may be called several times."""
        raise NotImplementedError

    def gradients(self, window: list[Batch], engine: Engine, progress: Progress) -> dict[str, Tensor]:
        """Adds up the gradients of a step, by default of the mean loss over the window's `--accum-freq` micro-batches,
        each by itself, and returns its losses."""
        found = []
        for i, batch in enumerate(window):
            with engine.synchronized(last=i == len(window) - 1):
                with engine.autocast():
                    losses = self.losses(engine.model, batch, progress)
                engine.backward(losses["loss"] / len(window))
            found.append({name: value.detach() for name, value in losses.items()})
        if len(found) == 1:
            return found[0]
        return {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}

    def after_step(self, model: nn.Module, applied: Callable[[], bool]) -> None:
        """Constraints on parameters, momentum twins, queues. `applied()`: False if the step was not finite and so
        changed nothing; then nothing may change here either. The same on all processes; it waits for the device."""

    def prepare(self, batch: Batch) -> Batch:
        """What can be decided from a batch on the CPU, before it goes to the device."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What the task itself must remember over a restart: tensors and plain types, the same on all processes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`, which has the same names."""

    def parameters(self, model: nn.Module, options: OptimizationOptions) -> nn.Module | list[dict]:
        """What the optimizer steps: the model, or groups of parameters (`optim.parameter_groups`), each with its
        `weight_decay` and maybe an `lr_scale` that multiplies the learning rate."""
        return model

    def ddp_options(self) -> dict[str, Any]:
        """More arguments for DistributedDataParallel, such as `find_unused_parameters`."""
        return {}

    def log(self, model: nn.Module) -> dict[str, float]:
        """More columns for the log; the names are always the same ones."""
        return {}

    def cost(self, batch: Batch) -> Cost | None:
        """What a sample of a batch like this one costs; None if the task does not know."""
        return None

    def evaluate(self, model: nn.Module, epoch: int, last: bool) -> dict[str, float]:
        """What is due at the end of `epoch` (1-based), the same on all processes; {} if nothing is. Collective."""
        return {}

    def score(self, metrics: dict[str, float]) -> float | None:
        """What makes one checkpoint better than another, from what `evaluate` returned; None if it cannot tell."""
        return None
