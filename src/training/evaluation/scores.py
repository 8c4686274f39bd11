"""What a classifier scores on a data set, also one with only some of the classes that it was trained for."""
from __future__ import annotations

import torch
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor

from ..data.sets.labelled import LabelledImages
from ..errors import UserError
from .metrics import outcomes, summary
from .passes import check_finite

IMAGENET_CLASSES = 1000
METRICS = ("top1", "top5", "mean_per_class_recall", "num_samples")  # of `score`


def class_scores(logits: Tensor, data: LabelledImages) -> Tensor:
    """(N, len(data.classnames)) of the scores (N, C) of a classifier for the classes of `data`, or for ImageNet's 1000.

    With ImageNet's, only the classes that `data.imagenet_classes` names compete; one that covers several of ImageNet's
    has the highest of their scores. This is how ImageNet models are evaluated on ImageNet-R, -A and ObjectNet
    (Hendrycks et al. 2021; Barbu et al. 2019).
    """
    groups = data.imagenet_classes
    if groups is None or logits.shape[1] != IMAGENET_CLASSES:
        assert logits.shape[1] == len(data.classnames)
        return logits
    if all(len(group) == 1 for group in groups):
        return logits[:, [group[0] for group in groups]]
    return torch.stack([logits[:, list(group)].amax(dim=1) for group in groups], dim=1)


def score(logits: Tensor, data: LabelledImages, index: Tensor) -> dict[str, float]:
    """`summary` of logits (N, C), see `class_scores`, of the samples at `index` (N,); NotFinite: one is none."""
    scores, labels = class_scores(logits, data).cpu(), data.labels[index.cpu()]
    check_finite(scores, index.cpu(), lambda place: f"the scores of {data.images.name(place)}")
    return summary(outcomes(scores, labels), labels, len(data.classnames))


def check_classes(trained: LabelledImages, data: LabelledImages) -> None:
    """Raises UserError unless `data` have the classes of `trained`, or some of ImageNet's where `trained` has these."""
    ours, theirs = list(trained.classnames), list(data.classnames)
    if ours == theirs or (data.imagenet_classes is not None and is_imagenet(trained)):
        return
    our_name, name = (f"{x.name} ({x.split})" if x.name else "the data set" for x in (trained, data))
    if len(ours) != len(theirs):
        more = "" if data.imagenet_classes is None else ", which are some of ImageNet's"
        found = f"{name} has {len(theirs)} classes{more}, but the classifier is for the {len(ours)} of {our_name}"
    else:
        first, *more = (i for i in range(len(ours)) if ours[i] != theirs[i])
        found = (
            f"{1 + len(more)} of the {len(ours)} classes of {name} and {our_name} differ (class {first} is "
            f"{theirs[first]!r} in the one and {ours[first]!r} in the other)"
        )
    raise UserError(f"{found}; evaluate on data with the same classes.")


def is_imagenet(data: LabelledImages) -> bool:
    """Whether the classes are ImageNet's 1000, in its order."""
    groups = data.imagenet_classes
    if groups is not None:
        return [list(group) for group in groups] == [[i] for i in range(IMAGENET_CLASSES)]
    return list(data.classnames) == list(IMAGENET_CLASSNAMES)
