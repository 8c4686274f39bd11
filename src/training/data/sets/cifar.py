"""CIFAR-10 and CIFAR-100 in the forms that they are passed around in, and CIFAR-10.1, CIFAR-10-C and CIFAR-100-C."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .classnames import packaged_lines, read_lines
from .folders import check_folders, choose_split, find_splits, inner, list_class_pictures, list_folders
from .labelled import ArrayImages, LabelledImages, check_arrays
from .registry import NotThere, data_set

SIZES = {"train": 50_000, "test": 10_000}
TEMPLATES = "cifar-templates.txt"
BATCHES = {
    "cifar10": {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    "cifar100": {"train": ["train"], "test": ["test"]},
}
# Python pickles and binary files: the folder, the file with names, the ending of the batches.
FORMS = {
    "cifar10": (("cifar-10-batches-py", "batches.meta", ""), ("cifar-10-batches-bin", "batches.meta.txt", ".bin")),
    "cifar100": (("cifar-100-python", "meta", ""), ("cifar-100-binary", "fine_label_names.txt", ".bin")),
}
# In pickles, the keys of names and of labels; in binary files, the bytes of labels before the pixels, the class last.
KEYS = {"cifar10": ("label_names", "labels"), "cifar100": ("fine_label_names", "fine_labels")}
LABEL_BYTES = {"cifar10": 1, "cifar100": 2}
PIXELS = 3 * 32 * 32
SEVERITIES = 5
CORRUPTED = {"cifar10-c": ("CIFAR-10-C", "cifar10"), "cifar100-c": ("CIFAR-100-C", "cifar100")}


def load_cifar(name: str, folder: Path, split: str = "test") -> LabelledImages:
    """CIFAR-10 or CIFAR-100 ("fine" classes), unpacked in `folder` or where torchvision does.

    The batches for Python, the binary ones, or pictures in class folders (called as the classes, or by their numbers).
    Batches are read here and not by torchvision, which runs any pickle whose checksum fits; ours may hold numpy arrays
    and plain types only. Class names come from the data's own meta file, with spaces for `_`.

    Raises:
        NotThere: none of these is there.
        UserError: a file is missing, damaged, or holds anything else.
    """
    found = _find(name, folder)
    if found is None:
        return _from_folders(name, folder, split)
    place, meta, end = found
    files = [place / f"{batch}{end}" for batch in BATCHES[name][split]]
    if end:
        titles = read_lines(meta) if meta.is_file() else packaged_lines(f"{name}-classes.txt")
        parts = [_binary_batch(file, LABEL_BYTES[name], len(titles)) for file in files]
    else:
        names_key, labels_key = KEYS[name]
        titles = _entry(_unpickled(meta), names_key, meta, list)
        titles = [title.decode() if isinstance(title, bytes) else str(title) for title in titles]
        parts = [_pickled_batch(file, labels_key, len(titles)) for file in files]
    pixels = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    images = ArrayImages(np.ascontiguousarray(pixels), str(place))
    titles = [title.replace("_", " ") for title in titles]
    labels = torch.cat([labels for _, labels in parts])
    return LabelledImages(images, labels, titles, packaged_lines(TEMPLATES), split=split)


def _find(name: str, folder: Path) -> tuple[Path, Path, str] | None:
    """The folder with batches, the file with names, and the ending of the batches.

    Class folders are not enough to tell that it is CIFAR: other data have the same classes.
    """
    for subfolder, meta, end in FORMS[name]:
        files = [meta, *(f"{batch}{end}" for batches in BATCHES[name].values() for batch in batches)]
        for place in (folder / subfolder, folder):
            # Not all of them: a file that is missing is worth a sentence of its own. Not one: "meta" may be anything.
            if sum((place / file).is_file() for file in files) > 1:
                return place, place / meta, end
    return None


for _name in BATCHES:
    _register = data_set(_name, SIZES, found_in=partial(_find, _name), torchvision=_name.upper())
    _register(partial(load_cifar, _name))


def _from_folders(name: str, folder: Path, split: str) -> LabelledImages:
    titles = packaged_lines(f"{name}-classes.txt")
    numbers = [str(number) for number in range(len(titles))]
    splits = find_splits(folder) if folder.is_dir() and list_folders(folder) else {}
    there = {
        split: {title.replace("_", " "): title for title in list_folders(place.folder)}
        for split, place in splits.items()
    }
    if all({*titles, *numbers}.isdisjoint(folders) for folders in there.values()):
        raise NotThere(
            f"{folder} has no {FORMS[name][0][0]}; unpack the Python version of {name} there or add --download "
            f"({FORMS[name][1][0]} and class folders are read too)."
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


# ------------------------------------------------------------------------------------------------------ other test sets


def _new_files(folder: Path) -> tuple[Path, Path] | None:
    for place in (folder, folder / "datasets"):
        for version in ("v6", "v4"):
            files = [place / f"cifar10.1_{version}_{what}.npy" for what in ("data", "labels")]
            if all(file.is_file() for file in files):
                return files[0], files[1]
    return None


@data_set("cifar10.1", {"test": 2_000}, found_in=_new_files)
def load_new_cifar(folder: Path, split: str = "test") -> LabelledImages:
    """CIFAR-10.1 (Recht et al. 2018): `cifar10.1_v6_data.npy` and `..._labels.npy`, or v4, which has 2,021 images.

    Raises:
        UserError: they are not there, or hold something else.
    """
    files = _new_files(folder)
    if files is None:
        raise UserError(f"{folder} has no cifar10.1_v6_data.npy and cifar10.1_v6_labels.npy; put them there.")
    return _data([_read(files[0])], _read(files[1]), files[0], "cifar10")


def load_corrupted(name: str, folder: Path, split: str = "test") -> LabelledImages:
    """CIFAR-10-C or -100-C (Hendrycks and Dietterich 2019): `CORRUPTION.npy`, five severities after one another.

    `folder` is PATH, PATH/CORRUPTION, PATH/SEVERITY or PATH/CORRUPTION/SEVERITY, where PATH has `labels.npy` in it (or
    in the archive's folder); all of what is not chosen.

    Raises:
        UserError: they are not there, or hold something else.
    """
    chosen: list[str] = []
    root = folder
    while not (labels_file := inner(root, CORRUPTED[name][0]) / "labels.npy").is_file():
        chosen.insert(0, root.name.removesuffix(".npy"))
        root = root.parent
        if len(chosen) > 2:
            raise UserError(f"{folder} has no labels.npy and CORRUPTION.npy of {CORRUPTED[name][0]}; put them there.")
    there = sorted(path.stem for path in labels_file.parent.glob("[!.]*.npy") if path.stem != "labels")
    corruptions = [part for part in chosen if part in there]
    severities = [int(part) for part in chosen if part in tuple("12345")]
    if len(corruptions) > 1 or len(severities) > 1 or len(corruptions) + len(severities) < len(chosen) or not there:
        raise UserError(
            f"{labels_file.parent} holds the corruptions {', '.join(there) or 'none'}, in severities 1 to 5; say "
            f"{name}={root}/CORRUPTION/SEVERITY for one of them."
        )
    labels, parts = _read(labels_file), []
    for corruption in corruptions or there:
        file = labels_file.with_name(f"{corruption}.npy")
        pixels = _read(file, mapped=True)
        if len(pixels) != len(labels) or len(labels) % SEVERITIES:
            raise UserError(f"{file} must have an image for each label, and as many of each severity; get it anew.")
        count = len(labels) // SEVERITIES
        rows = [slice((severity - 1) * count, severity * count) for severity in severities] or [slice(None)]
        parts += [pixels[part] for part in rows]
    labels = np.tile(labels[rows[0]], len(parts))
    return _data(parts, labels, labels_file.parent, CORRUPTED[name][1], "-".join([name, *chosen]))


def holds_corrupted(name: str, folder: Path) -> bool:
    """Whether it is the archive's folder or above it: what is in it does not tell the two apart."""
    root = inner(folder, CORRUPTED[name][0])
    return CORRUPTED[name][0] == root.absolute().name and (root / "labels.npy").is_file()


for _name in CORRUPTED:
    data_set(_name, {"test": None}, found_in=partial(holds_corrupted, _name))(partial(load_corrupted, _name))


def _read(path: Path, mapped: bool = False) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as an array ({error}); get it anew.") from None


def _data(parts: list[np.ndarray], labels: np.ndarray, origin: Path, classes_of: str, name: str = "") -> LabelledImages:
    classes, pixels = packaged_lines(f"{classes_of}-classes.txt"), np.concatenate(parts)
    labels = check_arrays(pixels, labels, (32, 32, 3), len(classes), origin)
    return LabelledImages(ArrayImages(pixels, str(origin)), labels, classes, packaged_lines(TEMPLATES), name)
