"""One training step of one model on one batch that is on the device already: forward, loss, backward, optimizer."""
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from open_clip.loss import ClipLoss, CoCaLoss, SigLipLoss
from open_clip_train.precision import get_autocast
from torch import Tensor, nn

from ..text import TextParts


class TrainStep:
    """Calling it makes a step.

    Args:
        model: in training mode.
        image: (B, 3, H, W), in the precision's input type.
        text: token ids (B, T), or cut ones.
        precision: one of OpenCLIP's names.
        compile: run the model compiled.
    """

    def __init__(
        self, model: nn.Module, image: Tensor, text: Tensor | TextParts, precision: str = "fp32", compile: bool = False
    ):
        self.model, self.image, self.text = model, image, text
        self.runnable = torch.compile(model) if compile else model
        if hasattr(model, "text_decoder"):
            self.loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        else:
            self.loss = ClipLoss() if getattr(model, "logit_bias", None) is None else SigLipLoss()
        self.autocast = get_autocast(precision, device_type=image.device.type)
        self.scaler = torch.amp.GradScaler(image.device.type, enabled=precision == "amp")
        # A learning rate so small that weights at random and noise for images stay finite.
        options = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1, "fused": image.device.type in ("cpu", "cuda")}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, **options)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = sum(self.loss(**self.runnable(self.image, self.text), output_dict=True).values())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))

    @contextmanager
    def not_compiled(self) -> Iterator[None]:
        """Within it, steps run the model as it is."""
        runnable, self.runnable = self.runnable, self.model
        try:
            yield
        finally:
            self.runnable = runnable

    def inputs(self) -> list[Tensor]:
        return [self.image, *(([*self.text.parts, self.text.place]) if isinstance(self.text, TextParts) else [self.text])]
