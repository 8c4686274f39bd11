"""Validation on image-text pairs: retrieval and contrastive loss. The image tower never sees the captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast
from torch import Tensor, nn

from open_clip_elip import cut_text

from ..data.pixels import to_device
from ..distributed import Ranks
from ..errors import UserError
from .metrics import contrastive_loss, gather_ordered, retrieval_metrics


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of any nesting of DistributedDataParallel and `torch.compile`."""
    for wrapped in ("_orig_mod", "module"):
        inner = getattr(model, wrapped, None)
        if isinstance(inner, nn.Module):
            return unwrap(inner)
    return model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The unwrapped model in eval mode without gradients; afterwards each of its modules is in its earlier mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield unwrap(model)
    finally:
        for module, training in modes:
            module.training = training


def evaluate_pairs(
    model: nn.Module,
    val_data: Iterable[dict],
    *,
    device: torch.device,
    precision: str,
    batch_size: int,
    siglip: bool = False,
    world_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Retrieval metrics, `clip_val_loss` and `num_samples` over all processes' pairs; the same dict on every process.

    val_data: this process's batches {"image": (B, 3, H, W), "text": (B, T), "index": (B,) int64}, where "index" is the
    sample's place in the whole set and every sample occurs on one process only. A process may have no batch at all.
    `clip_val_loss` is that of consecutive batches of `batch_size` in this order, whatever the number of processes.
    `progress` is called with the number of pairs of each finished batch. A collective call when `world_size` > 1.

    Raises UserError, on all processes, if reading fails with one on any of them or if there is no pair at all.
    """
    ranks = Ranks(torch.device(device), dist.get_rank() if world_size > 1 else 0, world_size=world_size)
    with evaluation_mode(model) as encoder:
        with ranks.agree():
            features, index = _encode(encoder, val_data, ranks.device, precision, progress)
        features = gather_ordered(features, index, world_size)
        if not features:
            raise UserError("The validation data has no readable image-text pair; check what --val-data points to.")
        metrics = None
        if ranks.is_main:  # only there: on another kind of device the last digits could differ
            image, text = features["image"].to(device), features["text"].to(device)
            scale, bias = encoder.logit_scale.exp().mean().item(), getattr(encoder, "logit_bias", None)
            bias = None if bias is None else bias.mean().item()
            metrics = {
                **retrieval_metrics(image, text),
                "clip_val_loss": contrastive_loss(image, text, scale, bias, siglip, batch_size=batch_size),
                "num_samples": len(image),
            }
    return ranks.broadcast(metrics)


def _encode(
    model: nn.Module,
    batches: Iterable[dict],
    device: torch.device,
    precision: str,
    progress: Callable[[int], None] | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Normalized float32 features {"image", "text"}: (n, D) on the CPU and their index (n,); no features if n is 0."""
    autocast = get_autocast(precision, device_type=device.type)
    input_dtype = get_input_dtype(precision)
    features: dict[str, list[Tensor]] = {"image": [], "text": []}
    index = [torch.empty(0, dtype=torch.int64)]
    for batch in batches:
        image = to_device(batch["image"], device, input_dtype)
        text = cut_text(batch["text"], model).to(device=device, non_blocking=True)
        with autocast():
            image_features = model.encode_image(image, normalize=True)
            text_features = model.encode_text(text, normalize=True)
        features["image"].append(image_features.float().cpu())
        features["text"].append(text_features.float().cpu())
        index.append(batch["index"].cpu())
        if progress is not None:
            progress(len(image))
    return {name: torch.cat(rows) for name, rows in features.items() if rows}, torch.cat(index)
