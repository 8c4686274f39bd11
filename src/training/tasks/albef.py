"""ALBEF's pre-training: alignment and masked language modelling."""
from __future__ import annotations

import torch
from torch import Tensor

from open_clip_elip.fusion.albef import Albef
from open_clip_elip.fusion.objectives import mask_tokens
from open_clip_elip.fusion.steps import albef_losses

from .alignment import AlignmentTask
from .base import Batch


class AlbefPretraining(AlignmentTask):
    """ITA + ITM + MLM, see `steps.albef_losses`."""

    FIELDS = ("masked", "chosen", "labels", "tokens")

    def step(self, model: Albef, image: Tensor, text: Tensor, **more) -> dict[str, Tensor]:
        taught = self.taught(image, text, **{name: more.get(name) for name in ("tokens", "masked", "chosen")})
        losses = albef_losses(model, taught, self.queues, image, text, floor=self.floor, **more)
        return {"loss": sum(losses.values()), **losses}

    def prepare(self, batch: Batch) -> Batch:
        batch = super().prepare(batch)
        pieces = self.tokenizer.pieces
        fixed = torch.tensor([pieces.pad_token_id, pieces.cls_token_id])
        size = self.model.text.config.vocab_size
        masked, chosen, labels = mask_tokens(batch["text"], pieces.mask_token_id, size, fixed)
        return batch | {"masked": masked, "chosen": chosen, "labels": labels}
