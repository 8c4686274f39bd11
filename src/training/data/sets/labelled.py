"""Images with classes, listed but not decoded: files, members of tar files, or pixels in memory."""
from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import UserError
from ..images import load_rgb

with contextlib.suppress(ImportError):  # optional: reads HEIC; here, since every worker process imports this module
    import pillow_heif

    pillow_heif.register_heif_opener()

DEFAULT_TEMPLATES = ("a photo of a {}.",)
# Pillow knows these endings, but needs another program or library for what is in the files, or they are no pictures.
_UNDECODED = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")


@cache
def picture_endings() -> frozenset[str]:
    """The endings of files that can be decoded here, such as ".jpg", in lower case: those of Pillow and its plugins."""
    kinds = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in kinds if kind in Image.OPEN and kind not in _UNDECODED)


class Images(ABC):
    """Pictures by number, in a fixed order. Each worker process gets a copy, so it is small."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, i: int) -> str:
        """Where picture `i` is, for people: a path, a tar file and its member, a file and its row."""

    @abstractmethod
    def content(self, i: int) -> bytes:
        """What picture `i` is decoded from."""

    def load(self, i: int) -> Image.Image:
        """Picture `i` as RGB, decoded completely; whatever is wrong with a broken file is raised here."""
        return load_rgb(self.content(i))

    @abstractmethod
    def fingerprint(self, times: bool = True) -> str:
        """A hash of which pictures there are, and of what is in them as far as that shows without reading them.

        Pixels in memory: all of them. Files: their names below the folder, their sizes, and when they were last changed
        (in ns). Members of tar files: names, places and sizes, and each tar file's name, size and time. So a picture
        that was replaced by one of the same size, and its time set back, goes unnoticed; and a copy whose times are
        new counts as other pictures.

        times: False leaves the times out, for what must stay the same where the data are copied.
        """

    @abstractmethod
    def subset(self, rows: Tensor) -> Images:
        """The pictures of these numbers, in this order."""


class ImageFiles(Images):
    """One file a picture.

    Args:
        root: folder that holds all of them.
        paths: relative to `root`.
        border: pixels to cut off on each side.
    """

    def __init__(self, root: str | Path, paths: Sequence[str], border: int = 0):
        self.root, self.border = Path(root), border
        self.paths = np.asarray(paths, dtype=np.str_)  # an array: a list of a million strings is copied by each worker

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, i: int) -> Image.Image:
        image, border = load_rgb(self.name(i)), self.border
        if min(image.size) <= 2 * border:
            raise ValueError(f"{self.name(i)} is only {image.width} x {image.height} pixels")
        return image.crop((border, border, image.width - border, image.height - border)) if border else image

    def name(self, i: int) -> str:
        return os.path.join(self.root, str(self.paths[i]))

    def content(self, i: int) -> bytes:
        return Path(self.name(i)).read_bytes()

    def fingerprint(self, times: bool = True) -> str:
        sizes = _sizes_and_times([self.name(i) for i in range(len(self))], times)
        names = "\n".join([*self.paths.tolist(), str(self.border)])
        return _digest(names.encode(errors="surrogateescape"), sizes.tobytes())

    def subset(self, rows: Tensor) -> ImageFiles:
        return ImageFiles(self.root, self.paths[rows.numpy()], self.border)


class TarImages(Images):
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

    def name(self, i: int) -> str:
        return f"{self.tars[self.places[i, 0]]}: {self.names[i]}"

    def content(self, i: int) -> bytes:
        tar, offset, size = self.places[i].tolist()
        with self.tars[tar].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def fingerprint(self, times: bool = True) -> str:
        names = "\n".join([*(tar.name for tar in self.tars), *self.names.tolist()]).encode(errors="surrogateescape")
        return _digest(names, np.ascontiguousarray(self.places).tobytes(), _sizes_and_times(self.tars, times).tobytes())

    def subset(self, rows: Tensor) -> TarImages:
        return TarImages(self.tars, self.names[rows.numpy()], self.places[rows.numpy()])


class ArrayImages(Images):
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

    def content(self, i: int) -> bytes:
        return self.pixels[i].tobytes()

    def fingerprint(self, times: bool = True) -> str:
        return _digest(str(self.pixels.shape).encode(), np.ascontiguousarray(self.pixels))

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
        folders: where each class is a folder (or a synset), what these are called; in the order of the classes.
    """

    images: Images
    labels: Tensor
    classnames: Sequence[str]
    templates: Sequence[str] | Sequence[Callable[[str], str]] = DEFAULT_TEMPLATES
    name: str = ""
    split: str = "test"
    imagenet_classes: Sequence[Sequence[int]] | None = None
    folders: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: Tensor) -> LabelledImages:
        """The samples of these numbers, in this order; the classes stay."""
        return replace(self, images=self.images.subset(rows), labels=self.labels[rows])

    def fingerprint(self, times: bool = True) -> str:
        """A short hash of the pictures (see `Images`), in this order, and of their classes (not of the class names)."""
        return _digest(self.images.fingerprint(times).encode(), self.labels.to(torch.int64).numpy().tobytes())

    def same_pictures(self, other: LabelledImages) -> bool:
        """Whether `other` has the same pictures, byte by byte, with the same labels in the same order.

        Reads no further than to the first difference.
        """
        if len(self) != len(other) or not torch.equal(self.labels, other.labels):
            return False
        pairs = ((_content(self.images, i), _content(other.images, i)) for i in range(len(self)))
        return self.fingerprint() == other.fingerprint() or all(ours == theirs for ours, theirs in pairs)


def check_arrays(pixels: np.ndarray, labels: Sequence, shape: Sequence[int], classes: int, origin: object) -> Tensor:
    """The labels as (N,) int64, if `pixels` are (N, *shape) uint8 and there is one of so many classes for each.

    Raises:
        UserError: they are anything else, or none.
    """
    numbers = np.asarray(labels)
    fitting = pixels.dtype == np.uint8 and pixels.shape == (numbers.size, *shape) and numbers.ndim == 1
    fitting = fitting and numbers.size and numbers.dtype.kind in "iu"
    if not fitting or numbers.min() < 0 or numbers.max() >= classes:
        found = f"{pixels.dtype} of {' x '.join(map(str, pixels.shape))} and {numbers.size} labels"
        wanted = f"uint8 images of {' x '.join(map(str, shape))}, each with a label from 0 to {classes - 1}"
        raise UserError(f"{origin} must hold {wanted}, not {found}; get it anew.")
    return torch.from_numpy(numbers.astype(np.int64))


def _content(images: Images, i: int) -> bytes | None:
    with contextlib.suppress(OSError):  # a link to nowhere, say: a broken picture
        return images.content(i)


def _sizes_and_times(paths: Sequence[str | Path], times: bool) -> np.ndarray:
    """(N, 2) int64 bytes and time of change in ns; zeros for `times` False and for files that cannot be read."""
    found = np.zeros((len(paths), 2), dtype=np.int64)

    def look(start: int) -> None:
        for i, path in enumerate(paths[start : start + 1000], start):
            with contextlib.suppress(OSError):
                status = os.stat(path)
                found[i] = status.st_size, status.st_mtime_ns if times else 0

    with ThreadPoolExecutor(16) as pool:  # over a network, each answer takes long
        list(pool.map(look, range(0, len(paths), 1000)))
    return found


def _digest(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(memoryview(part).nbytes.to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]
