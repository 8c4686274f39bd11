"""CIFAR-10 and CIFAR-100 in the forms that they are passed around in."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .classnames import packaged_lines, read_lines
from .folders import check_folders, choose_split, find_splits, list_class_pictures, list_folders
from .labelled import ArrayImages, LabelledImages, check_arrays
from .registry import NotThere, data_set

SIZES = {"train": 50_000, "test": 10_000}
TEMPLATES = "cifar-templates.txt"
BATCHES = {
    "cifar10": {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    "cifar100": {"train": ["train"], "test": ["test"]},
}
# Python pickles: the folder, the file with names and its key, the key of the labels.
PYTHON = {
    "cifar10": ("cifar-10-batches-py", "batches.meta", "label_names", "labels"),
    "cifar100": ("cifar-100-python", "meta", "fine_label_names", "fine_labels"),
}
# Binary: the folder, the file with names, the bytes of labels before the pixels, of which the last is the class.
BINARY = {
    "cifar10": ("cifar-10-batches-bin", "batches.meta.txt", 1),
    "cifar100": ("cifar-100-binary", "fine_label_names.txt", 2),
}
PIXELS = 3 * 32 * 32


def load_cifar(name: str, folder: Path, split: str = "test") -> LabelledImages:
    """CIFAR-10 or CIFAR-100 ("fine" classes), unpacked in `folder` or where torchvision does.

    The batches for Python, the binary ones, or pictures in class folders (called as the classes, or by their numbers).
    Batches are read here and not by torchvision, which runs any pickle whose checksum fits; ours may hold numpy arrays
    and plain types only. Class names come from the data's own meta file, with spaces for `_`.

    Raises:
        NotThere: none of these is there.
        UserError: a file is missing, damaged, or holds anything else.
    """
    batches = BATCHES[name][split]
    if place := _find(name, folder, *PYTHON[name][:2]):
        _, meta, names_key, labels_key = PYTHON[name]
        titles = _entry(_unpickled(place / meta), names_key, place / meta, list)
        titles = [title.decode() if isinstance(title, bytes) else str(title) for title in titles]
        parts = [_pickled_batch(place / batch, labels_key, len(titles)) for batch in batches]
    elif place := _find(name, folder, *BINARY[name][:2], ".bin"):
        _, meta, label_bytes = BINARY[name]
        titles = read_lines(place / meta) if (place / meta).is_file() else packaged_lines(f"{name}-classes.txt")
        parts = [_binary_batch(place / f"{batch}.bin", label_bytes, len(titles)) for batch in batches]
    else:
        return _from_folders(name, folder, split)
    pixels = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    images = ArrayImages(np.ascontiguousarray(pixels), str(place))
    titles = [title.replace("_", " ") for title in titles]
    labels = torch.cat([labels for _, labels in parts])
    return LabelledImages(images, labels, titles, packaged_lines(TEMPLATES), split=split)


def holds_cifar(name: str, folder: Path) -> bool:
    """Whether there are batches of it. Class folders are not enough: other data have the same classes."""
    forms = ((*PYTHON[name][:2], ""), (*BINARY[name][:2], ".bin"))
    return any(_find(name, folder, *form) for form in forms)


for _name in BATCHES:
    _register = data_set(_name, SIZES, found_in=partial(holds_cifar, _name), torchvision=_name.upper())
    _register(partial(load_cifar, _name))


def _find(name: str, folder: Path, subfolder: str, meta: str, end: str = "") -> Path | None:
    """The folder with the batches."""
    files = [meta, *(f"{batch}{end}" for batches in BATCHES[name].values() for batch in batches)]
    # Not all of them: a file that is missing is worth a sentence of its own. Not only one: "meta" may be anything.
    counts = {place: sum((place / file).is_file() for file in files) for place in (folder / subfolder, folder)}
    return next((place for place, count in counts.items() if count > 1), None)


def _from_folders(name: str, folder: Path, split: str) -> LabelledImages:
    titles = packaged_lines(f"{name}-classes.txt")
    numbers = [str(number) for number in range(len(titles))]
    splits = find_splits(folder) if folder.is_dir() and list_folders(folder) else {}
    there = {
        split: {inside.replace("_", " "): inside for inside in list_folders(place.folder)}
        for split, place in splits.items()
    }
    if all({*titles, *numbers}.isdisjoint(folders) for folders in there.values()):
        raise NotThere(
            f"{folder} has no {PYTHON[name][0]}; unpack the Python version of {name} there or add --download "
            f"({BINARY[name][0]} and class folders are read too)."
        )
    found, place = choose_split(splits, split, folder)
    wanted = numbers if set(numbers) & set(there[found]) else titles
    check_folders(place.folder, list(there[found]), wanted, name)
    images, labels = list_class_pictures(place.folder, [there[found][title] for title in wanted])
    return LabelledImages(images, labels, titles, packaged_lines(TEMPLATES), split=found, folders=wanted)


def _binary_batch(path: Path, label_bytes: int, classes: int) -> tuple[np.ndarray, Tensor]:
    """(N, 3072) uint8 pixels and (N,) int64 labels of one batch: each row is the labels and the pixels."""
    if not path.is_file():
        raise UserError(f"There is no {path}; unpack the whole data set.")
    content = np.fromfile(path, np.uint8)
    if len(content) % (label_bytes + PIXELS):
        raise UserError(f"{path} must hold rows of {label_bytes + PIXELS} bytes; get it anew.")
    rows = content.reshape(-1, label_bytes + PIXELS)
    pixels = rows[:, label_bytes:]
    return pixels, check_arrays(pixels, rows[:, label_bytes - 1], (PIXELS,), classes, path)


def _pickled_batch(path: Path, labels_key: str, classes: int) -> tuple[np.ndarray, Tensor]:
    batch = _unpickled(path)
    data, labels = _entry(batch, "data", path, np.ndarray), _entry(batch, labels_key, path, (list, np.ndarray))
    data = data.reshape(len(data), PIXELS) if data.shape[1:] == (3, 32, 32) else data
    return data, check_arrays(data, labels, (PIXELS,), classes, path)


def _entry(content: object, key: str, path: Path, kind: type | tuple[type, ...]) -> object:
    """What a pickled dict has under a key, which is bytes where Python 3 has written what it had read so."""
    found = content.get(key, content.get(key.encode())) if isinstance(content, dict) else None
    if not isinstance(found, kind):
        raise UserError(f"{path} has no {key!r}, so it is not a file of this data set; get it anew.")
    return found


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and plain types; never runs anything else that a pickle may ask for."""

    # The names that numpy 1 and 2 pickle arrays under; `_codecs.encode` is how Python 3 pickles bytes for Python 2.
    ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        **{(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0] for core in ("core", "_core")},
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
