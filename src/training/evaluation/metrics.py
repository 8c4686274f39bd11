"""Retrieval ranks, contrastive loss and classification accuracy as pure tensor code."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

# Equal gallery rows may differ by a few rounding steps in a blocked matrix product; they must still count as tied.
_TIE_STEPS = 8


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products in true float32: TF32 reorders the top of a ranking, and is noise near the optimum of a fit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@full_float32()
def best_ranks(
    query: Tensor,
    gallery: Tensor,
    query_labels: tuple[Tensor, Tensor],
    gallery_labels: tuple[Tensor, Tensor],
    chunk: int = 1024,
) -> Tensor:
    """Rank of the best right item for each query, where several items may be right.

    query: (N, D), gallery: (M, D). An item is right for a query if they share a label; every query needs one. Labels
    are pairs of int64 tensors (rows, labels) of equal length, each pair once; no item may share two with a query.
    Returns (N,) int64, 0-based: the number of *wrong* items that are not clearly less similar than the best right one.

    At most `chunk` x M similarities exist at a time. They are compared in float32 up to its rounding error, and ties
    count against the model: an encoder that maps everything to one point (or to NaN) has the worst rank everywhere.
    """
    order = query_labels[0].argsort()
    query_row, query_label = query_labels[0][order], query_labels[1][order]
    order = gallery_labels[1].argsort()
    item, item_label = gallery_labels[0][order], gallery_labels[1][order]
    first = torch.searchsorted(item_label, query_label)
    count = torch.searchsorted(item_label, query_label, right=True) - first

    def right(start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The right items of these queries, as query and item."""
        part = slice(*torch.searchsorted(query_row, query_row.new_tensor([start, stop])).tolist())
        n = count[part]
        row = torch.repeat_interleave(query_row[part] - start, n)
        within = torch.arange(len(row), device=row.device) - torch.repeat_interleave(n.cumsum(0) - n, n)
        return row, item[torch.repeat_interleave(first[part], n) + within]

    gallery = gallery.float()
    tolerance = _TIE_STEPS * torch.finfo(torch.float32).eps * gallery.norm(dim=1).nan_to_num(0).amax()
    ranks = []
    for start in range(0, len(query), chunk):
        part = query[start : start + chunk].float()
        row, own_items = right(start, start + len(part))
        similarity = part @ gallery.T
        own = similarity[row, own_items]
        best = own.new_full((len(part),), -torch.inf)
        best = best.scatter_reduce(0, row, own.nan_to_num(-torch.inf, torch.inf, -torch.inf), "amax")
        bar = best - tolerance * part.norm(dim=1)
        # "not less" instead of "at least": a NaN is beaten by everything.
        not_less = (~(similarity < bar[:, None])).sum(dim=1)
        ranks.append(not_less.scatter_add(0, row, -(~(own < bar[row])).long()))
    return torch.cat(ranks)


def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    image_of: Tensor | None = None,
    same_text: Tensor | None = None,
    chunk: int = 1024,
) -> dict[str, float]:
    """Retrieval in both directions, also with several captions an image, as it is reported on COCO and Flickr30K.

    image_features: (N, D), N >= 1; text_features: (M, D); image_of: (M,) int64 row of the image that each caption
    belongs to, and every image has at least one; default: row i of both is a pair. An image's rank is that of the best
    of its captions. same_text: (M,) int64, equal for captions of one text; if given, a caption is right for every
    image that has one with this text.

    Keys are OpenCLIP's: `image_to_text_` (of N ranks) and `text_to_image_` (of M) with `mean_rank`, `median_rank`
    (1-based, the median rounded down) and `R@1`, `R@5`, `R@10` as fractions.
    """
    images, captions = (torch.arange(len(x), device=x.device) for x in (image_features, text_features))
    image_of = captions if image_of is None else image_of
    if same_text is None:
        image_labels, text_labels = (images, images), (captions, image_of)
    else:
        image_labels = tuple(torch.stack([image_of, same_text]).unique(dim=1))
        text_labels = (captions, same_text)
    metrics = {}
    for name, ranks in (
        ("image_to_text", best_ranks(image_features, text_features, image_labels, text_labels, chunk)),
        ("text_to_image", best_ranks(text_features, image_features, text_labels, image_labels, chunk)),
    ):
        ranks = ranks.sort().values
        middle = ranks[(len(ranks) - 1) // 2] + ranks[len(ranks) // 2]
        metrics[f"{name}_mean_rank"] = ranks.double().cpu().mean().item() + 1
        metrics[f"{name}_median_rank"] = float(middle.item() // 2 + 1)
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = (ranks < k).sum().item() / len(ranks)
    return metrics


@full_float32()
def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float,
    logit_bias: float | None = None,
    siglip: bool = False,
    *,
    batch_size: int,
) -> float:
    """Contrastive loss of N pairs (N, D), taken over consecutive batches of `batch_size` and averaged by batch length.

    `siglip` selects the sigmoid loss (summed over texts, averaged over images) instead of the symmetric cross entropy.
    """
    total = 0.0
    for image, text in zip(image_features.split(batch_size), text_features.split(batch_size), strict=True):
        logits = logit_scale * image.float() @ text.float().T
        if logit_bias is not None:
            logits = logits + logit_bias
        if siglip:
            sign = 2 * torch.eye(len(logits), device=logits.device) - 1
            batch_sum = -F.logsigmoid(sign * logits).sum()
        else:
            pairs = torch.arange(len(logits), device=logits.device)
            batch_sum = sum(F.cross_entropy(x, pairs, reduction="sum") for x in (logits, logits.T)) / 2
        total += batch_sum.item()
    return total / len(image_features)


def outcomes(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, 2) int64 of logits (N, C) and labels (N,): how many classes are before the right one, and the first class.

    Ties go to the lower class, as with `argmax`: a classifier that gives every class the same logit scores at chance. A
    right class that is NaN is behind everything; with any NaN in its row, the first class is none of them (-1).
    """
    own = logits.gather(1, labels[:, None])
    lower = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    before = (~(logits <= own) | ((logits == own) & lower)).sum(dim=1).masked_fill(own.isnan()[:, 0], sys.maxsize)
    return torch.stack([before, logits.argmax(dim=1).masked_fill(logits.isnan().any(dim=1), -1)], dim=1)


def summary(outcomes: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """`top1`, `top5`, `mean_per_class_recall` (of the classes that occur) and `num_samples` of N >= 1 `outcomes`."""
    before, predicted = outcomes.unbind(dim=1)
    present = torch.bincount(labels, minlength=num_classes)
    right = torch.bincount(labels[predicted == labels], minlength=num_classes)
    return {
        "top1": int((before < 1).sum()) / len(labels),
        "top5": int((before < 5).sum()) / len(labels),
        "mean_per_class_recall": (right[present > 0].double() / present[present > 0].double()).mean().item(),
        "num_samples": len(labels),
    }
