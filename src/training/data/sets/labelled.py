"""Images with classes, listed but not decoded: files, members of tar files, or pixels in memory."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..images import load_rgb

DEFAULT_TEMPLATES = ("a photo of a {}.",)


class Images(Protocol):
    """Pictures by number, in a fixed order. Each worker process gets a copy, so it is small."""

    def __len__(self) -> int: ...

    def load(self, i: int) -> Image.Image:
        """Picture `i` as RGB, decoded completely; whatever is wrong with a broken file is raised here."""
        ...

    def name(self, i: int) -> str:
        """Where picture `i` is, for people: a path, a tar file and its member, a file and its row."""
        ...

    def fingerprint(self) -> str:
        """Changes when pictures are added, removed or renamed. Cheap: of names and places, or of pixels in memory."""
        ...

    def subset(self, rows: Tensor) -> Images:
        """The pictures of these numbers, in this order."""
        ...


class ImageFiles:
    """One file a picture.

    Args:
        root: folder that holds all of them.
        paths: relative to `root`.
    """

    def __init__(self, root: str | Path, paths: Sequence[str]):
        self.root = Path(root)
        self.paths = np.asarray(paths, dtype=np.str_)  # an array: a list of a million strings is copied by each worker

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, i: int) -> Image.Image:
        return load_rgb(self.name(i))

    def name(self, i: int) -> str:
        return os.path.join(self.root, str(self.paths[i]))

    def fingerprint(self) -> str:
        return _digest("\n".join(self.paths.tolist()).encode(errors="surrogateescape"))

    def subset(self, rows: Tensor) -> ImageFiles:
        return ImageFiles(self.root, self.paths[rows.numpy()])


class TarImages:
    """Members of uncompressed tar files, read by position.

    Args:
        tars: the files.
        names: (N,) name of each member.
        places: (N, 3) int64: which of `tars`, offset of the bytes, how many.
    """

    def __init__(self, tars: Sequence[Path], names: Sequence[str], places: np.ndarray):
        self.tars = list(tars)
        self.names, self.places = np.asarray(names, dtype=np.str_), places.reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int) -> Image.Image:
        tar, offset, size = self.places[i].tolist()
        with self.tars[tar].open("rb") as file:
            file.seek(offset)
            return load_rgb(file.read(size))

    def name(self, i: int) -> str:
        return f"{self.tars[self.places[i, 0]]}: {self.names[i]}"

    def fingerprint(self) -> str:
        names = "\n".join([*(tar.name for tar in self.tars), *self.names.tolist()])
        return _digest(names.encode(errors="surrogateescape"), np.ascontiguousarray(self.places).tobytes())

    def subset(self, rows: Tensor) -> TarImages:
        return TarImages(self.tars, self.names[rows.numpy()], self.places[rows.numpy()])


class ArrayImages:
    """Pixels in memory: CIFAR, MNIST and their like.

    Args:
        pixels: (N, H, W) gray or (N, H, W, 3), uint8.
        origin: what they come from, for people.
    """

    def __init__(self, pixels: np.ndarray, origin: str):
        self.pixels, self.origin = pixels, origin

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i]).convert("RGB")

    def name(self, i: int) -> str:
        return f"{self.origin}, row {i}"

    def fingerprint(self) -> str:
        return _digest(str(self.pixels.shape).encode(), np.ascontiguousarray(self.pixels).tobytes())

    def subset(self, rows: Tensor) -> ArrayImages:
        return ArrayImages(self.pixels[rows.numpy()], self.origin)


@dataclass(frozen=True)
class LabelledImages:
    """A data set for classification; nothing is decoded yet.

    Attributes:
        images: in a fixed order, the same on every process.
        labels: (N,) int64 class of each, counted by `classnames`.
        classnames: one a class.
        templates: prompts with "{}" for the class name, or functions of it.
        name, split: what it is called in results, such as "imagenet-r" and "test".
        imagenet_classes: if the classes are some of ImageNet's: for each class here, its numbers among the 1000 (more
            than one where the class covers several of ImageNet's), so that a classifier for ImageNet can be evaluated.
    """

    images: Images
    labels: Tensor
    classnames: Sequence[str]
    templates: Sequence[str] | Sequence[Callable[[str], str]] = DEFAULT_TEMPLATES
    name: str = ""
    split: str = "test"
    imagenet_classes: Sequence[Sequence[int]] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: Tensor) -> LabelledImages:
        """The samples of these numbers, in this order; the classes stay."""
        return replace(self, images=self.images.subset(rows), labels=self.labels[rows])

    def fingerprint(self) -> str:
        """A short hash of which pictures there are, in which order, and of their classes (not of the class names)."""
        return _digest(self.images.fingerprint().encode(), self.labels.to(torch.int64).numpy().tobytes())


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]
