"""Images with classes, listed but not decoded: files, members of tar files, or pixels in memory."""

from __future__ import annotations

import contextlib
import copy
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
from ..arrow import ArrowFile
from ..images import load_rgb

with contextlib.suppress(ImportError):  # optional: reads HEIC; here, since every worker process imports this module
    import pillow_heif

    pillow_heif.register_heif_opener()

DEFAULT_TEMPLATES = ("a photo of a {}.",)
# Pillow knows these endings, but needs another program or library for what is in the files, or they are no pictures.
_UNDECODED = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")

_SAMPLES = 32  # pictures whose content counts in a fingerprint, at least; less than twice as many


@cache
def picture_endings() -> frozenset[str]:
    """The endings of files that Pillow and its plugins decode here, such as ".jpg", in lower case."""
    kinds = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in kinds if kind in Image.OPEN and kind not in _UNDECODED)


def is_picture(path: str) -> bool:
    """Whether a file begins as a picture that Pillow decodes."""
    with contextlib.suppress(Exception), Image.open(path):
        return True
    return False


class Images(ABC):
    """Pictures by number, in a fixed order. Each worker process gets a copy, so it is small."""

    each: tuple[str, ...]  # the attributes that are arrays with an entry for each picture

    def __len__(self) -> int:
        return len(getattr(self, self.each[0]))

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
        """A hash of the pictures: pixels in memory, or of files names, sizes, times of change (ns) and some contents.

        docs/evaluation_data.md says what that can miss. `times`: False leaves them out, for what may be copied.
        """

    def subset(self, rows: Tensor) -> Images:
        """The pictures of these numbers, in this order."""
        part = copy.copy(self)
        for name in self.each:
            setattr(part, name, getattr(self, name)[rows.numpy()])
        return part


class ImageFiles(Images):
    """One file a picture: `paths` below `root`, and pixels of `border` to cut off on each side."""

    each = ("paths",)

    def __init__(self, root: str | Path, paths: Sequence[str], border: int = 0):
        self.root, self.border = Path(root), border
        self.paths = np.asarray(paths, dtype=np.str_)  # an array: a list of a million strings is copied by each worker

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
        files = [self.name(i) for i in range(len(self))]
        lines = [*self.paths.tolist(), str(self.border), _sampled(self)]
        return _digest(lines, sizes_and_times(files, times))


class TarImages(Images):
    """Members of uncompressed tar files, read by position. `places`: (N, 3) which of `tars`, offset, bytes."""

    each = ("names", "places")

    def __init__(self, tars: Sequence[Path], names: Sequence[str], places: Sequence[tuple[int, int, int]]):
        self.tars, self.names = list(tars), np.asarray(names, dtype=np.str_)
        self.places = np.asarray(places, dtype=np.int64).reshape(-1, 3)

    def name(self, i: int) -> str:
        return f"{self.tars[self.places[i, 0]]}: {self.names[i]}"

    def content(self, i: int) -> bytes:
        tar, offset, size = self.places[i].tolist()
        with self.tars[tar].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def fingerprint(self, times: bool = True) -> str:
        names = [*(tar.name for tar in self.tars), *self.names.tolist(), _sampled(self)]
        return _digest(names, self.places, sizes_and_times(self.tars, times))


class ArrowImages(Images):
    """Pictures of Arrow files. `places`: (N, 2) which of `files`, row."""

    each = ("places",)

    def __init__(self, files: Sequence[ArrowFile], places: Sequence[tuple[int, int]]):
        self.files, self.places = list(files), np.asarray(places, dtype=np.int64).reshape(-1, 2)

    def name(self, i: int) -> str:
        file, row = self.places[i].tolist()
        return f"{self.files[file].path}, row {row}"

    def content(self, i: int) -> bytes:
        file, row = self.places[i].tolist()
        return self.files[file].picture(row)

    def fingerprint(self, times: bool = True) -> str:
        paths = [file.path for file in self.files]
        return _digest([*map(os.path.basename, paths), _sampled(self)], self.places, sizes_and_times(paths, times))


