"""Classification: an image tower with a linear head, and what it learns from labelled images."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn

from open_clip_elip import ImageTower

from ..data.sets.labelled import LabelledImages
from ..distributed import Ranks
from ..errors import UserError
from ..evaluation.passes import EncodeSettings, ImagePass, collect, evaluation_mode
from ..evaluation.scores import score
from ..options import TrainingOptions
from ..options.kinds import COUNT, FRACTION, FRACTION_BELOW_1, NOT_NEGATIVE, POSITIVE, one_of
from ..options.model import AdapterOptions, ImageOptions, ModelOptions, TokenReductionOptions
from ..options.parser import Section, forbid, option
from ..plan import is_due
from .augment import AugmentationOptions, Mix
from .base import Batch, Progress, Task


@dataclass
class LabelledDataOptions(Section, title="labelled data"):
    data: str | None = option(
        None, "Data set to train on (its training split) and to evaluate on (its test split): NAME=PATH, or PATH where "
        "the files tell which it is.", metavar="[NAME=]PATH", path=True)
    test_data: str | None = option(
        None, "Another place for the test split of --data.", metavar="[NAME=]PATH", path=True)
    also: list[str] = option(
        [], "More data sets to evaluate on, with the classes of --data or, for ImageNet, some of them (imagenet-v2, "
        "imagenet-r, ...).", metavar="[NAME=]PATH", nargs="*", path=True)
    download: bool = option(False, "Let torchvision download a data set that is not there.")
    on_broken: str = option("skip", "A test image that cannot be read: leave it out, or stop.", one_of("skip", "stop"))
    evaluate: bool = option(
        False, "Train nothing: evaluate the checkpoint of --resume, or the zero-shot head without one.")
    val_frequency: int = option(1, "Evaluate every N epochs and after the last; 0: never.", COUNT)
    results: str = option(
        "results", "Folder of the final results, one file a data set, with a summary of all; 'none' keeps none.",
        metavar="DIR", path=True)


@dataclass
class ClassificationOptions(Section, title="classifier"):
    head: str = option(
        "random", "How the linear head begins: at random, on the pooled features before the projection; or as the "
        "zero-shot classifier, on the projected features.", one_of("random", "zero-shot"))
    drop_path: float = option(
        0.0, "Stochastic depth: the rate at which the last block's branches are dropped; less before it.",
        FRACTION_BELOW_1, needs="trains")
    vision_guided_reduction: bool = option(
        False, "Reduce tokens in fine-tuning and its evaluation too, guided by the image alone.")
    wise_ft: bool = option(
        False, "At the end, evaluate the weights between the zero-shot classifier and the fine-tuned one (0 to 1 by "
        "0.1). Needs --head zero-shot.")
    wise_ft_save: list[float] = option(
        [], "With --wise-ft: also save the weights at these shares of the fine-tuned ones, as checkpoints "
        "wise_ft_SHARE.pt in the run's folder.", FRACTION, nargs="*")


@dataclass
class FinetuningOptions(
    LabelledDataOptions, ClassificationOptions, AugmentationOptions, ModelOptions, AdapterOptions,
    TokenReductionOptions, ImageOptions, TrainingOptions,
    command="training.finetune",
):  # fmt: skip
    model: str | None = None
    force_patch_dropout: float | None = 0.0
    epochs: int = 10
    lr: float | None = option(None, "Highest learning rate. Without it: 1e-3 (timm's have no default).", POSITIVE)
    beta2: float | None = option(None, "Adam's second beta. Without it: 0.999.", FRACTION_BELOW_1)
    eps: float | None = option(None, "Adam's epsilon. Without it: 1e-8.", NOT_NEGATIVE)
    wd: float = 0.1
    warmup: int | str = "1ep"

    @property
    def trains(self) -> bool:
        return not self.evaluate

    def adam_defaults(self) -> dict[str, float]:
        return {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}

    def check(self) -> None:
        forbid(self.data is None, "--data is missing: name the labelled images, as in --data cifar10=/data/cifar10.")
        named, loads = self.model is not None, self.evaluate and self.resume is not None
        missing = "--model is missing: give the model's name, and its checkpoint with --pretrained."
        forbid(not named and not loads, missing)
        missing = "--evaluate needs a checkpoint of fine-tuning in --resume, or --head zero-shot."
        forbid(self.evaluate and not loads and self.head != "zero-shot", missing)
        own_weights = not named or ":" in self.model  # local-dir:... and hf-hub:... bring them along
        has_weights = own_weights or self.pretrained or self.pretrained_image or (loads and not self.wise_ft)
        missing = "--pretrained is missing: give a checkpoint file of pre-training, or the name of pretrained weights."
        forbid(not has_weights, missing)
        missing = "--wise-ft starts from the zero-shot classifier, so it needs --head zero-shot."
        forbid(self.wise_ft and named and self.head != "zero-shot", missing)
        forbid(self.wise_ft and self.adapter, "--wise-ft mixes whole weights, not --adapter's: leave one out.")
        missing = "--wise-ft needs the fine-tuned weights: give their checkpoint in --resume."
        forbid(self.wise_ft and self.evaluate and not loads, missing)
        missing = "--wise-ft-save needs --wise-ft, and a run folder in --logs."
        forbid(bool(self.wise_ft_save) and not (self.wise_ft and self.logs.lower() != "none"), missing)
        reduction = self.token_reduction or {}
        missing = "--token-reduction needs --vision-guided-reduction: else no token is removed."
        forbid(bool(reduction) and named and not self.vision_guided_reduction, missing)
        for name in sorted(reduction.keys() & {"lam", "text_scale"}):
            raise UserError(f"{name} weighs the image against its caption, and fine-tuning has none: leave it out.")


class Classifier(nn.Module):
    """The image tower of a CLIP model, which is taken, not copied, and a linear head.

    The state dict has the tower's keys, as in the CLIP model (`visual.*`), and `head.weight` (C, D), `head.bias` (C,).

    Args:
        head: "random" (from torch's generator on the CPU), on the pooled features before the projection into CLIP's
            space, which the tower loses; a ResNet keeps its attention pool. Or "zero-shot", on unit-length features.
        weights: (D, C) text features of each class for a zero-shot head; None leaves zeros, for a checkpoint to fill.
        reduce: keep the model's token reduction, by vision alone, in training and evaluation (Guo et al., Sec. 4.4.5).
    """

    def __init__(
        self, model: nn.Module, num_classes: int, head: str = "random", weights: Tensor | None = None,
        reduce: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.visual, self.normalize = model.visual, head == "zero-shot"
        if not self.normalize:
            _drop_projection(self.visual)
        width, dtype = _feature_shape(self.visual)
        self.head = nn.Linear(width, num_classes, dtype=dtype)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        if not self.normalize:
            nn.init.trunc_normal_(self.head.weight, std=2e-5)  # the first loss is ln(C), whatever the features
        elif weights is not None:
            self.head.weight.data.copy_(weights.T * model.logit_scale.detach().exp().cpu())
        self.head.to(next(self.visual.parameters()).device)
        self.tower = ImageTower(self.visual, model.reduction if reduce else None)
        self.tower.vision_guided = self.tower.reduction is not None
        self.tower.shortcuts = model.tower.shortcuts

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, C)."""
        features = self.tower.features(image)
        # Whatever autocast says, in the head's own precision: a hundred times a cosine has no digits to spare.
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.head.weight.dtype)
            return self.head(F.normalize(features, dim=-1) if self.normalize else features)


