"""What a classifier scores on a data set, also one with only some of the classes that it was trained for."""
from __future__ import annotations

import torch
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor

from ..data.sets.labelled import LabelledImages
from ..errors import UserError
from .metrics import mean_per_class_recall, predictions, topk_hits
from .passes import check_finite

IMAGENET_CLASSES = 1000
METRICS = ("top1", "top5", "mean_per_class_recall", "num_samples")  # of `score`


def class_scores(logits: Tensor, data: LabelledImages) -> Tensor:
    """The scores of the classes of `data` from those of a classifier for its classes, or for ImageNet's 1000.

    With ImageNet's, only the classes that `data.imagenet_classes` names compete; one that covers several of ImageNet's
    has the highest of their scores. This is how ImageNet models are evaluated on ImageNet-R, -A and ObjectNet
    (Hendrycks et al. 2021; Barbu et al. 2019).

    Of (N, C) it makes (N, len(data.classnames)). Raises UserError if C is neither number of classes.
    """
    groups = data.imagenet_classes
    if groups is not None and logits.shape[1] == IMAGENET_CLASSES:
        if all(len(group) == 1 for group in groups):
            return logits[:, [group[0] for group in groups]]
        return torch.stack([logits[:, list(group)].amax(dim=1) for group in groups], dim=1)
    if logits.shape[1] != len(data.classnames):
        raise UserError(
            f"A classifier for {logits.shape[1]} classes cannot be evaluated on {data.name or 'this data set'}, which "
            f"has {len(data.classnames)}; train it on data with the same classes (or on ImageNet)."
        )
    return logits


def outcomes(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, 3) int64 of logits (N, C) and labels (N,): whether the top 1 and the top 5 are right, and the top class."""
    return torch.cat([topk_hits(logits, labels, (1, 5)), predictions(logits)[:, None]], dim=1)


def summary(outcomes: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """`top1`, `top5`, `mean_per_class_recall` (fractions) and `num_samples` of N >= 1 samples; see `outcomes`.

    Top-5 of fewer than five classes is 1.
    """
    top1, top5, predicted = outcomes.unbind(dim=1)
    return {
        "top1": int(top1.sum()) / len(top1),
        "top5": int(top5.sum()) / len(top5),
        "mean_per_class_recall": mean_per_class_recall(predicted, labels, num_classes),
        "num_samples": len(top1),
    }


def score(logits: Tensor, data: LabelledImages, index: Tensor) -> dict[str, float]:
    """`summary` of a classifier for the classes of `data`, or for ImageNet's (see `class_scores`).

    logits: (N, C), N >= 1. index: (N,) int64, the places in `data` of the samples.
    Raises UserError if C does not fit or a score is not finite.
    """
    scores, labels = class_scores(logits, data).cpu(), data.labels[index.cpu()]
    check_finite(scores, index.cpu(), lambda place: f"the scores of {data.images.name(place)}")
    return summary(outcomes(scores, labels), labels, len(data.classnames))


def check_classes(trained: LabelledImages, data: LabelledImages) -> None:
    """Raises UserError unless `data` have the classes of `trained`, or some of ImageNet's where `trained` has these."""
    ours, theirs = list(trained.classnames), list(data.classnames)
    if ours == theirs or (data.imagenet_classes is not None and is_imagenet(trained)):
        return
    if len(ours) != len(theirs):
        more = "" if data.imagenet_classes is None else ", which are some of ImageNet's"
        raise UserError(
            f"{_name(data)} has {len(theirs)} classes{more}, but the classifier is for the {len(ours)} of "
            f"{_name(trained)}; evaluate on data with the same classes."
        )
    different = [i for i in range(len(ours)) if ours[i] != theirs[i]]
    first = different[0]
    raise UserError(
        f"{len(different)} of the {len(ours)} classes of {_name(data)} and {_name(trained)} differ (class {first} is "
        f"{theirs[first]!r} in the one and {ours[first]!r} in the other); evaluate on data with the same classes."
    )


def is_imagenet(data: LabelledImages) -> bool:
    """Whether the classes are ImageNet's 1000, in its order."""
    groups = data.imagenet_classes
    if groups is not None:
        return [list(group) for group in groups] == [[i] for i in range(IMAGENET_CLASSES)]
    return list(data.classnames) == list(IMAGENET_CLASSNAMES)


def _name(data: LabelledImages) -> str:
    return f"{data.name} ({data.split})" if data.name else "the data set"
