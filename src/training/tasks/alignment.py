"""Aligning image and text: contrast against queues (ITA), and matching with hard negatives (ITM).

The task of fine-tuning for retrieval, and the part of pre-training that ALBEF and BLIP have in common.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from open_clip_elip.fusion.base import AligningModel
from open_clip_elip.fusion.bert import Tokens
from open_clip_elip.fusion.momentum import Queue, twin_of
from open_clip_elip.fusion.objectives import FLOOR
from open_clip_elip.fusion.steps import Taught, align, teach
from open_clip_elip.profile.flops import on_meta

from ..options.parser import forbid
from .base import Batch, Progress
from .counted import CountedTask

NO_IMAGE = -100  # the number of an image in a queue's random start


def check_step(options: Any, world_size: int) -> None:
    """UserError for a batch without negatives, or queues that do not hold a step."""
    step = options.batch_size * options.accum_freq * world_size
    lone = "A batch of one pair has no negatives to match with: raise --batch-size."
    forbid(options.trains and options.batch_size == 1, lone)
    short = f"--queue-size {options.queue_size} does not hold the {step} pairs of a step; raise it."
    forbid(options.trains and step > options.queue_size, short)


class AlignmentTask(CountedTask):
    """ITA + ITM.

    Args:
        queue_size: features of the twin that contrast remembers.
        floor: see `objectives.negative_weights`.
        gather: rows of all processes in the order of their ranks; None: there is one process.
        everywhere: see `steps.align`.
        tokenizer: that makes the batches' texts.
        others: see `DistilledTask`; there is a twin in any case.
    """

    FIELDS: tuple[str, ...] = ("numbers", "tokens")  # of a batch, beside image and text

    def __init__(
        self, model: AligningModel, *, queue_size: int, floor: float = FLOOR,
        gather: Callable[[Tensor], Tensor] | None = None, tokenizer: Callable | None = None,
        everywhere: Callable[[Tensor], Tensor] | None = None, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(model, **kwargs)
        if self.twin is None:  # its features are what is contrasted with
            self.twin = twin_of(model).train(kwargs.get("dropout", True))
        self.floor, self.tokenizer, self.everywhere = floor, tokenizer, everywhere
        width = model.vision_proj.out_features
        queues = {name: Queue(width, queue_size, seed) for seed, name in enumerate(("image", "text"))}
        self.queues = nn.ModuleDict(queues).to(model.temp.device)
        self.numbers = torch.full((queue_size,), NO_IMAGE)
        self.gather = gather or (lambda rows: rows)
        self.pending: list[tuple[Tensor, ...]] = []

    def begin(self) -> None:
        super().begin()
        self.pending = []

    def prepare(self, batch: Batch) -> Batch:
        """Captions are cut at the longest one's end, and layers run on no padding."""
        text = batch["text"][:, : int((batch["text"] != self.model.pad).sum(dim=1).max())]
        return batch | {"text": text, "tokens": self.model.tokens_in(text)}

    def losses(self, model: nn.Module, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        more = {name: batch[name] for name in self.FIELDS}
        return model(batch["image"], batch["text"], self.step, alpha=self.weight(progress), **more)

    def step(
        self, model: AligningModel, image: Tensor, text: Tensor, *, numbers: Tensor | None = None,
        tokens: Tokens | None = None, **more,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Losses of B pairs; arguments as `steps.align`."""
        taught = self.taught(image, text, numbers, tokens=tokens)
        more |= {"numbers": numbers, "remembered": self.numbers, "tokens": tokens, "floor": self.floor}
        more |= {"everywhere": self.everywhere}
        losses = align(model, taught, self.queues, image, text, **more).losses
        return {"loss": losses["ita"] + losses["itm"], **losses}

    def taught(self, image: Tensor, text: Tensor, numbers: Tensor | None = None, **more) -> Taught:
        """See `steps.teach`. What is to be remembered after the step is kept."""
        taught = teach(self.twin, image, text, **more)
        self.pending.append((taught.image, taught.text, *([] if numbers is None else [numbers])))
        return taught

    @torch.no_grad()
    def after_step(self, model: nn.Module, applied: Callable[[], bool]) -> None:
        if not applied():
            return
        images, texts, *numbers = (self.gather(torch.cat(rows)) for rows in zip(*self.pending, strict=True))
        if numbers:
            self.numbers[self.queues["image"].places(len(images)).cpu()] = numbers[0].cpu()
        self.queues["image"].put(images)
        self.queues["text"].put(texts)

    def log(self, model: nn.Module) -> dict[str, float]:
        return {"logit_scale": 1 / model.temp.item(), "rrt": model.tower.rrt()}

    def on_meta(self) -> AlignmentTask:
        shapes = super().on_meta()
        shapes.twin, shapes.queues = on_meta(self.twin), on_meta(self.queues)
        shapes.twin.tower.compiles = False
        shapes.pending, shapes.everywhere = [], None  # negatives from elsewhere cost little more
        return shapes

    def loss_of(self, batch: Batch) -> Tensor:
        """Each text is a negative once."""
        more = {name: batch[name] for name in self.FIELDS} | {"alpha": 0.5, "negatives": [torch.tensor([1, 0])] * 2}
        return self.step(self.model, batch["image"], batch["text"], **more)["loss"]

    def take_over(self, twin: dict[str, Tensor], queues: dict[str, Tensor]) -> dict[str, str]:
        left, own = super().take_over(twin, queues), self.queues.state_dict()
        if queues.keys() == own.keys():
            if any(queues[name].shape != value.shape for name, value in own.items()):
                size = queues["image.columns"].shape[1]
                return left | {"queues": f"of {size} features, --queue-size is {self.queues['image'].size}"}
            self.queues.load_state_dict(queues)
            del left["queues"]
        return left

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"queues": self.queues.state_dict(), "numbers": self.numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.queues.load_state_dict(state["queues"])
        self.numbers.copy_(state["numbers"])