def _drop_projection(visual: nn.Module) -> None:
    if isinstance(visual, VisionTransformer):
        visual.proj = None
    elif isinstance(visual, TimmModel):
        for name in ("proj", "mlp"):
            if hasattr(visual.head, name):
                setattr(visual.head, name, nn.Identity())
        if not len(visual.head) and isinstance(visual.trunk.get_classifier(), nn.Linear):
            visual.trunk.reset_classifier(0)  # there timm's own classifier is the projection


@torch.no_grad()
def _feature_shape(visual: nn.Module) -> tuple[int, torch.dtype]:
    """Length of the tower's features, and the number format of a head on them: float32 at least."""
    weight = next(p for p in visual.parameters() if p.ndim == 4)  # of the first layer, in the format of the input
    size = visual.image_size if isinstance(visual.image_size, (tuple, list)) else (visual.image_size,) * 2
    with evaluation_mode(visual) as tower:
        features = tower(torch.zeros(1, 3, *size, dtype=weight.dtype, device=weight.device))
    return features.shape[-1], torch.promote_types(features.dtype, torch.float32)


def add_drop_path(visual: nn.Module, rate: float) -> None:
    """Stochastic depth (Huang et al. 2016): in training, residual branches are left out at random, for each sample.

    A branch of block i of L is left out with probability rate * i / (L - 1), and scaled up otherwise. Done by hooks on
    the modules at the end of each branch, so the state dict keeps its keys. UserError: not OpenCLIP's own ViT.
    """
    if not rate:
        return
    if not isinstance(visual, VisionTransformer):
        what = f"but this model has a {type(visual).__name__}"
        raise UserError(f"--drop-path needs OpenCLIP's own ViT, {what}; leave it out.")
    transformer = visual.transformer
    last, batch_dim = len(transformer.resblocks) - 1, 0 if transformer.batch_first else 1
    for i, block in enumerate(transformer.resblocks):
        for branch_end in (block.ls_1, block.ls_2) if i else ():
            branch_end.register_forward_hook(partial(_drop_path, rate=rate * i / last, batch_dim=batch_dim))


