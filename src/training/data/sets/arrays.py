"""Data sets that come as arrays of pixels: MNIST and its like (idx files), CIFAR (batches of Python pickles)."""

from __future__ import annotations

import gzip
import math
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.error import URLError

import numpy as np
import torch

from ...errors import UserError
from .folders import packaged_lines
from .labelled import ArrayImages, LabelledImages

IDX_UINT8 = 0x08  # the type code; see the description of the format at the end of LeCun's page on MNIST
MNIST_PREFIXES = {"train": "train", "test": "t10k"}
MNIST_FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # torchvision's
CIFAR_FILES = {
    "cifar10": ("cifar-10-batches-py", "batches.meta", "label_names", "labels"),
    "cifar100": ("cifar-100-python", "meta", "fine_label_names", "fine_labels"),
}
CIFAR_BATCHES = {
    ("cifar10", "train"): tuple(f"data_batch_{i}" for i in range(1, 6)),
    ("cifar10", "test"): ("test_batch",),
    ("cifar100", "train"): ("train",),
    ("cifar100", "test"): ("test",),
}
CIFAR_PIXELS = (3, 32, 32)
Kind = TypeVar("Kind")


# -------------------------------------------------------------------------------------------------- MNIST and its like


def load_mnist(folder: Path, name: str, split: str, download: bool = False) -> LabelledImages:
    """MNIST or Fashion-MNIST: two idx files a split, gzipped or not.

    They are in `folder`, in `raw` or where torchvision puts them (`MNIST/raw`, `FashionMNIST/raw`), and are called
    `t10k-images-idx3-ubyte`, `t10k-images.idx3-ubyte` or the same with `.gz`; `train-...` for training.

    Args:
        name: "mnist" or "fashion-mnist".
        split: "train" or "test".
        download: let torchvision fetch them (with its checksums) if they are not there.

    Raises:
        UserError: a file is missing or damaged.
    """
    files = find_mnist(folder, name, split)
    if files is None and download:
        from torchvision import datasets

        _download(getattr(datasets, MNIST_FOLDERS[name]), folder, name)
        files = find_mnist(folder, name, split)
    if files is None:
        prefix = MNIST_PREFIXES[split]
        raise UserError(
            f"{folder} has no {prefix}-images-idx3-ubyte and {prefix}-labels-idx1-ubyte, also not in raw or "
            f"{MNIST_FOLDERS[name]}/raw or with .gz; put them there or add --download."
        )
    pixels, labels = read_idx(files[0], 3), read_idx(files[1], 1)
    classes = packaged_lines(f"{name}-classes.txt")
    if len(pixels) != len(labels):
        raise UserError(f"{files[0]} has {len(pixels)} images, but {files[1]} has {len(labels)} labels.")
    if not len(labels) or labels.max() >= len(classes):
        raise UserError(f"{files[1]} must hold labels from 0 to {len(classes) - 1}, and at least one.")
    return LabelledImages(
        ArrayImages(pixels, str(files[0])),
        torch.from_numpy(labels.astype(np.int64)),
        classes,
        packaged_lines(f"{name}-templates.txt"),
        split=split,
    )


def find_mnist(folder: Path, name: str, split: str) -> tuple[Path, Path] | None:
    """The files with images and with labels, or None."""
    for place in (folder, folder / "raw", folder / MNIST_FOLDERS[name] / "raw"):
        files = [_idx_file(place, MNIST_PREFIXES[split], kind) for kind in ("images{}idx3", "labels{}idx1")]
        if None not in files:
            return files[0], files[1]
    return None


