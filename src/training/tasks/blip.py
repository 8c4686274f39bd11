"""BLIP's pre-training: alignment and language modelling."""
from __future__ import annotations

from typing import Any

from torch import Tensor

from open_clip_elip.fusion.blip import Blip
from open_clip_elip.fusion.objectives import places_to_write
from open_clip_elip.fusion.steps import blip_losses

from .alignment import AlignmentTask
from .base import Batch

FLOOR = 1e-4  # beneath the weights by which negatives are drawn


class BlipPretraining(AlignmentTask):
    """ITC + ITM + LM, see `steps.blip_losses`."""

    FIELDS = ("chosen", "tokens")

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, floor=FLOOR, ramp=2, **kwargs)

    def step(self, model: Blip, image: Tensor, text: Tensor, **more) -> dict[str, Tensor]:
        taught = self.taught(image, text, tokens=more.get("tokens"))
        losses = blip_losses(model, taught, self.queues, image, text, floor=self.floor, **more)
        return {"loss": sum(losses.values()), **losses}

    def prepare(self, batch: Batch) -> Batch:
        batch = super().prepare(batch)
        return batch | {"chosen": places_to_write(self.model.mask(batch["text"]))}