def _drop_path(module: nn.Module, inputs: tuple[Tensor, ...], branch: Tensor, rate: float, batch_dim: int) -> Tensor:
    """A forward hook; `rate` of the samples, which are along `batch_dim`, lose their branch."""
    if not module.training:
        return branch
    shape = [1] * branch.ndim
    shape[batch_dim] = branch.shape[batch_dim]
    keep = torch.rand(shape, device=branch.device) >= rate
    return branch * (keep / (1 - rate)).to(branch.dtype)


class ClassificationTask(Task):
    """Cross entropy with the soft targets that `mix` makes of labels.

    `data` and `transform` are for evaluation; of the data sets, by the prefix of their metrics, the first says which
    checkpoint is best.
    """

    def __init__(
        self,
        options: FinetuningOptions,
        ranks: Ranks,
        mix: Mix,
        data: Mapping[str, LabelledImages],
        transform: Callable[[Image.Image], Tensor],
    ):
        self.options, self.ranks, self.mix, self.data, self.transform = options, ranks, mix, data, transform

    def losses(self, model: nn.Module, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`, and `accuracy`: how often the first class is the target's first."""
        images, target = self.mix(batch["image"], batch["label"])
        logits = model(images)
        with torch.no_grad():
            accuracy = (logits.argmax(dim=1) == target.argmax(dim=1)).float().mean()
        return {"loss": F.cross_entropy(logits, target.to(logits.dtype)), "accuracy": accuracy}

    def log(self, model: nn.Module) -> dict[str, float]:
        return {"rrt": model.tower.rrt()}

    def evaluate(self, model: nn.Module, epoch: int, last: bool) -> dict[str, float]:
        return self.metrics(model) if is_due(epoch, self.options.val_frequency, last) else {}

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """`NAME-top1`, `-top5`, `-mean_per_class_recall`, `-num_samples` of each data set, for any number of processes
        the same; a collective call."""
        metrics = {}
        for name, data in self.data.items():
            settings = EncodeSettings.of(self.options, name)
            with evaluation_mode(model) as classifier:
                images = ImagePass(classifier, data.images, self.transform, ranks=self.ranks, settings=settings)
                logits, index, _ = collect(images)
            metrics |= {f"{name}-{metric}": value for metric, value in score(logits, data, index).items()}
        return metrics

    def score(self, metrics: dict[str, float]) -> float | None:
        """Top-1 on the first data set; the better one of the weights and their average."""
        name = f"{next(iter(self.data))}-top1"
        return max((metrics[key] for key in (name, f"ema/{name}") if key in metrics), default=None)
