"""Classification: an image tower with a linear head, and what it learns from labelled images."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn

from open_clip_elip import ImageTower

from .augment import Mix
from ..distributed import Ranks
from ..errors import UserError
from ..evaluation.pairs import evaluation_mode
from ..evaluation.passes import EncodeSettings, ImagePass, collect
from ..data.sets.labelled import LabelledImages
from ..evaluation.scores import score
from .contrastive import Batch, is_due, training_rrt

RANDOM_STD = 2e-5  # of a random head's weights: so small that the first loss is ln(C), whatever the features


class Classifier(nn.Module):
    """An image tower of CLIP and a linear head.

    The state dict has the tower's keys, as in the CLIP model (`visual.*`), and `head.weight` (C, D), `head.bias` (C,).

    Args:
        visual: maps (B, 3, H, W) to (B, D).
        head: applied in its own precision, whatever autocast says: a hundred times a cosine has no digits to spare.
        normalize: bring the features to unit length first, as a zero-shot classifier wants them.
        reduction: token reduction (`open_clip_elip.TokenReduction`), by vision alone, in training and evaluation.

    Attributes:
        tower: how the image tower is run; its switches are the classifier's.
    """

    def __init__(self, visual: nn.Module, head: nn.Linear, *, normalize: bool, reduction: nn.Module | None = None):
        super().__init__()
        self.visual, self.head, self.normalize = visual, head, normalize
        self.tower = ImageTower(visual, reduction)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, C)."""
        features = self.encode(image)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.head.weight.dtype)
            return self.head(F.normalize(features, dim=-1) if self.normalize else features)

    def encode(self, image: Tensor) -> Tensor:
        """Features (B, D) of all tokens or, with `reduction`, of those that the `[CLS]` itself keeps (Sec. 4.4.5)."""
        return self.tower.features(image, reduce=self.tower.reduction is not None)


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
    if reduce and not model.reduction.works_alone:
        raise UserError("--vision-guided-reduction is for elip, evit and tome, not for this model's method.")
    reduction = model.reduction if reduce else None
    return Classifier(model.visual, head.to(device), normalize=normalize, reduction=reduction)


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


class ClassificationTask:
    """Cross entropy with soft targets.

    Args:
        args: the run's flags.
        ranks: this process.
        mix: from images and labels to images and targets.
        data: what to evaluate on, by the prefix of its metrics; the first says which checkpoint is best.
        transform: for evaluation.
    """

    shared = ()

    def __init__(
        self,
        args: argparse.Namespace,
        ranks: Ranks,
        mix: Mix,
        data: Mapping[str, LabelledImages],
        transform: Callable[[Image.Image], Tensor],
    ):
        self.args, self.ranks, self.mix, self.transform = args, ranks, mix, transform
        self.data = dict(data)

    def prepare(self, model: nn.Module, batch: Batch) -> Batch:
        return batch

    def features(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, target = self.mix(batch["image"], batch["text"])
        return {"logits": model(images), "target": target}

    def losses(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss`, and `accuracy`: how often the first class is the target's first."""
        logits, target = features["logits"], features["target"].detach()
        with torch.no_grad():
            accuracy = (logits.argmax(dim=1) == target.argmax(dim=1)).float().mean()
        return {"loss": F.cross_entropy(logits, target.to(logits.dtype)), "accuracy": accuracy}

    def after_step(self, model: nn.Module) -> None:
        pass

    def log(self, model: nn.Module) -> dict[str, float]:
        return {"rrt": training_rrt(model)}

    def evaluate(self, model: nn.Module, epoch: int, last: bool) -> dict[str, float]:
        if not is_due(epoch, self.args.val_frequency, last):
            return {}
        return self.metrics(model)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """`NAME-top1`, `-top5`, `-mean_per_class_recall`, `-num_samples` of each data set; a collective call.

        The same on every process and for any number of processes.
        """
        args, metrics = self.args, {}
        for name, data in self.data.items():
            settings = EncodeSettings(
                batch_size=args.batch_size,
                workers=args.workers,
                precision=args.precision,
                on_broken=args.on_broken,
                progress=sys.stderr.isatty() if args.progress is None else args.progress,
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
        found = [metrics[key] for key in (name, f"ema/{name}") if key in metrics]
        return max(found, default=None)
