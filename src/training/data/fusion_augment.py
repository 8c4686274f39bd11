"""What the fusion models' training does to a picture: crop, flip, and some operations (RandAugment)."""
from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy
import torch
from PIL import Image, ImageChops, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from .images import ImageLike, Picture
from .pixels import Normalization, makes_pixels

MAGNITUDE = {"albef": 7, "blip": 5}  # of a family's operations
GREY = (128, 128, 128)
METER_LEVEL = 0.3  # of METER's operations, magnitude 9 of 30

# From a picture and a strength from -1 to 1.
Operation = Callable[[Image.Image, float], Image.Image]


class FusionTransform:
    """From a picture to pixels (3, H, W), uint8. Randomness is Python's and torch's global generators'.

    Args:
        preprocess: OpenCLIP's `preprocess_cfg`: size, mean and std.
        scale: smallest and largest area of the crop, as a share of the picture.
        magnitude: of the operations, 0 to 10. At 5 brightness and sharpness change nothing.
    """

    def __init__(self, preprocess: Mapping[str, Any], scale: tuple[float, float], magnitude: int):
        bicubic = v2.InterpolationMode.BICUBIC
        self.crop = v2.Compose(
            [v2.RandomResizedCrop(tuple(preprocess["size"]), scale, interpolation=bicubic), v2.RandomHorizontalFlip()]
        )
        self.magnitude = magnitude
        self.normalization = Normalization(tuple(preprocess["mean"]), tuple(preprocess["std"]))

    def __call__(self, image: ImageLike) -> Tensor:
        """Raises: Unreadable."""
        picture = self.crop(Image.fromarray(Picture(image).pixels(1)))
        picture = two_of(OPERATIONS, picture, self.magnitude / 10, probability=0.5)
        return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)


class ClipRandAugment:
    """METER's fine-tuning: two operations on the whole picture, then `transform`, which is that of evaluation."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self.transform, self.normalization = transform, makes_pixels(transform)

    def __call__(self, image: ImageLike | Image.Image) -> Tensor:
        """(3, H, W) as the transform makes it. Raises: Unreadable."""
        return self.transform(two_of(METER_OPERATIONS, Image.fromarray(Picture(image).pixels()), METER_LEVEL))


def two_of(
    operations: Mapping[str, Operation], picture: Image.Image, level: float, probability: float = 1.0
) -> Image.Image:
    """The picture after two operations, maybe equal ones, each done with this probability; at `level` or -`level`."""
    for name in random.choices(list(operations), k=2):
        if random.random() < probability:
            picture = operations[name](picture, level * random.choice((-1, 1)))
    return picture


def _affine(picture: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """Takes pixel (x, y) from (a x + b y + c, d x + e y + f); for Pillow, pixels lie at halves."""
    matrix = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def _rotate(picture: Image.Image, degrees: float) -> Image.Image:
    """Counter-clockwise, about the middle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = picture.width / 2, picture.height / 2
    return _affine(picture, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _enhanced(kind: Callable, picture: Image.Image, level: float) -> Image.Image:
    """Never less of it for a level below 0."""
    return kind(picture).enhance(0.1 + 1.8 * abs(level))


# Translations are in pixels at any size.
OPERATIONS: dict[str, Operation] = {
    "Identity": lambda picture, level: picture,
    "AutoContrast": lambda picture, level: ImageOps.autocontrast(picture),
    "Equalize": lambda picture, level: ImageOps.equalize(picture),
    "Brightness": partial(_enhanced, ImageEnhance.Brightness),
    "Sharpness": partial(_enhanced, ImageEnhance.Sharpness),
    "ShearX": lambda picture, level: _affine(picture, 1, 0.3 * level, 0, 0, 1, 0),
    "ShearY": lambda picture, level: _affine(picture, 1, 0, 0, 0.3 * level, 1, 0),
    "TranslateX": lambda picture, level: _affine(picture, 1, 0, 10 * level, 0, 1, 0),
    "TranslateY": lambda picture, level: _affine(picture, 1, 0, 0, 0, 1, 10 * level),
    "Rotate": lambda picture, level: _rotate(picture, 30 * level),
}


def _moved(picture: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """Takes pixel (x, y) from the one nearest to (a x + b y + c, d x + e y + f), in Pillow's places; black outside."""
    return picture.transform(picture.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


def _solarize_add(picture: Image.Image, added: float) -> Image.Image:
    return ImageOps.solarize(ImageChops.add(picture, Image.new("RGB", picture.size, (int(added),) * 3)), 128)


# Posterize leaves one bit of each colour at `METER_LEVEL`, as in the release.
METER_OPERATIONS: dict[str, Operation] = {
    **{name: OPERATIONS[name] for name in ("AutoContrast", "Equalize", "Brightness", "Sharpness")},
    "Color": partial(_enhanced, ImageEnhance.Color),
    "Contrast": partial(_enhanced, ImageEnhance.Contrast),
    "Rotate": lambda picture, level: picture.rotate(30 * level),
    "Posterize": lambda picture, level: ImageOps.posterize(picture, max(1, int(4 * abs(level)))),
    "Solarize": lambda picture, level: ImageOps.solarize(picture, 256 * abs(level)),
    "SolarizeAdd": lambda picture, level: _solarize_add(picture, 110 * abs(level)),
    "ShearX": lambda picture, level: _moved(picture, 1, 0.3 * level, 0, 0, 1, 0),
    "ShearY": lambda picture, level: _moved(picture, 1, 0, 0, 0.3 * level, 1, 0),
    "TranslateX": lambda picture, level: _moved(picture, 1, 0, 100 * level, 0, 1, 0),
    "TranslateY": lambda picture, level: _moved(picture, 1, 0, 0, 0, 1, 100 * level),
}
