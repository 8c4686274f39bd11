"""What the fusion models' training does to a picture: crop, flip, and two of ten operations (RandAugment)."""
from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from .images import ImageLike, Picture
from .pixels import Normalization

MAGNITUDE = {"albef": 7, "blip": 5}  # of a family's operations
GREY = (128, 128, 128)


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
        for name in random.choices(list(OPERATIONS), k=2):  # with replacement
            if random.random() < 0.5:
                picture = OPERATIONS[name](picture, self.magnitude * random.choice((-1, 1)) / 10)
        return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)


def _affine(picture: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """Takes pixel (x, y) from (a x + b y + c, d x + e y + f); for Pillow, pixels lie at halves."""
    matrix = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def _rotate(picture: Image.Image, degrees: float) -> Image.Image:
    """Counter-clockwise, about the middle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = picture.width / 2, picture.height / 2
    return _affine(picture, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


# name -> what it makes of a picture, at a strength from -1 to 1. Translations are in pixels at any size. Brightness
# and sharpness never get less.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Identity": lambda picture, level: picture,
    "AutoContrast": lambda picture, level: ImageOps.autocontrast(picture),
    "Equalize": lambda picture, level: ImageOps.equalize(picture),
    "Brightness": lambda picture, level: ImageEnhance.Brightness(picture).enhance(0.1 + 1.8 * abs(level)),
    "Sharpness": lambda picture, level: ImageEnhance.Sharpness(picture).enhance(0.1 + 1.8 * abs(level)),
    "ShearX": lambda picture, level: _affine(picture, 1, 0.3 * level, 0, 0, 1, 0),
    "ShearY": lambda picture, level: _affine(picture, 1, 0, 0, 0.3 * level, 1, 0),
    "TranslateX": lambda picture, level: _affine(picture, 1, 0, 10 * level, 0, 1, 0),
    "TranslateY": lambda picture, level: _affine(picture, 1, 0, 0, 0, 1, 10 * level),
    "Rotate": lambda picture, level: _rotate(picture, 30 * level),
}
