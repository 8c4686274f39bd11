"""What is learnt: a task turns batches into losses. The trainer knows only this interface; CLIP is the first task."""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn

from open_clip_elip.text import COMPILED_MULTIPLE, COMPILED_PARTS, MAX_PARTS, count_columns, cut_text

from ..data import ValData
from ..distributed import Ranks
from ..evaluation.pairs import evaluate_pairs
from ..data.sets.labelled import LabelledImages
from ..zero_shot import run_zero_shot_suite

Batch = dict[str, Any]


class Task(Protocol):
    """A training objective.

    The step is cut in two so that a window of several micro-batches can be one batch to the loss: `features` runs the
    model on one micro-batch, `losses` compares the features of the whole window.

    Attributes:
        shared: names of features that belong to the model, not to a sample (scalars such as the logit scale);
            all others are (B, ...) and are concatenated over a window.
    """

    shared: tuple[str, ...]

    def prepare(self, model: nn.Module, batch: Batch) -> Batch:
        """What can be decided from a batch on the CPU, before it goes to the device."""
        ...

    def features(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]: ...

    def losses(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars to log; `loss` is the one to minimise."""
        ...

    def after_step(self, model: nn.Module) -> None:
        """Constraints on parameters, after each optimizer step."""
        ...

    def log(self, model: nn.Module) -> dict[str, float]:
        """More columns for the log."""
        ...

    def evaluate(self, model: nn.Module, epoch: int, last: bool) -> dict[str, float]:
        """What is due at the end of `epoch` (1-based), on all ranks; {} if nothing is."""
        ...

    def score(self, metrics: dict[str, float]) -> float | None:
        """What makes one checkpoint better than another, from what `evaluate` returned; None if it cannot tell."""
        ...


class ClipTask:
    """Contrastive pre-training: InfoNCE (`ClipLoss`), or pairwise sigmoids with `--siglip`.

    Args:
        args: the run's flags.
        ranks: this process.
        tokenizer, preprocess: for zero-shot evaluation.
        val_data: pairs to evaluate on, or None.
        zero_shot_data: labelled images to classify, by metric prefix (`load_zero_shot_data`).
        teacher: a frozen model to distil from, or None.
    """

    shared = ("logit_scale", "logit_bias", "dist_logit_scale")

    def __init__(
        self,
        args: argparse.Namespace,
        ranks: Ranks,
        tokenizer: Callable,
        preprocess: Callable,
        val_data: ValData | None = None,
        zero_shot_data: dict[str, LabelledImages] | None = None,
        teacher: nn.Module | None = None,
    ):
        self.args, self.ranks, self.teacher = args, ranks, teacher
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.val_data, self.zero_shot_data = val_data, zero_shot_data
        if args.siglip:
            self.loss = SigLipLoss(rank=ranks.rank, world_size=ranks.world_size, dist_impl=args.loss_dist_impl)
        else:
            loss = ClipLoss if teacher is None else DistillClipLoss
            self.loss = loss(
                local_loss=args.local_loss,
                gather_with_grad=args.gather_with_grad,
                cache_labels=True,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )

    def prepare(self, model: nn.Module, batch: Batch) -> Batch:
        """Captions cut behind their ends; the same batch if the text tower does not allow it."""
        if self.teacher is not None:  # it gets the same captions, and may need all of them
            return batch
        compiled = self.args.torchcompile
        parts, multiple = (COMPILED_PARTS, COMPILED_MULTIPLE) if compiled else (MAX_PARTS, 1)
        text = cut_text(batch["text"], model, parts, multiple)
        return batch | {"text": text, "text_columns": count_columns(text) / len(batch["text"])}

    def features(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        features = model(batch["image"], batch["text"])
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(batch["image"], batch["text"])
            features |= {f"dist_{k}": v for k, v in taught.items() if k != "logit_bias"}
        return features

    def losses(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = self.loss(**features, output_dict=True)
        return losses | {"loss": sum(losses.values())}

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        model.logit_scale.clamp_(0, math.log(100))  # as in the CLIP paper

    def log(self, model: nn.Module) -> dict[str, float]:
        return {"logit_scale": model.logit_scale.detach().exp().mean().item(), "rrt": training_rrt(model)}

    def evaluate(self, model: nn.Module, epoch: int, last: bool) -> dict[str, float]:
        args, metrics = self.args, {}
        if self.val_data is not None and is_due(epoch, args.val_frequency, last):
            metrics |= evaluate_pairs(
                model,
                self.val_data,
                device=self.ranks.device,
                precision=args.precision,
                batch_size=args.batch_size,
                siglip=args.siglip,
                world_size=self.ranks.world_size,
            )
        if self.zero_shot_data and is_due(epoch, args.zeroshot_frequency, last):
            metrics |= run_zero_shot_suite(
                model,
                self.tokenizer,
                self.preprocess,
                args,
                ranks=self.ranks,
                data=self.zero_shot_data,
            )
        return metrics

    def score(self, metrics: dict[str, float]) -> float | None:
        """Zero-shot top-1 (ImageNet's first), else the mean R@1 of the two directions."""
        retrieval = ("image_to_text_R@1", "text_to_image_R@1")
        for names in (("imagenet-zeroshot-val-top1",), ("zeroshot-val-top1",), retrieval):
            if all(name in metrics for name in names):
                return sum(metrics[name] for name in names) / len(names)
        return None


def training_rrt(model: nn.Module) -> float:
    """Ratio of removed tokens in training; 0 for a plain model."""
    return model.tower.rrt() if hasattr(model, "tower") else 0.0


def is_due(epoch: int, frequency: int, last: bool) -> bool:
    """Whether what comes every `frequency` epochs, and after the last, comes after this one; 0: never."""
    return frequency > 0 and (last or epoch % frequency == 0)
