"""ImageNet and the test sets made for its classes: V2, R, A and Sketch.

The order of the 1000 classes is that of their sorted synsets (WordNet ids such as n01440764), as everywhere but in the
numbers of the ILSVRC development kit.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UserError
from .folders import (
    Place,
    check_folders,
    choose_split,
    find_splits,
    list_class_pictures,
    list_folders,
    list_pictures,
    list_shard_pictures,
    list_shards,
    own_split,
)
from .labelled import ImageFiles, Images, LabelledImages

# Where a split is below the folder that is given: plain, Kaggle's and ILSVRC's, and what the archives are called.
SPLIT_FOLDERS = {
    "train": ("train", "training", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "ILSVRC2012_img_train"),
    "val": ("val", "validation", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "ILSVRC2012_img_val"),
}
# The folders of the published archives, and those that the package imagenetv2_pytorch makes of them.
V2_FOLDERS = {
    "imagenet-v2": ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency"),
    "imagenet-v2-threshold-0.7": ("imagenetv2-threshold0.7-format-val", "ImageNetV2-threshold-0.7"),
    "imagenet-v2-top-images": ("imagenetv2-top-images-format-val", "ImageNetV2-top-images"),
}
# Title for people, and the folders of the published archives.
SYNSET_SETS = {
    "imagenet-r": ("ImageNet-R", ("imagenet-r",)),
    "imagenet-a": ("ImageNet-A", ("imagenet-a",)),
    "imagenet-sketch": ("ImageNet-Sketch", ("sketch", "imagenet-sketch")),
}
KAGGLE_LABELS = "LOC_val_solution.csv"
DEVKIT_LABELS = "ILSVRC2012_validation_ground_truth.txt"
DEVKIT_FOLDERS = ("", "data", "ILSVRC2012_devkit_t12/data", "devkit/data", "ILSVRC/devkit/data")
SYNSET = re.compile(r"n\d{8}")
VAL_PICTURE = re.compile(r"ILSVRC2012_val_(\d{8})", re.IGNORECASE)


def load_imagenet(folder: Path, split: str = "test") -> LabelledImages:
    """ImageNet (ILSVRC 2012); "test" is the validation set, whose classes are public.

    `folder` has the splits in it (see `SPLIT_FOLDERS`), or is one itself. A split is class folders called after
    synsets, or shards with `cls` from 0 to 999; the validation set may also be the flat `ILSVRC2012_val_00000001.JPEG`
    and so on with Kaggle's `LOC_val_solution.csv` or the development kit's ground truth and `meta.mat`.

    Raises:
        UserError: the split is not there, or its classes are not ImageNet's.
    """
    splits = _splits(folder)
    found, place = choose_split(splits, "val" if split == "test" and split not in splits else split, folder)
    if place.shards:
        images, labels = list_shard_pictures(place.shards, len(imagenet_synsets()), "ImageNet")
    elif list_folders(place.folder):
        images, labels = _synset_pictures(place.folder, imagenet_synsets(), "ImageNet")
    elif found == "train":
        raise UserError(f"{place.folder} holds neither class folders nor .tar shards.")
    else:
        images, labels = _flat_pictures(place.folder, folder)
    return _imagenet(images, labels, range(len(imagenet_synsets())), found)


def load_imagenet_v2(folder: Path, name: str = "imagenet-v2") -> LabelledImages:
    """ImageNet-V2 (Recht et al. 2019): class folders named 0 to 999, in `folder` or in the folder of its archive.

    Args:
        name: "imagenet-v2" (the matched-frequency images) or one of the other two in `V2_FOLDERS`.

    Raises:
        UserError: the class folders are others, or those of another variant.
    """
    folder = _inner(folder, V2_FOLDERS[name])
    others = {inner: other for other, inners in V2_FOLDERS.items() if other != name for inner in inners}
    other = next((inner for inner in others if folder.absolute().name == inner or (folder / inner).is_dir()), None)
    if other is not None:
        raise UserError(f"{folder} holds {other}; say {others[other]}={folder} for it.")
    classes = list_folders(folder)
    check_folders(folder, classes, [str(i) for i in range(len(imagenet_synsets()))], "ImageNet-V2")
    return _imagenet(*list_class_pictures(folder, classes), range(len(classes)), "test")


def load_synset_set(folder: Path, name: str) -> LabelledImages:
    """ImageNet-R (Hendrycks et al. 2021a), -A (2021b) or -Sketch (Wang et al. 2019): class folders named by synset.

    Their classes are 200, 200 and 1000 of ImageNet's, in ImageNet's order.

    Args:
        folder: that of the class folders, or the one that the archive was unpacked in.

    Raises:
        UserError: the class folders are not exactly those of the data set.
    """
    title, inner = SYNSET_SETS[name]
    folder = _inner(folder, inner)
    synsets = imagenet_synsets() if name == "imagenet-sketch" else subset_synsets(name)
    numbers = {synset: i for i, synset in enumerate(imagenet_synsets())}
    return _imagenet(*_synset_pictures(folder, synsets, title), [numbers[synset] for synset in synsets], "test")


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """The 1000 synsets in the order of the classes, from timm."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def subset_synsets(name: str) -> tuple[str, ...]:
    """The 200 synsets of "imagenet-r" or "imagenet-a" in ImageNet's order, from the lists that timm carries.

    Raises:
        UserError: the installed timm has none.
    """
    path = resources.files("timm.data").joinpath("_info", f"{name.replace('-', '_')}_synsets.txt")
    if not path.is_file():
        raise UserError(f"The installed timm has no list of the classes of {name}; install timm>=1.0.17.")
    return tuple(sorted(path.read_text(encoding="utf-8").split()))