class ArrayImages(Images):
    """Pixels in memory: (N, H, W) gray or (N, H, W, 3), uint8. `origin`: what they come from, for people."""

    each = ("pixels",)

    def __init__(self, pixels: np.ndarray, origin: str):
        self.pixels, self.origin = pixels, origin

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i]).convert("RGB")

    def name(self, i: int) -> str:
        return f"{self.origin}, row {i}"

    def content(self, i: int) -> bytes:
        return self.pixels[i].tobytes()

    def fingerprint(self, times: bool = True) -> str:
        return _digest([str(self.pixels.shape)], self.pixels)


@dataclass(frozen=True)
class LabelledImages:
    """A data set for classification; nothing is decoded yet.

    templates: prompts with "{}" for the class name, or functions of it.
    name, split: what it is called in results, such as "imagenet-r" and "test".
    imagenet_classes: if the classes are some of ImageNet's: for each class here, its numbers among the 1000 (more than
        one where the class covers several of ImageNet's), so that a classifier for ImageNet can be evaluated.
    folders: where each class is a folder (or a synset), what these are called.
    """

    images: Images  # in a fixed order, the same on every process
    labels: Tensor  # (N,) int64 class of each
    classnames: Sequence[str]  # in the order of the classes, as what follows
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
        return _digest([self.images.fingerprint(times)], self.labels.to(torch.int64).numpy())

    def same_pictures(self, other: LabelledImages) -> bool:
        """Whether `other` has the same pictures, byte by byte, with the same labels in the same order."""
        if len(self) != len(other) or not torch.equal(self.labels, other.labels):
            return False
        pairs = ((_content(self.images, i), _content(other.images, i)) for i in range(len(self)))
        return self.fingerprint() == other.fingerprint() or all(ours == theirs for ours, theirs in pairs)


Part = tuple[np.ndarray, Sequence, Path]  # pixels, their labels, and the file that they come from


def array_data(
    parts: Sequence[Part], shape: Sequence[int], classnames: Sequence[str], templates: Sequence[str],
    origin: Path, **called: str,
) -> LabelledImages:  # fmt: skip
    """Parts of a data set in memory, together; `called`: its name and split.

    Raises: UserError if one is not `shape` of uint8 an image, with the number of a class for each, or has none.
    """
    labels = []
    for pixels, numbers, file in parts:
        numbers = np.asarray(numbers)
        fitting = pixels.dtype == np.uint8 and pixels.shape == (numbers.size, *shape) and numbers.ndim == 1
        whole = numbers.size and numbers.dtype.kind in "iu"
        if not (fitting and whole and 0 <= numbers.min() and numbers.max() < len(classnames)):
            found = f"{pixels.dtype} of {' x '.join(map(str, pixels.shape))} and {numbers.size} labels"
            wanted = f"uint8 images of {' x '.join(map(str, shape))}, each with a label from 0 to {len(classnames) - 1}"
            raise UserError(f"{file} must hold {wanted}, not {found}; get it anew.")
        labels.append(torch.from_numpy(numbers.astype(np.int64)))
    pixels = np.ascontiguousarray(np.concatenate([pixels for pixels, *_ in parts]))
    return LabelledImages(ArrayImages(pixels, str(origin)), torch.cat(labels), classnames, templates, **called)


def _content(images: Images, i: int) -> bytes | None:
    with contextlib.suppress(OSError):  # a link to nowhere, say: a broken picture
        return images.content(i)


def _sampled(images: Images) -> str:
    """A hash of what is in some pictures, evenly spread: other data may have the names, sizes and times of these."""
    places = range(0, len(images), max(1, len(images) // _SAMPLES))
    return _digest([], *(np.frombuffer(_content(images, i) or b"", np.uint8) for i in places))


def sizes_and_times(paths: Sequence[str | Path], times: bool) -> np.ndarray:
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


def _digest(lines: Sequence[str], *arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in ("\n".join(lines).encode(errors="surrogateescape"), *map(np.ascontiguousarray, arrays)):
        digest.update(memoryview(part).nbytes.to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]
