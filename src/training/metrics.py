"""Retrieval ranks, contrastive loss and classification accuracy as pure tensor code, and a gather over processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Equal gallery rows may differ by a few rounding steps in a blocked matrix product; they must still count as tied.
_TIE_STEPS = 8


@contextmanager
def _full_float32() -> Iterator[None]:
    """Matrix products in true float32 (no TF32): near the top of a ranking TF32 reorders neighbours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@_full_float32()
def retrieval_ranks(query: Tensor, gallery: Tensor, target: Tensor, chunk: int = 1024) -> Tensor:
    """Rank of each query's target among all gallery items, best first.

    query: (N, D), gallery: (M, D), target: (N,) row of `gallery` that is right. Returns (N,) int64, 0-based.
    At most `chunk` x M similarities exist at a time. They are compared in float32 up to its rounding error, and ties
    count against the model: the rank is the number of *other* items that are not clearly less similar than the target.
    So an encoder that maps everything to one point (or to NaN) has the worst rank everywhere, not the best.
    """
    gallery = gallery.float()
    tolerance = _TIE_STEPS * torch.finfo(torch.float32).eps * gallery.norm(dim=1).amax()
    ranks = []
    for part, part_target in zip(query.split(chunk), target.split(chunk), strict=True):
        part = part.float()
        similarity = part @ gallery.T
        bar = similarity.gather(1, part_target[:, None]) - tolerance * part.norm(dim=1, keepdim=True)
        # "not less" instead of "at least": a NaN is beaten by everything.
        ranks.append((~(similarity < bar)).sum(dim=1) - 1)
    return torch.cat(ranks)


def retrieval_metrics(image_features: Tensor, text_features: Tensor, chunk: int = 1024) -> dict[str, float]:
    """Retrieval in both directions where row i of both (N, D) inputs is a pair; N >= 1.

    Keys are OpenCLIP's: `image_to_text_` and `text_to_image_` with `mean_rank`, `median_rank` (1-based, the median
    rounded down) and `R@1`, `R@5`, `R@10` as fractions.
    """
    pairs = torch.arange(len(image_features), device=image_features.device)
    metrics = {}
    for name, query, gallery in (
        ("image_to_text", image_features, text_features),
        ("text_to_image", text_features, image_features),
    ):
        ranks = retrieval_ranks(query, gallery, pairs, chunk).sort().values
        middle = ranks[(len(ranks) - 1) // 2] + ranks[len(ranks) // 2]
        metrics[f"{name}_mean_rank"] = ranks.double().cpu().mean().item() + 1
        metrics[f"{name}_median_rank"] = float(middle.item() // 2 + 1)
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = (ranks < k).sum().item() / len(ranks)
    return metrics


@_full_float32()
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

    The batches are those of the given order, so the value does not depend on how many processes made the features.
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


def topk_accuracy(logits: Tensor, target: Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, float]:
    """Number of samples whose target is among the k highest logits, for each k of `ks`.

    logits: (N, C), target: (N,). With k > C every sample counts. Ties go to the lower class index, as with `argmax`:
    a classifier that gives every class the same logit scores at chance, and class names that occur twice (ImageNet has
    two such pairs) score as usual. A row whose target is NaN never counts.
    """
    own = logits.gather(1, target[:, None])
    lower_index = torch.arange(logits.shape[1], device=logits.device) < target[:, None]
    rank = (~(logits <= own) | ((logits == own) & lower_index)).sum(dim=1)
    return {k: float(((rank < k) & ~own[:, 0].isnan()).sum()) for k in ks}


def predictions(logits: Tensor) -> Tensor:
    """(N,) class of the highest logit of (N, C), the lower index where tied; -1 (no class) for a row with a NaN."""
    return logits.argmax(dim=1).masked_fill(logits.isnan().any(dim=1), -1)


def mean_per_class_recall(pred: Tensor, target: Tensor, num_classes: int) -> float:
    """Share of right predictions within each class, averaged over the classes that occur in `target`.

    pred, target: (N,) with N >= 1; a `pred` of -1 is always wrong.
    """
    present = torch.bincount(target, minlength=num_classes)
    right = torch.bincount(target[pred == target], minlength=num_classes)
    return (right[present > 0].double() / present[present > 0].double()).mean().item()


def gather_ordered(features: dict[str, Tensor], index: Tensor, world_size: int) -> dict[str, Tensor]:
    """Rows of all processes, sorted by `index`; every process gets all of them, on the CPU.

    features: tensors (n, ...) with one row a sample; index: (n,) int64, the samples' places in the global order.
    `n` may differ between processes and may be 0 (the dict may then be empty); if it is 0 on all, the result is {}.
    A collective call when `world_size` > 1.
    """
    if world_size == 1:
        order = index.argsort().cpu()
        return {name: rows.cpu()[order] for name, rows in features.items() if len(order)}

    spec = {name: (rows.shape[1:], rows.dtype) for name, rows in features.items()}
    specs: list = [None] * world_size
    dist.all_gather_object(specs, (len(index), spec))
    counts = [count for count, _ in specs]
    spec = next((spec for count, spec in specs if count), {})

    def gather(rows: Tensor) -> Tensor:
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count].cpu() for part, count in zip(parts, counts, strict=True)])

    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    order = gather(index.to(device)).argsort()
    gathered = {}
    for name, (shape, dtype) in spec.items():
        rows = features[name] if len(index) else torch.empty(0, *shape, dtype=dtype)
        gathered[name] = gather(rows.to(device))[order]
    return gathered
