"""Contrastive pre-training on image-text pairs: its options, its loss, its evaluation."""
from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
from open_clip import AugmentationCfg
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from open_clip_elip.profile.flops import count, on_meta
from open_clip_elip.text import COMPILED_MULTIPLE, COMPILED_PARTS, MAX_PARTS, TextParts, count_columns, cut_text
from open_clip_elip.tower import ImageTower

from ..data import ValData
from ..data.sets.labelled import LabelledImages
from ..distributed import Ranks
from ..errors import UserError
from ..evaluation.pairs import evaluate_pairs
from ..evaluation.prompts import run_zero_shot_suite
from ..options import TrainingOptions
from ..options.data import PairOptions
from ..options.kinds import COUNT, POSITIVE_COUNT, one_of
from ..options.model import ImageOptions, LockingOptions, ModelOptions, TokenReductionOptions, forbid_coca
from ..options.parser import Section, forbid, option
from ..options.run import DURATION
from .base import Batch, Cost, Engine, Progress, Task, is_due

_COCA = "belongs to CoCa models, which this trainer does not train: leave it out"


@dataclass
class ContrastiveOptions(Section, title="loss"):
    siglip: bool = option(False, "Train with SigLIP's pairwise sigmoid loss.")
    loss_dist_impl: str | None = option(
        None, "How SigLIP's loss exchanges features between processes. Without it: bidir.",
        one_of("bidir", "shift", "reduce", "gather"), needs="siglip")
    local_loss: bool = option(
        True, "Compute only this process's rows of the similarity matrix: the same loss for less memory. Belongs "
        "together with --gather-with-grad; turn both off, or neither.", needs="!siglip")
    gather_with_grad: bool = option(True, "Let gradients flow through features of other processes.", needs="!siglip")
    distill_model: str | None = option(
        None, "Teacher model for distillation; needs --distill-pretrained.", metavar="NAME")
    distill_pretrained: str | None = option(
        None, "Weights of the teacher: a tag or a file.", metavar="TAG|FILE", path=True)
    full_tokens_last: int | str | None = option(
        None, "Train with all tokens in the last part of the run (FLIP's unmasked tuning): steps, or with a unit: 1ep, "
        "10%.", DURATION, needs="trains")
    gone = dict.fromkeys(("coca_caption_loss_weight", "coca_contrastive_loss_weight"), _COCA)

    def check(self) -> None:
        forbid_coca("--distill-model", self.distill_model)
        distills, accumulates = self.distill_model is not None, self.accum_freq > 1
        both = "--distill-model and --distill-pretrained belong together: give both, or neither."
        forbid(distills != (self.distill_pretrained is not None), both)
        forbid(distills and accumulates, "--distill-model cannot be used with --accum-freq: leave one out.")
        forbid(distills and self.siglip, "--distill-model needs the softmax loss: leave out --siglip.")


@dataclass
class ValidationOptions(Section, title="evaluation"):
    val_data: str | None = option(
        None, "Image-caption pairs, in the formats of --train-data, for the validation loss and retrieval.",
        metavar="SHARDS|FILE.csv", path=True, joined="::", needs="val_frequency")
    val_num_samples: int | None = option(
        None, "Samples in --val-data, where that is not noted beside its shards.", POSITIVE_COUNT, needs="val_data")
    val_frequency: int = option(1, "Validate every N epochs and after the last; 0: never.", COUNT, needs="val_data")
    zeroshot_data: str | None = option(
        None, "Labelled images for zero-shot classification: shards, or a folder with one sub-folder of images a "
        "class; with a classnames.txt beside them.", metavar="DIR", path=True, needs="zeroshot_frequency")
    imagenet_val: str | None = option(
        None, "ImageNet's validation images (a folder with one sub-folder a class).", metavar="DIR", path=True,
        needs="zeroshot_frequency")
    imagenet_v2: str | None = option(
        None, "ImageNet-V2: one folder a class, named 0 to 999.", metavar="DIR", path=True, needs="zeroshot_frequency")
    zeroshot_frequency: int = option(
        2, "Classify zero-shot every N epochs and after the last; 0: never.", COUNT,
        needs="zeroshot_data|imagenet_val|imagenet_v2")


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
        data = "--train-data to train, or --val-data, --zeroshot-data or --imagenet-val to evaluate"
        forbid(not (self.trains or evaluates), f"There is nothing to do: give {data}.")
        known = [field.name for field in fields(AugmentationCfg)]
        for key in self.aug_cfg:
            forbid(key not in known, f"--aug-cfg has no setting {key!r}: it knows {', '.join(known)}.")


class ContrastiveTask(Task):
    """Contrastive pre-training: InfoNCE (`ClipLoss`), or pairwise sigmoids with `--siglip`.

    `model` is the bare one; `zero_shot_data` are images to classify, by the prefix of their metrics.
    """

    SHARED = ("logit_scale", "logit_bias", "dist_logit_scale")  # features of the model, not of a sample

    def __init__(
        self,
        options: PretrainingOptions,
        ranks: Ranks,
        model: nn.Module,
        tokenizer: Callable,
        transform: Callable,
        val_data: ValData | None = None,
        zero_shot_data: dict[str, LabelledImages] | None = None,
        teacher: nn.Module | None = None,
    ):
        self.options, self.ranks, self.model, self.teacher = options, ranks, model, teacher
        self.tower: ImageTower | None = getattr(model, "tower", None)
        if options.full_tokens_last is not None and getattr(self.tower, "reduction", None) is None:
            raise UserError(f"--full-tokens-last needs a model with token reduction; {options.model} has none.")
        if options.trains and options.batch_size * options.accum_freq * ranks.world_size == 1:
            raise UserError("A step of one pair has no contrast, so it teaches nothing: raise --batch-size.")
        if ranks.world_size > 1 and options.local_loss and not (options.gather_with_grad or options.siglip):
            raise UserError("--no-gather-with-grad loses a part of the gradient: add --no-local-loss, or leave it out.")
        if val_data is not None and options.batch_size == 1 and not options.siglip:
            logging.warning("clip_val_loss is that of batches of --batch-size 1, which have no contrast: it is 0.")
        self.tokenizer, self.transform = tokenizer, transform
        self.val_data, self.zero_shot_data = val_data, zero_shot_data
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
    def after_step(self, model: nn.Module, applied: bool) -> None:
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
        options, metrics = self.options, {}
        if self.val_data is not None and is_due(epoch, options.val_frequency, last):
            metrics |= evaluate_pairs(model, self.val_data, options, self.ranks)
        if self.zero_shot_data and is_due(epoch, options.zeroshot_frequency, last):
            metrics |= run_zero_shot_suite(
                model, self.tokenizer, self.transform, options, ranks=self.ranks, data=self.zero_shot_data
            )
        return metrics

    def score(self, metrics: dict[str, float]) -> float | None:
        """Zero-shot top-1 (ImageNet's first), else the mean R@1 of the two directions."""
        retrieval = ("image_to_text_R@1", "text_to_image_R@1")
        for names in (("imagenet-zeroshot-val-top1",), ("zeroshot-val-top1",), retrieval):
            if metrics.keys() >= set(names):
                return sum(metrics[name] for name in names) / len(names)
        return None
