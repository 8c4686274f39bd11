"""OpenCLIP's transforms, and what torchvision makes them of, as transforms on pixels. Importing it takes seconds."""
from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import numpy
import PIL
import torch
import torch.nn.functional as F
from open_clip.transform import CenterCropOrPad, MaybeConvertMode, ResizeKeepRatio, color_jitter, gray_scale
from PIL import Image
from torch import Tensor
from torchvision import transforms as tv

from .images import ImageLike, Picture
from .pixels import FAST, PLAIN, REDUCED, Normalization, makes_pixels

log = logging.getLogger(__name__)

# With `REDUCED`, what is decoded has at least this many pixels for each one that is wanted, along each side.
SPARE = 1.25

_PILLOW = int(PIL.__version__.partition(".")[0])
_MODES = {tv.InterpolationMode.BICUBIC: "bicubic", tv.InterpolationMode.BILINEAR: "bilinear"}
_ON_PIXELS = (tv.CenterCrop, CenterCropOrPad)  # the same for a tensor as for a PIL image
_ON_PICTURES = (color_jitter, gray_scale, tv.ColorJitter, tv.Grayscale, tv.RandomGrayscale)


def with_decoding(transform: Callable, decoding: str) -> Callable:
    """The transform for `--image-decode`. One with parts that are not known here stays plain, and the log says so."""
    if decoding == PLAIN or makes_pixels(transform):
        return transform
    if (unknown := _unknown_part(transform)) is not None:
        log.info("Images are decoded as by --image-decode plain: only that works with %s.", type(unknown).__name__)
        return transform
    return PixelTransform(transform, reduce=decoding == REDUCED)


def _unknown_part(transform: Callable) -> Callable | None:
    if type(transform) is not tv.Compose or len(transform.transforms) < 3:
        return transform
    first, *steps, to_floats, normalize = transform.transforms
    if type(normalize) is not tv.Normalize or len(normalize.mean) != 3 or len(normalize.std) != 3:
        return normalize
    if not isinstance(to_floats, tv.ToTensor):
        return to_floats
    known = type(first) in (tv.RandomResizedCrop, tv.Resize, ResizeKeepRatio)
    if not known or first.interpolation not in _MODES or getattr(first, "max_size", None):
        return first
    return next((step for step in steps if type(step) not in _ON_PIXELS + _ON_PICTURES + (MaybeConvertMode,)), None)


class PixelTransform:
    """What a plain transform makes of a picture, as uint8 pixels that are not normalised yet.

    The random numbers are the same ones, drawn in the same order. Pixels differ by rounding alone: torch's resize keeps
    its weights in 15 bits, PIL's in 22. Less than 1 % of the values are off by 1, a few in a million by 2.

    reduce: decode JPEGs at 1/2, 1/4 or 1/8 where the region is much larger than needed, an approximation
    """

    def __init__(self, plain: tv.Compose, reduce: bool):
        self.plain, self.reduce = plain, reduce
        self.first, *steps, _, normalize = plain.transforms
        self.steps = [step for step in steps if type(step) is not MaybeConvertMode]  # it is RGB already
        self.normalization = Normalization(tuple(map(float, normalize.mean)), tuple(map(float, normalize.std)))

    def __call__(self, image: ImageLike | Image.Image) -> Tensor:
        """(3, H, W) uint8, in memory (H, W, 3). Raises: Unreadable."""
        picture = Picture(image)
        (top, left, height, width), size = draw_region(self.first, picture.height, picture.width)
        shrink = 1
        if self.reduce and picture.can_shrink:
            room = min(height / size[0], width / size[1]) / SPARE
            shrink = next((factor for factor in (8, 4, 2) if factor <= room), 1)
        rows = slice(round(top / shrink), round((top + height) / shrink))
        columns = slice(round(left / shrink), round((left + width) / shrink))
        part = torch.from_numpy(picture.pixels(shrink)[rows, columns])
        pixels = resize(part, size, _MODES[self.first.interpolation])
        for step in self.steps:
            if type(step) in _ON_PICTURES:
                changed = step(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
                pixels = torch.from_numpy(numpy.array(changed)).permute(2, 0, 1)
            else:
                pixels = step(pixels)
        return pixels

    def __repr__(self) -> str:
        return f"{REDUCED if self.reduce else FAST}({self.plain!r})"


def draw_region(step: Callable, height: int, width: int) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """What a transform's first step takes from a picture of this size, and what it resizes that to.

    Draws the step's random numbers. Returns: (top, left, height, width) and (height, width).
    """
    if isinstance(step, tv.RandomResizedCrop):
        shape = torch.empty((1, height, width), device="meta")  # it asks for an image, but looks at the size only
        return step.get_params(shape, step.scale, step.ratio), tuple(step.size)
    if isinstance(step, ResizeKeepRatio):
        options = ("random_scale_prob", "random_scale_range", "random_aspect_prob", "random_aspect_range")
        image = SimpleNamespace(size=(width, height))
        size = step.get_params(image, step.size, step.longest, **{name: getattr(step, name) for name in options})
    else:
        size = [step.size] if isinstance(step.size, int) else step.size
        if len(size) == 1:  # the length of the shorter side; the longer one is rounded down, as torchvision does
            longer = int(size[0] * max(height, width) / min(height, width))
            size = [longer, size[0]] if height > width else [size[0], longer]
    return (0, 0, height, width), tuple(size)


def resize(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize (h, w, 3) to (3, *size), uint8, as PIL does: antialiased, one direction after the other."""
    pixels = pixels.permute(2, 0, 1)[None]
    height, width = pixels.shape[2:]
    # The first direction rounds and clips, so the order counts. From version 13, PIL does not always begin with rows.
    if _PILLOW >= 13 and height - size[0] > 2 * max(width - size[1], 0):
        pixels = F.interpolate(pixels, (size[0], width), mode=mode, antialias=True)
    if pixels.shape[2:] != size:
        pixels = F.interpolate(pixels, size, mode=mode, antialias=True)
    return pixels[0]
