"""Contrastive pre-training on image-text pairs: its options, its loss, its evaluation."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

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
from ..options.model import ImageOptions, LockingOptions, ModelOptions, TokenReductionOptions, forbid_coca
from ..options.parser import COUNT, POSITIVE_COUNT, Section, forbid, one_of, option
from ..options.run import DURATION
from .base import Batch, Cost, Engine, Progress, Task, is_due

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


class ContrastiveTask(Task):
    """Contrastive pre-training: InfoNCE (`ClipLoss`), or pairwise sigmoids with `--siglip`.

    Args:
        options: of the run.
        ranks: this process.
        model: the bare model.
        tokenizer, transform: for zero-shot evaluation.
        val_data: pairs to evaluate on, or None.
        zero_shot_data: labelled images to classify, by metric prefix (`load_zero_shot_data`).
        teacher: a frozen model to distil from, or None.
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
        self.tokenizer, self.transform = tokenizer, transform
        self.val_data, self.zero_shot_data = val_data, zero_shot_data
        self.shapes, self.costs = on_meta(model) if isinstance(model.visual, VisionTransformer) else None, {}
        if options.siglip:
            self.loss = SigLipLoss(rank=ranks.rank, world_size=ranks.world_size, dist_impl=options.loss_dist_impl)
        else:
            loss = ClipLoss if teacher is None else DistillClipLoss
            self.loss = loss(
                local_loss=options.local_loss,
                gather_with_grad=options.gather_with_grad,
                cache_labels=True,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )

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

        The features of all micro-batches are computed without gradient; the loss over all of them gives the gradient of
        each feature; a second pass carries those into the parameters (GradCache, Gao et al. 2021). Exact, also for the
        parameters the loss sees directly, such as the logit scale.
        """
        self.use_tokens(progress)
        if len(window) == 1:
            return super().gradients(window, engine, progress)
        random_states, parts = [], []
        for batch in window:
            random_states.append(engine.random_state())
            with torch.no_grad(), engine.autocast():
                parts.append(self.features(engine.model, batch))
        shared = [name for name in parts[0] if name in self.SHARED]
        leaves = {
            name: (parts[0][name] if name in shared else torch.cat([p[name] for p in parts])).detach().requires_grad_()
            for name in parts[0]
        }
        with engine.autocast():
            losses = self.compare(leaves)
        engine.backward(losses["loss"])

        after, start = engine.random_state(), 0
        for i, (batch, random_state) in enumerate(zip(window, random_states, strict=True)):
            last = i == len(window) - 1
            engine.restore_random_state(random_state)
            with engine.synchronized(last):
                with engine.autocast():
                    features = self.features(engine.model, batch)
                outputs, gradients = [], []
                for name, value in features.items():
                    gradient = leaves[name].grad
                    if gradient is None or not value.requires_grad or (name in shared and not last):
                        continue
                    outputs.append(value)
                    gradients.append(gradient if name in shared else gradient[start : start + len(value)])
                torch.autograd.backward(outputs, gradients)
            start += len(batch["image"])
        engine.restore_random_state(after)
        return losses

    def use_tokens(self, progress: Progress) -> None:
        """All of them in the last part of the run, if `--full-tokens-last` says so (FLIP's unmasked tuning)."""
        if self.options.full_tokens_last is not None:
            plan = progress.plan
            reduced = plan.total_samples - plan.steps_of(self.options.full_tokens_last) * plan.reference_batch
            self.tower.reduces = progress.samples < reduced

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
        text, pairs = batch["text"], len(batch["image"])
        parts = text.parts if isinstance(text, TextParts) else (text,)
        try:
            captions = sum(len(part) * self.count_caption(part, text is not part) for part in parts) / pairs
            operations = self.count_image(batch["image"], parts[0], text is not parts[0]) + captions
        except (NotImplementedError, RuntimeError):  # a tower that looks at numbers
            self.shapes = None
            return None
        return Cost(operations, self.tower.num_patches() + count_columns(text) / pairs)

    def count_caption(self, text: Tensor, is_cut: bool) -> int:
        """Operations of one caption of that length."""
        key = (text.shape[1], is_cut)
        if key not in self.costs:
            self.costs[key] = count(self.shapes.train(), lambda: self.shapes.encode_text(_one(text, is_cut))).total
        return self.costs[key]

    def count_image(self, image: Tensor, text: Tensor, is_cut: bool) -> int:
        """Operations of one image, scoring included: those of a pair, less its caption's."""
        self.shapes.tower.reduces = key = self.tower.reduces
        if key not in self.costs:
            one = image[:1].to("meta")
            pair = count(self.shapes.train(), lambda: self.shapes(one, _one(text, is_cut)))
            self.costs[key] = pair.total - self.count_caption(text, is_cut)
        return self.costs[key]

    def evaluate(self, model: nn.Module, epoch: int, last: bool) -> dict[str, float]:
        options, metrics = self.options, {}
        if self.val_data is not None and is_due(epoch, options.val_frequency, last):
            metrics |= evaluate_pairs(
                model,
                self.val_data,
                device=self.ranks.device,
                precision=options.precision,
                batch_size=options.batch_size,
                siglip=options.siglip,
                world_size=self.ranks.world_size,
            )
        if self.zero_shot_data and is_due(epoch, options.zeroshot_frequency, last):
            metrics |= run_zero_shot_suite(
                model, self.tokenizer, self.transform, options, ranks=self.ranks, data=self.zero_shot_data
            )
        return metrics

    def score(self, metrics: dict[str, float]) -> float | None:
        """Zero-shot top-1 (ImageNet's first), else the mean R@1 of the two directions."""
        retrieval = ("image_to_text_R@1", "text_to_image_R@1")
        for names in (("imagenet-zeroshot-val-top1",), ("zeroshot-val-top1",), retrieval):
            if all(name in metrics for name in names):
                return sum(metrics[name] for name in names) / len(names)
        return None


def _one(text: Tensor, is_cut: bool) -> Tensor | TextParts:
    """The shape of a single caption."""
    one = text[:1].to("meta")
    return TextParts((one,), torch.zeros(1, dtype=torch.int64, device="meta")) if is_cut else one
