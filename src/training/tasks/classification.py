"""Classification: an image tower with a linear head, and what it learns from labelled images."""
from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn

from open_clip_elip import ImageTower, TokenReduction

from ..data.sets.labelled import LabelledImages
from ..distributed import Ranks
from ..errors import UserError
from ..evaluation.passes import EncodeSettings, ImagePass, collect, evaluation_mode
from ..evaluation.scores import score
from ..options import TrainingOptions
from ..options.model import ImageOptions, ModelOptions, TokenReductionOptions
from ..options.parser import COUNT, FRACTION_BELOW_1, NOT_NEGATIVE, POSITIVE, Section, forbid, one_of, option
from .augment import AugmentationOptions, Mix
from .base import Batch, Progress, Task, is_due

RANDOM_STD = 2e-5  # of a random head's weights: so small that the first loss is ln(C), whatever the features


@dataclass
class LabelledDataOptions(Section, title="labelled data"):
    data: str | None = option(
        None, "Data set to train on (its training split) and to evaluate on (its test split): NAME=PATH, or PATH where "
        "the files tell which it is.", metavar="[NAME=]PATH", path=True)
    test_data: str | None = option(
        None, "Another place for the test split of --data.", metavar="[NAME=]PATH", path=True)
    also: list[str] = option(
        [], "More data sets to evaluate on, with the classes of --data or, for ImageNet, some of them (imagenet-v2, "
        "imagenet-r, ...).", metavar="[NAME=]PATH", nargs="+", path=True)
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
        FRACTION_BELOW_1)
    vision_guided_reduction: bool = option(
        False, "Reduce tokens in fine-tuning and its evaluation too, guided by the image alone.")
    wise_ft: bool = option(
        False, "At the end, evaluate the weights between the zero-shot classifier and the fine-tuned one (0 to 1 by "
        "0.1). Needs --head zero-shot.")


@dataclass
class FinetuningOptions(
    LabelledDataOptions, ClassificationOptions, AugmentationOptions, ModelOptions, TokenReductionOptions, ImageOptions,
    TrainingOptions,
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
        loads = self.evaluate and self.resume is not None
        forbid(
            self.model is None and not loads,
            "--model is missing: give the model's name, and its checkpoint with --pretrained.",
        )
        forbid(
            self.evaluate and self.resume is None and self.head != "zero-shot",
            "--evaluate needs a checkpoint of fine-tuning in --resume, or --head zero-shot.",
        )
        own_weights = self.model is None or ":" in self.model  # local-dir:... and hf-hub:... bring them along
        forbid(
            not (own_weights or self.pretrained or self.pretrained_image or (loads and not self.wise_ft)),
            "--pretrained is missing: give a checkpoint file of pre-training, or the name of pretrained weights.",
        )
        forbid(
            self.wise_ft and self.model is not None and self.head != "zero-shot",
            "--wise-ft starts from the zero-shot classifier, so it needs --head zero-shot.",
        )
        forbid(
            self.wise_ft and self.evaluate and not loads,
            "--wise-ft needs the fine-tuned weights: give their checkpoint in --resume.",
        )
        reduction = self.token_reduction or {}
        forbid(
            bool(reduction) and self.model is not None and not self.vision_guided_reduction,
            "--token-reduction needs --vision-guided-reduction: else no token is removed.",
        )
        for name in sorted(reduction.keys() & {"lam", "text_scale"}):
            raise UserError(f"{name} weighs the image against its caption, and fine-tuning has none: leave it out.")


class Classifier(nn.Module):
    """An image tower of CLIP and a linear head.

    The state dict has the tower's keys, as in the CLIP model (`visual.*`), and `head.weight` (C, D), `head.bias` (C,).

    Args:
        visual: maps (B, 3, H, W) to (B, D).
        head: applied in its own precision, whatever autocast says: a hundred times a cosine has no digits to spare.
        normalize: bring the features to unit length first, as a zero-shot classifier wants them.
        reduction: token reduction (`open_clip_elip.TokenReduction`), by vision alone, in training and evaluation
            (Guo et al., Sec. 4.4.5).

    Attributes:
        tower: runs the image tower.
    """

    def __init__(self, visual: nn.Module, head: nn.Linear, *, normalize: bool, reduction: TokenReduction | None = None):
        super().__init__()
        self.visual, self.head, self.normalize = visual, head, normalize
        self.tower = ImageTower(visual, reduction)
        self.tower.vision_guided = reduction is not None

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, C)."""
        features = self.tower.features(image)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.head.weight.dtype)
            return self.head(F.normalize(features, dim=-1) if self.normalize else features)


def random_classifier(model: nn.Module, num_classes: int, *, reduce: bool = False) -> Classifier:
    """A classifier on the pooled features before the projection into CLIP's space, with a random head.

    The tower loses its projection where it has one of its own; a ResNet's attention pool stays as it is. The head is
    drawn from torch's generator on the CPU.

    Args:
        model: a CLIP model, whose tower is taken, not copied.
        reduce: keep the model's token reduction.
    """
    _drop_projection(model.visual)
    width, dtype = _feature_shape(model.visual)
    head = nn.Linear(width, num_classes, dtype=dtype)
    nn.init.trunc_normal_(head.weight, std=RANDOM_STD)
    nn.init.zeros_(head.bias)
    return _assemble(model, head, normalize=False, reduce=reduce)


def zero_shot_head(
    model: nn.Module, num_classes: int, weights: Tensor | None = None, *, reduce: bool = False
) -> Classifier:
    """A classifier that begins as the zero-shot classifier: unit-length features, the head's weights times the scale.

    Args:
        model: a CLIP model, whose tower is taken, not copied.
        weights: (D, C), unit-length text features of each class (`zero_shot_classifier`); None leaves zeros, to be
            filled from a checkpoint.
        reduce: keep the model's token reduction.
    """
    width, dtype = _feature_shape(model.visual)
    head = nn.Linear(width, num_classes, dtype=dtype)
    with torch.no_grad():
        head.weight.zero_() if weights is None else head.weight.copy_(weights.T * model.logit_scale.exp().cpu())
        head.bias.zero_()
    return _assemble(model, head, normalize=True, reduce=reduce)


def _assemble(model: nn.Module, head: nn.Linear, *, normalize: bool, reduce: bool) -> Classifier:
    device = next(model.visual.parameters()).device
    classifier = Classifier(
        model.visual, head.to(device), normalize=normalize, reduction=model.reduction if reduce else None
    )
    classifier.tower.shortcuts = model.tower.shortcuts
    return classifier


def _drop_projection(visual: nn.Module) -> None:
    if isinstance(visual, VisionTransformer):
        visual.proj = None
    elif isinstance(visual, TimmModel):
        projections = [name for name, _ in visual.head.named_children() if name in ("proj", "mlp")]
        for name in projections:
            setattr(visual.head, name, nn.Identity())
        if not len(visual.head) and isinstance(visual.trunk.get_classifier(), nn.Linear):
            visual.trunk.reset_classifier(0)  # there timm's own classifier is the projection


@torch.no_grad()
def _feature_shape(visual: nn.Module) -> tuple[int, torch.dtype]:
    """Length of the tower's features, and the number format of a head on them: float32 at least."""
    weight = next(visual.parameters())
    size = visual.image_size if isinstance(visual.image_size, (tuple, list)) else (visual.image_size,) * 2
    with evaluation_mode(visual) as tower:
        features = tower(torch.zeros(1, 3, *size, dtype=weight.dtype, device=weight.device))
    return features.shape[-1], torch.promote_types(features.dtype, torch.float32)