def _idx_file(folder: Path, prefix: str, kind: str) -> Path | None:
    names = (f"{prefix}-{kind.format(dot)}-ubyte{end}" for end in ("", ".gz") for dot in "-.")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array with that many dimensions in an idx file, gzipped or not.

    The format: two zero bytes, the type, the number of dimensions, each size as a big-endian 32-bit number, the values.

    Raises:
        UserError: it is no such file, or has more or fewer values than its sizes say.
    """
    opened: Callable = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); get it anew.") from None
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes((0, 0, IDX_UINT8, dimensions)):
        raise UserError(
            f"{path} is not an idx file of bytes with {dimensions} dimension{'s' * (dimensions > 1)}: it starts with "
            f"{content[:4].hex() or 'nothing'} instead of {bytes((0, 0, IDX_UINT8, dimensions)).hex()}; get it anew."
        )
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    if len(content) - start != math.prod(shape):
        raise UserError(
            f"{path} is cut off or damaged: its sizes are {' x '.join(map(str, shape))}, but it holds "
            f"{len(content) - start} values; get it anew."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# -------------------------------------------------------------------------------------------------------------- CIFAR


def load_cifar(folder: Path, name: str, split: str, download: bool = False) -> LabelledImages:
    """CIFAR-10 or CIFAR-100 ("fine" classes): the batches for Python, unpacked in `folder` or where torchvision does.

    The batches are read here and not by torchvision, which runs any pickle whose checksum fits; ours may hold numpy
    arrays and plain types only. Class names come from the data's own meta file, with spaces for `_`.

    Args:
        name: "cifar10" or "cifar100".
        split: "train" or "test".
        download: let torchvision fetch them (with its checksums) if they are not there.

    Raises:
        UserError: a file is missing, damaged, or holds anything else.
    """
    place = find_cifar(folder, name)
    subfolder, meta, names_key, labels_key = CIFAR_FILES[name]
    if place is None and download:
        from torchvision import datasets

        _download(getattr(datasets, name.upper()), folder, name)
        place = find_cifar(folder, name)
    if place is None:
        raise UserError(f"{folder} has no {subfolder}; unpack the Python version of {name} there or add --download.")
    titles = _entry(_unpickled(place / meta), names_key, place / meta, list)
    classes = [str(title).replace("_", " ") for title in titles]
    pixels, labels = zip(
        *(_cifar_batch(place / batch, labels_key, len(classes)) for batch in CIFAR_BATCHES[name, split]), strict=True
    )
    return LabelledImages(
        ArrayImages(np.concatenate(pixels), str(place)),
        torch.from_numpy(np.concatenate(labels)),
        classes,
        packaged_lines("cifar-templates.txt"),
        split=split,
    )


def find_cifar(folder: Path, name: str) -> Path | None:
    """The folder with the batches, or None."""
    subfolder, meta, *_ = CIFAR_FILES[name]
    files = [meta, *CIFAR_BATCHES[name, "train"], *CIFAR_BATCHES[name, "test"]]
    # Not all of them: a file that is missing is worth a sentence of its own. Not only one: "meta" may be anything.
    counts = {place: sum((place / file).is_file() for file in files) for place in (folder / subfolder, folder)}
    return next((place for place, count in counts.items() if count > 1), None)


def _cifar_batch(path: Path, labels_key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 32, 32, 3) uint8 and labels (N,) int64 of one batch."""
    batch = _unpickled(path)
    data, labels = _entry(batch, "data", path, np.ndarray), _entry(batch, labels_key, path, list)
    if data.dtype != np.uint8 or data.ndim != 2 or not len(data) or data.shape[1] != math.prod(CIFAR_PIXELS):
        raise UserError(f"{path} must hold uint8 rows of {math.prod(CIFAR_PIXELS)} values as 'data'; get it anew.")
    if len(labels) != len(data) or not all(isinstance(label, int) and 0 <= label < classes for label in labels):
        raise UserError(f"{path} must hold {len(data)} numbers from 0 to {classes - 1} as {labels_key!r}; get it anew.")
    pixels = data.reshape(-1, *CIFAR_PIXELS).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), np.array(labels, dtype=np.int64)


def _entry(content: object, key: str, path: Path, kind: type[Kind]) -> Kind:
    if not (isinstance(content, dict) and isinstance(content.get(key), kind)):
        raise UserError(f"{path} has no {key!r}, so it is not a file of this data set; get it anew.")
    return content[key]


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and plain types; never runs anything else that a pickle may ask for."""

    # The names that numpy 1 and 2 pickle arrays under; `_codecs.encode` is how Python 3 pickles bytes for Python 2.
    ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return self.ALLOWED[module, name]


def _unpickled(path: Path) -> object:
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except FileNotFoundError:
        raise UserError(f"There is no {path}; unpack the whole data set.") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path} is not a pickle of arrays and plain types ({error}); get it anew.") from None


# ----------------------------------------------------------------------------------------------------------- download


def _download(dataset: Callable, folder: Path, name: str) -> None:
    """Fetched once by whichever process on this machine comes first; the others find it done."""
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            dataset(str(folder), download=True)
    except (OSError, RuntimeError, URLError) as error:
        raise UserError(f"{name} cannot be downloaded to {folder} ({error}); put its files there yourself.") from None
