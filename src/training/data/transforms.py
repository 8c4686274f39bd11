"""OpenCLIP's transforms, and what torchvision makes them of, as transforms on pixels. Importing it takes seconds."""
from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from open_clip.transform import CenterCropOrPad, MaybeConvertMode, ResizeKeepRatio, color_jitter, gray_scale
from torchvision import transforms as tv

from .pixels import PLAIN, REDUCED, Normalization, PixelTransform, Region

log = logging.getLogger(__name__)

_MODES = {tv.InterpolationMode.BICUBIC: "bicubic", tv.InterpolationMode.BILINEAR: "bilinear"}
_ON_PIXELS = (tv.CenterCrop, CenterCropOrPad)  # the same for a tensor as for a PIL image
_ON_PICTURES = (color_jitter, gray_scale, tv.ColorJitter, tv.Grayscale, tv.RandomGrayscale)


def with_decoding(transform: Callable, decoding: str) -> Callable:
    """The transform for `--image-decode`: as it is for `PLAIN`, or as a `PixelTransform`.

    One with parts that are not known here stays as it is, and the log says so.
    """
    if decoding == PLAIN or isinstance(transform, PixelTransform):
        return transform
    unknown = _unknown_part(transform)
    if unknown is not None:
        name = type(unknown).__name__
        log.info("Images are decoded as by --image-decode plain, for only that works with %s.", name)
        return transform
    first, *steps, _, normalize = transform.transforms
    return PixelTransform(
        partial(_FRAMES[type(first)], first),
        _MODES[first.interpolation],
        [(step, type(step) in _ON_PICTURES) for step in steps if type(step) is not MaybeConvertMode],  # RGB already
        Normalization(tuple(map(float, normalize.mean)), tuple(map(float, normalize.std))),
        reduce=decoding == REDUCED,
        plain=transform,
    )


def _unknown_part(transform: Callable) -> Callable | None:
    if type(transform) is not tv.Compose or len(transform.transforms) < 3:
        return transform
    first, *steps, to_floats, normalize = transform.transforms
    if type(normalize) is not tv.Normalize or len(normalize.mean) != 3 or len(normalize.std) != 3:
        return normalize
    if not isinstance(to_floats, tv.ToTensor):
        return to_floats
    if type(first) not in _FRAMES or first.interpolation not in _MODES or getattr(first, "max_size", None):
        return first
    return next((step for step in steps if type(step) not in _ON_PIXELS + _ON_PICTURES + (MaybeConvertMode,)), None)


def _random_crop(step: tv.RandomResizedCrop, height: int, width: int) -> Region:
    shape = torch.empty((1, height, width), device="meta")  # it asks for an image, but looks at the size only
    return Region(*step.get_params(shape, step.scale, step.ratio), tuple(step.size))


def _resized(step: tv.Resize, height: int, width: int) -> Region:
    """A single number is the length of the shorter side; the longer one is rounded down, as torchvision does."""
    size = [step.size] if isinstance(step.size, int) else list(step.size)
    if len(size) == 1:
        longer = int(size[0] * max(height, width) / min(height, width))
        size = [longer, size[0]] if height > width else [size[0], longer]
    return Region(0, 0, height, width, tuple(size))


def _resized_keeping_ratio(step: ResizeKeepRatio, height: int, width: int) -> Region:
    options = ("random_scale_prob", "random_scale_range", "random_aspect_prob", "random_aspect_range")
    image = SimpleNamespace(size=(width, height))
    size = step.get_params(image, step.size, step.longest, **{name: getattr(step, name) for name in options})
    return Region(0, 0, height, width, tuple(size))


_FRAMES: dict[type, Callable[[Any, int, int], Region]] = {
    tv.RandomResizedCrop: _random_crop,
    tv.Resize: _resized,
    ResizeKeepRatio: _resized_keeping_ratio,
}
