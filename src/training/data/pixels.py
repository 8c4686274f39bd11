"""Images as uint8 pixels: less work for the loader, the rest of it on the device.

A plain transform decodes, crops and resizes with PIL, makes floats and normalises them, picture by picture.
`PixelTransform` does the same to the pixels but hands uint8 on; `to_device` normalises a whole batch where it is used.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from .images import ImageLike, Picture, Unreadable, load_rgb

# `--image-decode`
PLAIN, FAST, REDUCED = "plain", "fast", "reduced"

# With `REDUCED`, what is decoded has at least this many pixels for each one that is wanted, along each side.
SPARE = 1.25

_PILLOW = int(PIL.__version__.partition(".")[0])


@dataclass(frozen=True)
class Normalization:
    """What is subtracted from, and then divides, each channel of pixels between 0 and 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Region(NamedTuple):
    """A part of a picture, in its pixels, and the (height, width) it is resized to."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]


@dataclass(eq=False, repr=False)
class PixelTransform:
    """What a plain transform makes of a picture, as uint8 pixels that are not normalised yet.

    The random numbers are the same ones, drawn in the same order. Pixels differ by rounding alone: torch's resize keeps
    its weights in 15 bits, PIL's in 22. Less than 1 % of the values are off by 1, a few in a million by 2.

    frame: (height, width) of a picture -> the region to resize; draws random numbers
    mode: of the resize, bicubic or bilinear
    steps: what comes after it: functions, each with whether it takes a PIL image instead of a (3, h, w) tensor
    reduce: decode JPEGs at 1/2, 1/4 or 1/8 where the region is much larger than needed; its edges then move to the
        next whole pixel of what is decoded. An approximation.
    plain: the transform that this stands for
    """

    frame: Callable[[int, int], Region]
    mode: str
    steps: Sequence[tuple[Callable, bool]]
    normalization: Normalization
    reduce: bool
    plain: Callable

    def __call__(self, image: ImageLike | Image.Image) -> Tensor:
        """(3, H, W) uint8, in memory (H, W, 3). Raises: Unreadable."""
        picture = Picture(image)
        top, left, height, width, size = self.frame(picture.height, picture.width)
        shrink = 1
        if self.reduce and picture.can_shrink:
            room = min(height / size[0], width / size[1]) / SPARE
            shrink = next((factor for factor in (8, 4, 2) if factor <= room), 1)
        rows, columns = _scaled(top, height, shrink), _scaled(left, width, shrink)
        pixels = resize(torch.from_numpy(picture.pixels(shrink)[rows, columns]), size, self.mode)
        for step, on_pictures in self.steps:
            if on_pictures:
                changed = step(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
                pixels = torch.from_numpy(numpy.array(changed)).permute(2, 0, 1)
            else:
                pixels = step(pixels)
        return pixels

    def __repr__(self) -> str:
        return f"{REDUCED if self.reduce else FAST}({self.plain!r})"


def _scaled(start: int, length: int, shrink: int) -> slice:
    return slice(round(start / shrink), round((start + length) / shrink))


def resize(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize (h, w, 3) to (3, *size), uint8, as PIL does: antialiased, one direction after the other.

    mode: bicubic or bilinear
    """
    pixels = pixels.permute(2, 0, 1)[None]
    height, width = pixels.shape[2:]
    # The first direction rounds and clips, so the order counts. From version 13, PIL does not always begin with rows.
    if _PILLOW >= 13 and height - size[0] > 2 * max(width - size[1], 0):
        pixels = F.interpolate(pixels, (size[0], width), mode=mode, antialias=True)
    if pixels.shape[2:] != size:
        pixels = F.interpolate(pixels, size, mode=mode, antialias=True)
    return pixels[0]


class Images(NamedTuple):
    """A batch of pictures.

    pixels: (B, 3, H, W); uint8 if there is a `normalization`, else floats that are normalised
    """

    pixels: Tensor
    normalization: Normalization | None = None


def picture_to_tensor(image: ImageLike, transform: Callable) -> Tensor:
    """(3, H, W) as the transform makes it. Raises: Unreadable."""
    if isinstance(transform, PixelTransform):  # may decode only when it knows which part it needs
        return transform(image)
    try:
        picture = load_rgb(image)
    except Exception as error:  # PIL raises nearly anything on damaged files
        raise Unreadable.because(error) from error
    return transform(picture)


def stack(images: Sequence[Tensor], transform: Callable) -> Images:
    """What the transform has made of some pictures; pixels are in channels-last memory.

    In a DataLoader worker, straight into shared memory.
    """
    normalization = getattr(transform, "normalization", None)
    if normalization is None:
        return Images(default_collate(list(images)))
    return Images(default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2), normalization)


def to_device(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A batch, or whatever is in it, on the device, without waiting for what is pinned.

    `Images` become one float tensor, normalised if that is still to be done. Dicts, lists and tuples are gone through,
    tensors (and what else has `to`) are moved, and all else stays.

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
