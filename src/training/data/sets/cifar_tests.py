"""Other test sets for the classes of CIFAR: CIFAR-10.1, CIFAR-10-C and CIFAR-100-C, as numpy files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from ...errors import UserError
from .cifar import TEMPLATES
from .classnames import packaged_lines
from .labelled import ArrayImages, LabelledImages, check_arrays
from .registry import data_set

SEVERITIES = 5
CORRUPTED = {"cifar10-c": ("CIFAR-10-C", "cifar10"), "cifar100-c": ("CIFAR-100-C", "cifar100")}


def _new_files(folder: Path) -> tuple[Path, Path] | None:
    for place in (folder, folder / "datasets"):
        for version in ("v6", "v4"):
            files = [place / f"cifar10.1_{version}_{what}.npy" for what in ("data", "labels")]
            if all(file.is_file() for file in files):
                return files[0], files[1]
    return None


@data_set("cifar10.1", {"test": 2_000}, found_in=lambda folder: _new_files(folder) is not None)
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
    while not (labels_file := _root(name, root) / "labels.npy").is_file():
        chosen.insert(0, root.name.removesuffix(".npy"))
        root = root.parent
        if len(chosen) > 2:
            raise UserError(f"{folder} has no labels.npy and CORRUPTION.npy of {CORRUPTED[name][0]}; put them there.")
    there = sorted(path.stem for path in labels_file.parent.glob("[!.]*.npy") if path.stem != "labels")
    corruptions = [part for part in chosen if part in there]
    severities = [int(part) for part in chosen if part in ("1", "2", "3", "4", "5")]
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
    root = _root(name, folder)
    return CORRUPTED[name][0] == root.absolute().name and (root / "labels.npy").is_file()


for _name in CORRUPTED:
    data_set(_name, {"test": None}, found_in=partial(holds_corrupted, _name))(partial(load_corrupted, _name))


def _root(name: str, folder: Path) -> Path:
    inner = folder / CORRUPTED[name][0]
    return inner if inner.is_dir() else folder


def _read(path: Path, mapped: bool = False) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as an array ({error}); get it anew.") from None


def _data(parts: list[np.ndarray], labels: np.ndarray, origin: Path, classes_of: str, name: str = "") -> LabelledImages:
    classes, pixels = packaged_lines(f"{classes_of}-classes.txt"), np.concatenate(parts)
    labels = check_arrays(pixels, labels, (32, 32, 3), len(classes), origin)
    return LabelledImages(ArrayImages(pixels, str(origin)), labels, classes, packaged_lines(TEMPLATES), name)
