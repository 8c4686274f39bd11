"""What is learnt: a task turns batches into losses. The trainer knows only this interface; CLIP is the first task."""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from open_clip import AugmentationCfg
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn

from open_clip_elip.text import COMPILED_MULTIPLE, COMPILED_PARTS, MAX_PARTS, count_columns, cut_text

from ..data import ValData
from ..distributed import Ranks
from ..evaluation.pairs import evaluate_pairs
from ..data.sets.labelled import LabelledImages
from ..options import TrainingOptions
from ..options.data import PairOptions
from ..options.model import ImageOptions, LockingOptions, ModelOptions, TokenReductionOptions, forbid_coca
from ..options.parser import COUNT, POSITIVE_COUNT, Section, forbid, one_of, option
from ..options.run import DURATION
from ..zero_shot import run_zero_shot_suite

Batch = dict[str, Any]
_COCA = "belongs to CoCa models, which this trainer does not train: leave it out"


@dataclass
class ContrastiveOptions(Section, title="loss"):
    siglip: bool = option(False, "Train with SigLIP's pairwise sigmoid loss.")
    loss_dist_impl: str | None = option(
        None, "How SigLIP's loss exchanges features between processes. Without it: bidir.",
        one_of("bidir", "shift", "reduce", "gather"))
    local_loss: bool = option(
        True, "Compute only this process's rows of the similarity matrix: the same loss for less memory. Belongs "
        "together with --gather-with-grad; turn both off, or neither.")
    gather_with_grad: bool = option(True, "Let gradients flow through features of other processes.")
    distill_model: str | None = option(
        None, "Teacher model for distillation; needs --distill-pretrained.", metavar="NAME")
    distill_pretrained: str | None = option(
        None, "Weights of the teacher: a tag or a file.", metavar="TAG|FILE", path=True)
    full_tokens_last: int | str | None = option(
        None, "Train with all tokens in the last part of the run (FLIP's unmasked tuning): steps, or with a unit: 1ep, "
        "10%.", DURATION)
    gone = dict.fromkeys(("coca_caption_loss_weight", "coca_contrastive_loss_weight"), _COCA)

    def check(self) -> None:
        forbid_coca("--distill-model", self.distill_model)
        distills = self.distill_model is not None
        both = "--distill-model and --distill-pretrained belong together: give both, or neither."
        forbid(distills != (self.distill_pretrained is not None), both)
        wrong = distills and self.accum_freq > 1
        forbid(wrong, "--distill-model cannot be used with --accum-freq: leave one out.")
        forbid(distills and self.siglip, "--distill-model needs the softmax loss: leave out --siglip.")
        nothing = self.full_tokens_last is not None and (self.token_reduction or {}).get("method") == "none"
        forbid(nothing, "--full-tokens-last has nothing to end with --token-reduction none: leave one out.")


@dataclass
class ValidationOptions(Section, title="evaluation"):
    val_data: str | None = option(
        None, "Image-caption pairs, in the formats of --train-data, for the validation loss and retrieval.",
        metavar="SHARDS|FILE.csv", path=True, joined="::")
    val_num_samples: int | None = option(
        None, "Samples in --val-data, where that is not noted beside its shards.", POSITIVE_COUNT)
    val_frequency: int = option(1, "Validate every N epochs and after the last; 0: never.", COUNT)
    zeroshot_data: str | None = option(
        None, "Labelled images for zero-shot classification: shards, or a folder with one sub-folder of images a "
        "class; with a classnames.txt beside them.", metavar="DIR", path=True)
    imagenet_val: str | None = option(
        None, "ImageNet's validation images (a folder with one sub-folder a class).", metavar="DIR", path=True)
    imagenet_v2: str | None = option(
        None, "ImageNet-V2: one folder a class, named 0 to 999.", metavar="DIR", path=True)
    zeroshot_frequency: int = option(2, "Classify zero-shot every N epochs and after the last; 0: never.", COUNT)


@dataclass
class PretrainingOptions(
    PairOptions, ValidationOptions, ModelOptions, LockingOptions, TokenReductionOptions, ImageOptions,
    ContrastiveOptions, TrainingOptions,
    command="training.main",
):  # fmt: skip
    @property
    def trains(self) -> bool:
        return bool(self.train_data) or self.dataset_type == "synthetic"

    def check(self) -> None:
        evaluates = any((self.val_data, self.zeroshot_data, self.imagenet_val, self.imagenet_v2))
        forbid(
            not (self.trains or evaluates),
            "There is nothing to do: give --train-data to train, or --val-data, --zeroshot-data or --imagenet-val to "
            "evaluate.",
        )
        known = [field.name for field in fields(AugmentationCfg)]
        for key in self.aug_cfg:
            forbid(key not in known, f"--aug-cfg has no setting {key!r}: it knows {', '.join(known)}.")


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
    return model.rrt() if hasattr(model, "rrt") else 0.0


def is_due(epoch: int, frequency: int, last: bool) -> bool:
    """Whether what comes every `frequency` epochs, and after the last, comes after this one; 0: never."""
    return frequency > 0 and (last or epoch % frequency == 0)
