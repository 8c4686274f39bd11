"""Data sets whose pictures are in arrays: MNIST and Fashion-MNIST, CIFAR-10 and -100 in all their forms, 10.1 and C."""

from __future__ import annotations

import gzip
import pickle
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import UserError
from .classnames import packaged_lines, read_lines
from .folders import check_folders, choose_split, find_splits, inner, list_class_pictures, list_folders
from .labelled import LabelledImages, Part, array_data
from .registry import NotThere, data_set

MNIST_SIZES = {"train": 60_000, "test": 10_000}
PREFIXES = {"train": "train", "test": "t10k"}
FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # torchvision's


def load_mnist(name: str, folder: Path, split: str = "test") -> LabelledImages:
    """MNIST or Fashion-MNIST: two idx files a split, `t10k-images-idx3-ubyte` and so on, also with a dot, gzipped, in
    `raw`, or where torchvision puts them."""
    files = _find_mnist(name, folder, split)
    if not files:
        prefix = PREFIXES[split]
        raise NotThere(
            f"{folder} has no {prefix}-images-idx3-ubyte and {prefix}-labels-idx1-ubyte, also not in raw or "
            f"{FOLDERS[name]}/raw or with .gz; put them there or add --download."
        )
    pixels, labels = _read_idx(files[0], 3), _read_idx(files[1], 1)
    classes, templates = packaged_lines(f"{name}-classes.txt"), packaged_lines(f"{name}-templates.txt")
    return array_data([(pixels, labels, files[0])], pixels.shape[1:], classes, templates, files[0], split=split)


def _find_mnist(name: str, folder: Path, split: str) -> list[Path]:
    """The files with images and with labels; none where not both are there."""
    for place in (folder, folder / "raw", folder / FOLDERS[name] / "raw"):
        names = [f"{PREFIXES[split]}-{kind}[-.]idx{number}-ubyte" for kind, number in (("images", 3), ("labels", 1))]
        found = [[*sorted(place.glob(name)), *sorted(place.glob(f"{name}.gz"))] for name in names]
        if all(found):
            return [files[0] for files in found]
    return []


