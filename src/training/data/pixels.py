"""Batches of images: floats that are normalised, or uint8 pixels that `to_device` normalises where they are used."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from .images import ImageLike, decoding, load_rgb

# `--image-decode`
PLAIN, FAST, REDUCED = "plain", "fast", "reduced"


@dataclass(frozen=True)  # which pinning a batch leaves as it is, unlike a tuple
class Normalization:
    """What is subtracted from, and then divides, each channel of pixels between 0 and 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Images(NamedTuple):
    """A batch of pictures."""

    pixels: Tensor  # (B, 3, H, W); uint8 if there is a `normalization`, else floats that are normalised
    normalization: Normalization | None = None


def makes_pixels(transform: Any) -> Normalization | None:
    """The normalization of a transform that takes any picture and leaves this to `to_device`; None for others."""
    return getattr(transform, "normalization", None)


def picture_to_tensor(image: ImageLike, transform: Callable) -> Tensor:
    """(3, H, W) as the transform makes it. Raises: Unreadable."""
    if makes_pixels(transform):  # may decode only when it knows which part it needs
        return transform(image)
    with decoding():
        picture = load_rgb(image)
    return transform(picture)


def stack(images: Sequence[Tensor], transform: Callable) -> Images:
    """What the transform has made of some pictures; pixels are in channels-last memory."""
    normalization = makes_pixels(transform)
    if normalization is None:
        return Images(default_collate(list(images)))  # in a worker, straight into shared memory
    return Images(default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2), normalization)


def to_device(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A batch, or whatever is in it, on the device, without waiting for what is pinned.

    `Images` become one normalised float tensor. What has `to` is moved; all else stays.

    dtype: of images; None leaves that of floats, and makes float32 of pixels
    """
    if isinstance(value, Images):
        return _normalised(value, device, dtype)
    if isinstance(value, dict):
        return {name: to_device(item, device, dtype) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [to_device(item, device, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value.to(device=device, non_blocking=True) if hasattr(value, "to") else value


def _normalised(images: Images, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    pixels, normalization = images
    if normalization is None:
        return pixels.to(device=device, dtype=dtype, non_blocking=True)
    pixels = pixels.to(device=device, non_blocking=True)
    scale, shift = _constants(normalization, pixels.device)
    if pixels.device.type == "cuda":  # one kernel, which reads uint8, works in float32 and writes `dtype`
        return torch.addcmul(shift, pixels, scale, out=torch.empty_like(pixels, dtype=dtype or torch.float32))
    floats = pixels.to(torch.float32)
    return torch.addcmul(shift, floats, scale, out=floats).to(dtype or torch.float32)


@lru_cache
def _constants(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """scale, shift (1, 3, 1, 1) float32: (pixel / 255 - mean) / std = pixel * scale + shift."""
    with torch.inference_mode(False):
        mean = torch.tensor(normalization.mean, dtype=torch.float64).view(1, 3, 1, 1)
        std = torch.tensor(normalization.std, dtype=torch.float64).view(1, 3, 1, 1)
        return (1 / (255 * std)).to(device, torch.float32), (-mean / std).to(device, torch.float32)
