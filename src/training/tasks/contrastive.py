"""Contrastive pre-training on image-text pairs."""
from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial

import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from open_clip_elip.profile.flops import count, on_meta
from open_clip_elip.text import COMPILED_MULTIPLE, COMPILED_PARTS, MAX_PARTS, TextParts, count_columns, cut_text
from open_clip_elip.tower import ImageTower

from ..distributed import Ranks
from ..errors import UserError
from ..evaluation.suite import Suite
from ..options.main import PretrainingOptions
from .base import Batch, Cost, Engine, Progress, Task


class ContrastiveTask(Task):
    """Contrastive pre-training: InfoNCE (`ClipLoss`), or pairwise sigmoids with `--siglip`. `model` is the bare one."""

    SHARED = ("logit_scale", "logit_bias", "dist_logit_scale")  # features of the model, not of a sample

    def __init__(
        self,
        options: PretrainingOptions,
        ranks: Ranks,
        model: nn.Module,
        suite: Suite | None = None,
        teacher: nn.Module | None = None,
    ):
        self.options, self.ranks, self.model, self.suite, self.teacher = options, ranks, model, suite, teacher
        self.tower: ImageTower | None = getattr(model, "tower", None)
        if options.full_tokens_last is not None and getattr(self.tower, "reduction", None) is None:
            raise UserError(f"--full-tokens-last needs a model with token reduction; {options.model} has none.")
        if options.trains and options.batch_size * options.accum_freq * ranks.world_size == 1:
            raise UserError("A step of one pair has no contrast, so it teaches nothing: raise --batch-size.")
        if ranks.world_size > 1 and options.local_loss and not (options.gather_with_grad or options.siglip):
            raise UserError("--no-gather-with-grad loses a part of the gradient: add --no-local-loss, or leave it out.")
        self.shapes, self.costs = on_meta(model) if isinstance(model.visual, VisionTransformer) else None, {}
        place = {"rank": ranks.rank, "world_size": ranks.world_size}
        if options.siglip:
            self.loss = SigLipLoss(**place, dist_impl=options.loss_dist_impl)
        else:
            kind = ClipLoss if teacher is None else DistillClipLoss
            across = {"local_loss": options.local_loss, "gather_with_grad": options.gather_with_grad}
            self.loss = kind(**place, **across, cache_labels=True)

    # ------------------------------------------------------------------ a step

    def prepare(self, batch: Batch) -> Batch:
        """Captions cut behind their ends; the same batch if the text tower does not allow it."""
        if self.teacher is not None:  # it gets the same captions, and may need all of them
            return batch
        parts, multiple = (COMPILED_PARTS, COMPILED_MULTIPLE) if self.options.torchcompile else (MAX_PARTS, 1)
        return batch | {"text": cut_text(batch["text"], self.model, parts, multiple)}

    def losses(self, model: nn.Module, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return self.compare(self.features(model, batch))

    def features(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        features = model(batch["image"], batch["text"])
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(batch["image"], batch["text"])
            features |= {f"dist_{k}": v for k, v in taught.items() if k != "logit_bias"}
        return features

    def compare(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = self.loss(**features, output_dict=True)
        return losses | {"loss": sum(losses.values())}

    def gradients(self, window: list[Batch], engine: Engine, progress: Progress) -> dict[str, Tensor]:
        """Those of the loss over the whole window, as if it were one batch, at the memory of one micro-batch.

        GradCache (Gao et al. 2021): features of all micro-batches without gradient; the loss over all of them, for the
        gradient of each feature; a second pass, which carries those into the parameters. Exact, the logit scale's too.
        """
        if self.options.full_tokens_last is not None:
            plan = progress.plan
            reduced = plan.total_samples - plan.steps_of(self.options.full_tokens_last) * plan.reference_batch
            self.tower.reduces = progress.samples < reduced
            if reduced <= 0 and not progress.steps:
                logging.warning("--full-tokens-last is as long as the run, so no token is ever removed.")
        if len(window) == 1:
            return super().gradients(window, engine, progress)
        random_states, parts = [], []
        for batch in window:
            random_states.append(engine.random_state())
            with torch.no_grad(), engine.autocast():
                parts.append(self.features(engine.model, batch))
        leaves = {}
        for name, value in parts[0].items():
            value = value if name in self.SHARED else torch.cat([part[name] for part in parts])
            leaves[name] = value.detach().requires_grad_()
        with engine.autocast():
            losses = self.compare(leaves)
        engine.backward(losses["loss"])

        after, sizes = engine.random_state(), [len(batch["image"]) for batch in window]
        for i, (batch, random_state) in enumerate(zip(window, random_states, strict=True)):
            last = i == len(window) - 1
            engine.restore_random_state(random_state)
            with engine.synchronized(last):
                with engine.autocast():
                    features = self.features(engine.model, batch)
                outputs, gradients = [], []
                for name, value in features.items():
                    gradient, shared = leaves[name].grad, name in self.SHARED
                    if gradient is not None and value.requires_grad and (last or not shared):
                        outputs.append(value)
                        gradients.append(gradient if shared else gradient.split(sizes)[i])
                torch.autograd.backward(outputs, gradients)
        engine.restore_random_state(after)
        return losses

    @torch.no_grad()
    def after_step(self, model: nn.Module, applied: Callable[[], bool]) -> None:
        model.logit_scale.clamp_(0, math.log(100))  # as in the CLIP paper

    # ------------------------------------------------------------------ figures

    def log(self, model: nn.Module) -> dict[str, float]:
        rrt = 0.0 if self.tower is None else self.tower.rrt()
        return {"logit_scale": model.logit_scale.detach().exp().mean().item(), "rrt": rrt}

    def cost(self, batch: Batch) -> Cost | None:
        """The mean of the batch's pairs, on the model's shapes: the image counted once, a caption for each length."""
        if self.shapes is None:
            return None
        text, pairs, shapes = batch["text"], len(batch["image"]), self.shapes.train()
        shapes.tower.reduces = reduces = self.tower.reduces
        parts = text.parts if isinstance(text, TextParts) else (text,)
        captions = 0
        try:
            for part in parts:
                one, key = part[:1].to("meta"), (part.shape[1], part is text)
                if part is not text:
                    one = TextParts((one,), torch.zeros(1, dtype=torch.int64, device="meta"))
                if key not in self.costs:
                    self.costs[key] = count(shapes, partial(shapes.encode_text, one)).total
                if reduces not in self.costs:  # of an image, scoring included
                    pair = count(shapes, partial(shapes, batch["image"][:1].to("meta"), one)).total
                    self.costs[reduces] = pair - self.costs[key]
                captions += len(part) * self.costs[key]
        except (NotImplementedError, RuntimeError):  # a tower that looks at numbers
            self.shapes = None
            return None
        return Cost(self.costs[reduces] + captions / pairs, self.tower.num_patches() + count_columns(text) / pairs)

    def evaluate(self, model: nn.Module, epoch: int, last: bool) -> dict[str, float]:
        return {} if self.suite is None else self.suite(model, epoch, last)

    def score(self, metrics: dict[str, float]) -> float | None:
        return Suite.score(metrics)