def add_drop_path(visual: nn.Module, rate: float) -> None:
    """Stochastic depth (Huang et al. 2016): in training, residual branches are left out at random, for each sample.

    A branch of block i of L is left out with probability rate * i / (L - 1), and scaled up otherwise. Done by hooks on
    the modules at the end of each branch, so the state dict keeps its keys.

    Raises:
        UserError: the tower is not OpenCLIP's own ViT.
    """
    if not rate:
        return
    if not isinstance(visual, VisionTransformer):
        raise UserError(
            f"--drop-path needs OpenCLIP's own ViT, but this model has a {type(visual).__name__}; leave it out."
        )
    transformer = visual.transformer
    last = len(transformer.resblocks) - 1
    for i, block in enumerate(transformer.resblocks):
        if i:
            for branch_end in (block.ls_1, block.ls_2):
                branch_end.register_forward_hook(_DropPath(rate * i / last, 0 if transformer.batch_first else 1))


class _DropPath:
    """A forward hook that drops its module's whole output for some samples.

    Args:
        rate: probability.
        batch_dim: dimension of the samples.
    """

    def __init__(self, rate: float, batch_dim: int):
        self.rate, self.batch_dim = rate, batch_dim

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], branch: Tensor) -> Tensor:
        if not module.training:
            return branch
        shape = [1] * branch.ndim
        shape[self.batch_dim] = branch.shape[self.batch_dim]
        keep = torch.rand(shape, device=branch.device) >= self.rate
        return branch * (keep / (1 - self.rate)).to(branch.dtype)


class ClassificationTask(Task):
    """Cross entropy with soft targets.

    Args:
        options: of the run.
        ranks: this process.
        mix: from images and labels to images and targets.
        data: what to evaluate on, by the prefix of its metrics; the first says which checkpoint is best.
        transform: for evaluation.
    """

    def __init__(
        self,
        options: FinetuningOptions,
        ranks: Ranks,
        mix: Mix,
        data: Mapping[str, LabelledImages],
        transform: Callable[[Image.Image], Tensor],
    ):
        self.options, self.ranks, self.mix, self.transform = options, ranks, mix, transform
        self.data = dict(data)

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
        """`NAME-top1`, `-top5`, `-mean_per_class_recall`, `-num_samples` of each data set; a collective call.

        The same on every process and for any number of processes.
        """
        options, metrics = self.options, {}
        for name, data in self.data.items():
            settings = EncodeSettings(
                batch_size=options.batch_size,
                workers=options.workers,
                precision=options.precision,
                on_broken=options.on_broken,
                progress=sys.stderr.isatty() if options.progress is None else options.progress,
                description=name,
            )
            with evaluation_mode(model) as classifier:
                images = ImagePass(classifier, data.images, self.transform, ranks=self.ranks, settings=settings)
                logits, index, _ = collect(images)
            metrics |= {f"{name}-{metric}": value for metric, value in score(logits, data, index).items()}
        return metrics

    def score(self, metrics: dict[str, float]) -> float | None:
        """Top-1 on the first data set; the better one of the weights and their average."""
        name = f"{next(iter(self.data))}-top1"
        return max((metrics[key] for key in (name, f"ema/{name}") if key in metrics), default=None)
