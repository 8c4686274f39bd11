"""Learning beside a momentum twin, whose answers are part of the targets."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from open_clip_elip.fusion.base import FusionModel
from open_clip_elip.fusion.momentum import follow, twin_of

from ..errors import UserError
from ..options.run import OptimizationOptions
from .base import Batch, Engine, Progress, Task

TEMPERATURES = 0.001, 0.5  # between which a model's free temperature is held


class DistilledTask(Task):
    """A task with a twin of its model.

    Args:
        model: bare; its twin begins as it is.
        momentum: of the twin, which moves once a step, before it.
        alpha: weight of the twin's targets; 0: there is no twin.
        ramp: epochs after which `alpha` is reached, in equal steps from 0; 0: it is there at once.
        dropout: of the twin, in training.
        suite: what the model is evaluated on; None: nothing.
    """

    def __init__(
        self, model: nn.Module, *, momentum: float = 0.995, alpha: float = 0.4, ramp: int = 1, dropout: bool = True,
        suite: Callable | None = None,
    ):  # fmt: skip
        self.suite = suite
        self.model, self.twin = model, twin_of(model).train(dropout) if alpha else None
        self.momentum, self.alpha, self.ramp = momentum, alpha, ramp

    def gradients(self, window: list[Batch], engine: Engine, progress: Progress) -> dict[str, Tensor]:
        self.begin()
        return super().gradients(window, engine, progress)

    @torch.no_grad()
    def begin(self) -> None:
        """What comes before a step's first pass."""
        if hasattr(self.model, "temp"):
            self.model.temp.clamp_(*TEMPERATURES)
        if self.twin is not None:
            follow(self.twin, self.model, self.momentum)

    def weight(self, progress: Progress) -> float:
        """Of the twin's targets in this step."""
        if progress.epoch >= self.ramp:
            return self.alpha
        return self.alpha * (progress.epoch + progress.epoch_steps / progress.plan.steps_per_epoch) / self.ramp

    def take_over(self, twin: dict[str, Tensor], queues: dict[str, Tensor]) -> dict[str, str]:
        """Goes on from what a file of weights holds besides; returns what of it is not taken over ("momentum twin",
        "queues"), with the reason. The twin keeps the model's weights where the file has none of its own."""
        left = {"queues": "there are none here"}
        if self.twin is None:
            return left | {"momentum twin": "nothing is learnt from one"}
        self.twin.load_state_dict(twin, strict=False)
        return left

    def evaluate(self, model: nn.Module, epoch: int, last: bool) -> dict[str, float]:
        return {} if self.suite is None else self.suite(model, epoch, last)

    def score(self, metrics: dict[str, float]) -> float | None:
        return None if self.suite is None else self.suite.score(metrics)

    def parameters(self, model: nn.Module, options: OptimizationOptions) -> list[dict]:
        """See `FusionModel.decays` and `rates`. (ALBEF's released program decays the temperature too.)"""
        if options.layer_decay is not None:
            raise UserError("--layer-decay is for image towers alone and CLIP models; leave it out.")
        groups: dict[tuple[bool, float], list[Tensor]] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                rate = next((rate for start, rate in self.model.rates.items() if name.startswith(start)), 1.0)
                decayed = self.model.decays(name, p)
                if not options.decay_norms:
                    decayed &= FusionModel.decays(self.model, name, p)
                groups.setdefault((decayed, rate), []).append(p)
        return [
            {"params": params, "weight_decay": options.wd if decayed else 0.0, "lr_scale": rate}
            for (decayed, rate), params in sorted(groups.items(), key=lambda group: group[0])
        ]

    def state_dict(self) -> dict[str, Any]:
        return {} if self.twin is None else {"twin": self.twin.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.twin is not None:
            self.twin.load_state_dict(state["twin"])
