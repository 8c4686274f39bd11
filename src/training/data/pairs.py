"""Images with captions, and images with labels, as tensors."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .pixels import picture_to_tensor, stack
from .samples import Sample

if TYPE_CHECKING:
    from .sets.labelled import LabelledImages


class PairEncoding:
    """Batches {"image": `Images`, "text": (B, T) long} of samples with one picture and a "caption".

    transform: from an RGB picture to (3, H, W); a `PixelTransform` makes pixels, else it makes normalised floats
    tokenizer: from a list of texts to (B, T)
    """

    def __init__(self, transform: Callable, tokenizer: Callable[[list[str]], Tensor]):
        self.transform, self.tokenizer = transform, tokenizer

    def encode(self, sample: Sample) -> tuple[Tensor, str]:
        return picture_to_tensor(sample.images[0], self.transform), sample.fields["caption"]

    def collate(self, encoded: list[tuple[Tensor, str]]) -> dict[str, Any]:
        images, captions = zip(*encoded, strict=True)
        return {"image": stack(images, self.transform), "text": self.tokenizer(list(captions))}


class LabelEncoding:
    """Batches {"image": `Images`, "label": (B,) long} of samples with one picture and a "label", a class number."""

    def __init__(self, transform: Callable):
        self.transform = transform

    def encode(self, sample: Sample) -> tuple[Tensor, int]:
        return picture_to_tensor(sample.images[0], self.transform), sample.fields["label"]

    def collate(self, encoded: list[tuple[Tensor, int]]) -> dict[str, Any]:
        images, labels = zip(*encoded, strict=True)
        return {"image": stack(images, self.transform), "label": torch.tensor(labels)}


class LabelledRows:
    """Labelled images as rows for `RowSource`."""

    def __init__(self, data: LabelledImages):
        self.images, self.labels, self.name = data.images, data.labels.numpy(), data.name

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Sample:
        row = int(row)
        image = partial(self.images.load, row)
        return Sample(self.images.name(row), (image,), {"label": int(self.labels[row])}, self.name, row)
