"""What is done to labelled images in training: timm's transforms for each picture, mixup and cutmix for each batch."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..options.finetune import AugmentationOptions


def train_transform(options: AugmentationOptions, preprocess: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """From an RGB picture to a normalised tensor (3, H, W), by timm's parts: crop, flip, policy, colours, erasing.

    Its randomness comes from the global generators of Python, NumPy and torch, which the loader seeds for each sample.
    `preprocess` is OpenCLIP's `preprocess_cfg` of the image tower. Raises UserError: a policy that timm does not know.
    """
    from timm.data import auto_augment  # takes a second, and only training needs it
    from timm.data.transforms_factory import transforms_imagenet_train

    # The policies also ask for 0 bits a colour, which Pillow answered with black and now refuses.
    auto_augment.NAME_TO_OP |= dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize)
    size = preprocess["size"]
    try:
        return transforms_imagenet_train(
            tuple(size) if isinstance(size, (tuple, list)) else (size, size),
            scale=tuple(options.crop_scale),
            ratio=tuple(options.crop_ratio),
            hflip=options.hflip,
            auto_augment=options.auto_augment,
            color_jitter=options.color_jitter or None,
            interpolation=options.train_interpolation,
            mean=preprocess["mean"],
            std=preprocess["std"],
            re_prob=options.random_erasing,
            re_mode=options.erasing_mode,
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"timm knows no augmentation policy {options.auto_augment!r} ({str(error) or type(error).__name__}); "
            "write it like rand-m9-mstd0.5-inc1."
        ) from error


def _posterize(picture: Image.Image, bits: int, **options: Any) -> Image.Image:
    from timm.data.auto_augment import posterize

    return posterize(picture, bits, **options) if bits > 0 else Image.new(picture.mode, picture.size)


class Mix:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of a batch with itself in reverse order, and soft targets.

    One draw a batch, as in timm's batch mode. All randomness comes from torch's generator on the CPU: it is in each
    checkpoint, and setting it back gives the same mix again. Batches may have any length.
    """

    def __init__(self, options: AugmentationOptions, num_classes: int):
        self.options, self.num_classes = options, num_classes

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of images (B, 3, H, W), which stay as they are, and labels (B,) int64: mixed images, and targets (B, C)
        float32, each row with sum 1."""
        options, target = self.options, self.one_hot(labels)
        if not (options.mixup or options.cutmix) or torch.rand(()) >= options.mixup_prob:
            return images, target
        if options.cutmix and (not options.mixup or torch.rand(()) < options.mixup_switch_prob):
            images, weight = cutmix(images, _beta(options.cutmix))
        else:
            weight = _beta(options.mixup)
            images = images * weight + images.flip(0) * (1 - weight)
        return images, target * weight + target.flip(0) * (1 - weight)

    def one_hot(self, labels: Tensor) -> Tensor:
        """(B,) -> (B, C) float32 with the label smoothing of Szegedy et al. (2016)."""
        smoothing = self.options.label_smoothing
        return F.one_hot(labels, self.num_classes) * (1 - smoothing) + smoothing / self.num_classes


def cutmix(images: Tensor, weight: float) -> tuple[Tensor, float]:
    """Puts a random rectangle of each image's partner, that in the reverse order, in its place; images: (B, 3, H, W).

    Returns the images, and the share of its area that each has kept: `weight`, or more where the rectangle is cut off.
    """
    height, width = images.shape[-2:]
    side = math.sqrt(1 - weight)
    rows, columns = _interval(height, side), _interval(width, side)
    mixed = images.clone()
    mixed[..., rows, columns] = images.flip(0)[..., rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - area / (height * width)


def _interval(length: int, share: float) -> slice:
    """`share` of a length around a random centre, cut off at the ends."""
    half = int(length * share) // 2
    centre = int(torch.randint(length, ()))
    return slice(max(0, centre - half), min(length, centre + half))


def _beta(alpha: float) -> float:
    concentration = torch.tensor(alpha, dtype=torch.float64)
    return float(torch.distributions.Beta(concentration, concentration).sample())