def is_imagenet_layout(folder: Path) -> bool:
    """Whether `folder` can only be ImageNet's: class folders called after synsets, or the flat validation set."""
    for place in _splits(folder).values():
        classes = list_folders(place.folder)
        if classes and not place.shards and all(SYNSET.fullmatch(name) for name in classes):
            return True
        if not classes and any(VAL_PICTURE.match(path) for path in list_pictures(place.folder)[:1]):
            return True
    return False


def _splits(folder: Path) -> dict[str, Place]:
    # Folders before .tar files, since those may be the archives that the folders came from (ILSVRC2012_img_train.tar).
    splits = {}
    for split, names in SPLIT_FOLDERS.items():
        place = next((folder / name for name in names if (folder / name).is_dir()), None)
        if place is not None:
            splits[split] = Place(place, () if _has_synsets(place) else tuple(list_shards(place)))
    if splits:
        return splits
    if not _has_synsets(folder) and list_shards(folder):
        return find_splits(folder, "val")
    if not list_folders(folder) and not list_pictures(folder):
        raise UserError(f"{folder} holds neither class folders nor .tar shards.")
    return {own_split(folder, "val"): Place(folder)}


def _has_synsets(folder: Path) -> bool:
    return any(SYNSET.fullmatch(name) for name in list_folders(folder))


def _inner(folder: Path, names: Sequence[str]) -> Path:
    return next((folder / name for name in names if (folder / name).is_dir()), folder)


def _imagenet(images: Images, labels: Tensor, classes: Sequence[int], split: str) -> LabelledImages:
    """`classes`: the numbers of the data's classes among ImageNet's 1000."""
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    all_of_them = len(classes) == len(IMAGENET_CLASSNAMES)
    return LabelledImages(
        images,
        labels,
        IMAGENET_CLASSNAMES if all_of_them else [IMAGENET_CLASSNAMES[i] for i in classes],
        OPENAI_IMAGENET_TEMPLATES,
        split=split,
        imagenet_classes=[[i] for i in classes],
    )


def _synset_pictures(folder: Path, synsets: Sequence[str], title: str) -> tuple[ImageFiles, Tensor]:
    check_folders(folder, list_folders(folder), synsets, title)
    return list_class_pictures(folder, synsets)


# -------------------------------------------------------------------------------------------- the flat validation set


def _flat_pictures(folder: Path, root: Path) -> tuple[ImageFiles, Tensor]:
    """Pictures without class folders; the labels are near them, or near `root`, or in a folder above."""
    paths = list_pictures(folder)
    if not paths:
        raise UserError(f"{folder} holds neither class folders nor .tar shards.")
    matches = [VAL_PICTURE.match(path) for path in paths]
    if None in matches:
        wrong = paths[matches.index(None)]
        raise UserError(f"{folder} has no class folders, and {wrong} is not named like ILSVRC2012_val_00000001.JPEG.")
    # Labels go by the number in the name: counting files would shift them all where one is missing.
    numbers = [int(match[1]) for match in matches if match]
    labels_file, labels = _validation_labels(folder, root)
    missing = next((i for i, number in enumerate(numbers) if number not in labels), None)
    if missing is not None:
        raise UserError(f"{labels_file} has no class for {paths[missing]}; use the whole file.")
    classes = {synset: i for i, synset in enumerate(imagenet_synsets())}
    unknown = next((synset for synset in labels.values() if synset not in classes), None)
    if unknown is not None:
        raise UserError(f"{labels_file} names the class {unknown!r}, which is not one of ImageNet's 1000 synsets.")
    return ImageFiles(folder, paths), torch.tensor([classes[labels[number]] for number in numbers])


def _validation_labels(folder: Path, root: Path) -> tuple[Path, dict[int, str]]:
    """The file with labels, and the synset of each picture by its number."""
    for place in dict.fromkeys((root, folder, *folder.absolute().parents[:5])):
        if (path := place / KAGGLE_LABELS).is_file():
            return path, _read_kaggle(path)
        for name in DEVKIT_FOLDERS:
            if (path := place / name / DEVKIT_LABELS).is_file():
                return path, _read_devkit(path)
    raise UserError(f"{folder} has no class folders; put {KAGGLE_LABELS} or the kit ILSVRC2012_devkit_t12 into {root}.")


def _read_kaggle(path: Path) -> dict[int, str]:
    """Rows such as `ILSVRC2012_val_00048981,n03995372 85 1 499 272`: the picture, its class and its boxes."""
    labels = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            match = VAL_PICTURE.match(row.get("ImageId") or "")
            synset = (row.get("PredictionString") or "").split()[:1]
            if not (match and synset):
                raise UserError(f"{path} must have rows of ImageId and PredictionString; get it anew.")
            labels[int(match[1])] = synset[0]
    return labels


def _read_devkit(path: Path) -> dict[int, str]:
    """A number from 1 to 1000 a line, which is not the class: `meta.mat` says which synset it stands for."""
    meta = path.with_name("meta.mat")
    if not meta.is_file():
        raise UserError(f"There is no {meta}, which says what the numbers in {path.name} stand for; get the whole kit.")
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"Reading {meta} needs scipy; install it, or put {KAGGLE_LABELS} next to it.") from None
    try:
        table = loadmat(meta, squeeze_me=True)["synsets"].reshape(-1)
        synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    except Exception as error:  # a damaged file raises almost anything
        raise UserError(f"{meta} is not the meta.mat of ILSVRC 2012 ({error}); get it anew.") from None
    try:
        numbers = [int(line) for line in path.read_text(encoding="ascii").split()]
        return {picture: synsets[number] for picture, number in enumerate(numbers, start=1)}
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} must hold the number of a class in {meta.name} a line ({error}).") from None