for _name, _class in FOLDERS.items():
    _holds = partial(lambda name, folder: any(_find_mnist(name, folder, split) for split in PREFIXES), _name)
    data_set(_name, MNIST_SIZES, found_in=_holds, torchvision=_class)(partial(load_mnist, _name))


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of an idx file (LeCun's page on MNIST): 0, 0, 8, how many dimensions, their big-endian sizes, data."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        magic = bytes((0, 0, 8, dimensions))
        if content[:4] != magic:
            raise ValueError(f"it starts with {content[:4].hex() or 'nothing'} instead of {magic.hex()}")
        shape = np.frombuffer(content, ">u4", dimensions, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} is damaged or no idx file ({error}); get it anew.") from None


CIFAR_SIZES = {"train": 50_000, "test": 10_000}
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
SEVERITIES = 5
CORRUPTED = {"cifar10-c": ("CIFAR-10-C", "cifar10"), "cifar100-c": ("CIFAR-100-C", "cifar100")}


def load_cifar(name: str, folder: Path, split: str = "test") -> LabelledImages:
    """CIFAR-10 or CIFAR-100 ("fine" classes), unpacked in `folder` or where torchvision does.

    The batches for Python, the binary ones, or pictures in class folders (called as the classes, or by their numbers).
    Batches are read here and not by torchvision, which runs any pickle whose checksum fits; ours may hold numpy arrays
    and plain types only. Class names come from the data's own meta file, with spaces for `_`.
    """
    found = _find_cifar(name, folder)
    if found is None:
        return _from_folders(name, folder, split)
    place, meta, end = found
    files = [place / f"{batch}{end}" for batch in BATCHES[name][split]]
    if missing := [file for file in files + [meta] * (not end) if not file.is_file()]:
        raise UserError(f"There is no {missing[0]}; unpack the whole data set.")
    if end:
        parts = [_binary_batch(file, LABEL_BYTES[name]) for file in files]
        titles = read_lines(meta) if meta.is_file() else packaged_lines(f"{name}-classes.txt")
    else:
        names_key, labels_key = KEYS[name]
        batches = [_pickled(file, "data", labels_key) for file in files]
        parts = [(_channels_last(pixels), labels, file) for (pixels, labels), file in zip(batches, files, strict=True)]
        titles = _pickled(meta, names_key)[0].astype(str).tolist()
    return _data(parts, [title.replace("_", " ") for title in titles], place, split=split)


def _find_cifar(name: str, folder: Path) -> tuple[Path, Path, str] | None:
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
    _register = data_set(_name, CIFAR_SIZES, found_in=partial(_find_cifar, _name), torchvision=_name.upper())
    _register(partial(load_cifar, _name))


def _from_folders(name: str, folder: Path, split: str) -> LabelledImages:
    titles = packaged_lines(f"{name}-classes.txt")
    numbers = [str(number) for number in range(len(titles))]
    splits = find_splits(folder) if folder.is_dir() and list_folders(folder) else {}
    there = [title.replace("_", " ") for place in splits.values() for title in list_folders(place.folder)]
    if {*titles, *numbers}.isdisjoint(there):
        raise NotThere(
            f"{folder} has no {FORMS[name][0][0]}; unpack the Python version of {name} there or add --download "
            f"({FORMS[name][1][0]} and class folders are read too)."
        )
    found, place = choose_split(splits, split, folder)
    called = {title.replace("_", " "): title for title in list_folders(place.folder)}
    wanted = titles if called.keys().isdisjoint(numbers) else numbers
    check_folders(place.folder, list(called), wanted, name)
    images, labels = list_class_pictures(place.folder, [called[title] for title in wanted])
    return LabelledImages(images, labels, titles, packaged_lines(TEMPLATES), split=found, folders=wanted)


def _binary_batch(path: Path, label_bytes: int) -> Part:
    content, size = np.fromfile(path, np.uint8), label_bytes + 3 * 32 * 32
    if len(content) % size:
        raise UserError(f"{path} must hold rows of {size} bytes; get it anew.")
    rows = content.reshape(-1, size)
    return _channels_last(rows[:, label_bytes:]), rows[:, label_bytes - 1], path


def _pickled(path: Path, *keys: str) -> list[np.ndarray]:
    """What a pickled dict has under these keys, which are bytes where Python 3 has written what it had read so."""
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
        return [_rows(content[key] if key in content else content[key.encode()]) for key in keys]
    except Exception as error:  # a damaged pickle raises almost anything
        what = f"{path} is not a pickle of arrays and plain types with {' and '.join(keys)}"
        raise UserError(f"{what} ({type(error).__name__}: {error}); get it anew.") from None


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    """(N, 3072) or (N, 3, 32, 32) as (N, 32, 32, 3); anything else as it is."""
    if pixels.shape[1:] in ((3 * 32 * 32,), (3, 32, 32)):
        return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return pixels


def _rows(found: object) -> np.ndarray:
    if not isinstance(found, list | np.ndarray) or np.ndim(found) == 0:
        raise ValueError("there is something else than rows")
    return np.asarray(found)


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


def _find_new(folder: Path) -> tuple[Path, Path] | None:
    for version in ("v6", "v4"):
        for place in (folder, folder / "datasets"):
            data, labels = (place / f"cifar10.1_{version}_{what}.npy" for what in ("data", "labels"))
            if data.is_file() and labels.is_file():
                return data, labels
    return None


@data_set("cifar10.1", {"test": 2_000}, found_in=_find_new)
def load_new_cifar(folder: Path, split: str = "test") -> LabelledImages:
    """CIFAR-10.1 (Recht et al. 2018): `cifar10.1_v6_data.npy` and `..._labels.npy`, or v4, which has 2,021 images."""
    files = _find_new(folder)
    if files is None:
        raise UserError(f"{folder} has no cifar10.1_v6_data.npy and cifar10.1_v6_labels.npy; put them there.")
    return _data([(_read(files[0]), _read(files[1]), files[0])], packaged_lines("cifar10-classes.txt"), files[0])


def load_corrupted(name: str, folder: Path, split: str = "test") -> LabelledImages:
    """CIFAR-10-C or -100-C (Hendrycks and Dietterich 2019): `CORRUPTION.npy`, five severities after one another.

    `folder`: PATH[/CORRUPTION][/SEVERITY], where `labels.npy` is in PATH or the archive's folder in it.
    """
    archive, classes_of = CORRUPTED[name]
    roots = [root for root in (folder, *folder.parents[:2]) if (inner(root, archive) / "labels.npy").is_file()]
    if not roots:
        raise UserError(f"{folder} has no labels.npy and CORRUPTION.npy of {archive}; put them there.")
    root, place = roots[0], inner(roots[0], archive)
    chosen = [part.removesuffix(".npy") for part in folder.relative_to(root).parts]
    there = sorted(path.stem for path in place.glob("[!.]*.npy") if path.stem != "labels")
    corruptions = [part for part in chosen if part in there]
    severities = [int(part) for part in chosen if part in tuple("12345")]
    if len(corruptions) > 1 or len(severities) > 1 or len(corruptions) + len(severities) < len(chosen) or not there:
        raise UserError(
            f"{place} holds the corruptions {', '.join(there) or 'none'}, in severities 1 to 5; say "
            f"{name}={root}/CORRUPTION/SEVERITY for one of them."
        )
    labels, parts = _read(place / "labels.npy"), []
    count = len(labels) // SEVERITIES
    rows = slice((severities[0] - 1) * count, severities[0] * count) if severities else slice(None)
    for file in (place / f"{corruption}.npy" for corruption in corruptions or there):
        pixels = _read(file, mapped=True)
        if len(pixels) != len(labels) or len(labels) % SEVERITIES:
            raise UserError(f"{file} must have an image for each label, and as many of each severity; get it anew.")
        parts.append((pixels[rows], labels[rows], file))
    return _data(parts, packaged_lines(f"{classes_of}-classes.txt"), place, name="-".join([name, *chosen]))


def holds_corrupted(name: str, folder: Path) -> bool:
    """Whether it is the archive's folder or above it: what is in it does not tell the two apart."""
    root = inner(folder, CORRUPTED[name][0])
    return CORRUPTED[name][0] == root.absolute().name and (root / "labels.npy").is_file()


for _name in CORRUPTED:
    data_set(_name, {"test": None}, found_in=partial(holds_corrupted, _name))(partial(load_corrupted, _name))


def _read(path: Path, mapped: bool = False) -> np.ndarray:
    try:
        return _rows(np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as an array ({error}); get it anew.") from None


def _data(parts: list[Part], classes: list[str], origin: Path, **called: str) -> LabelledImages:
    return array_data(parts, (32, 32, 3), classes, packaged_lines(TEMPLATES), origin, **called)
