"""MNIST and Fashion-MNIST: idx files."""

from __future__ import annotations

import gzip
import math
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import UserError
from .classnames import packaged_lines
from .labelled import ArrayImages, LabelledImages, check_arrays
from .registry import NotThere, data_set

SIZES = {"train": 60_000, "test": 10_000}
PREFIXES = {"train": "train", "test": "t10k"}
FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # torchvision's


def load_mnist(name: str, folder: Path, split: str = "test") -> LabelledImages:
    """MNIST or Fashion-MNIST: two idx files a split, gzipped or not.

    They are in `folder`, in `raw` or where torchvision puts them (`MNIST/raw`, `FashionMNIST/raw`), and are called
    `t10k-images-idx3-ubyte`, `t10k-images.idx3-ubyte` or the same with `.gz`; `train-...` for training.

    Raises:
        NotThere: a file is missing.
        UserError: a file is damaged.
    """
    files = _find(name, folder, split)
    if files is None:
        prefix = PREFIXES[split]
        raise NotThere(
            f"{folder} has no {prefix}-images-idx3-ubyte and {prefix}-labels-idx1-ubyte, also not in raw or "
            f"{FOLDERS[name]}/raw or with .gz; put them there or add --download."
        )
    pixels, labels = read_idx(files[0], 3), read_idx(files[1], 1)
    classes = packaged_lines(f"{name}-classes.txt")
    labels = check_arrays(pixels, labels, pixels.shape[1:], len(classes), files[0])
    images = ArrayImages(pixels, str(files[0]))
    return LabelledImages(images, labels, classes, packaged_lines(f"{name}-templates.txt"), split=split)


def _find(name: str, folder: Path, split: str) -> tuple[Path, Path] | None:
    """The files with images and with labels."""
    ends = [f"{dot}idx{{}}-ubyte{end}" for end in ("", ".gz") for dot in "-."]
    for place in (folder, folder / "raw", folder / FOLDERS[name] / "raw"):
        images, labels = (
            [file for end in ends if (file := place / f"{PREFIXES[split]}-{kind}{end.format(number)}").is_file()]
            for kind, number in (("images", 3), ("labels", 1))
        )
        if images and labels:
            return images[0], labels[0]
    return None


def _holds(name: str, folder: Path) -> bool:
    return any(_find(name, folder, split) for split in PREFIXES)


for _name, _class in FOLDERS.items():
    data_set(_name, SIZES, found_in=partial(_holds, _name), torchvision=_class)(partial(load_mnist, _name))


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array with that many dimensions in an idx file, gzipped or not.

    The format (LeCun's page on MNIST): two zero bytes, 8 for bytes, the number of dimensions, each size as a big-endian
    32-bit number, the values.

    Raises:
        UserError: it is no such file, or has more or fewer values than its sizes say.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); get it anew.") from None
    magic, start = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    if len(content) < start or content[:4] != magic:
        found = content[:4].hex() or "nothing"
        raise UserError(f"{path} is not an idx file: it starts with {found} instead of {magic.hex()}; get it anew.")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    if len(content) - start != math.prod(shape):
        sizes = " x ".join(map(str, shape))
        held = f"its sizes are {sizes}, but it holds {len(content) - start} values"
        raise UserError(f"{path} is cut off or damaged: {held}; get it anew.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
