"""ImageNet, the test sets made for its classes (V2, R, A and Sketch), and Tiny-ImageNet.

The order of the 1000 classes is that of their sorted synsets (WordNet ids such as n01440764), as everywhere but in the
numbers of the ILSVRC development kit.
"""

from __future__ import annotations

import csv
import os
import re
from dataclasses import replace
from functools import cache, partial
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UserError
from . import folders
from .classnames import read_lines
from .labelled import ImageFiles, LabelledImages
from .registry import data_set

SIZES = {"train": 1_281_167, "val": 50_000}
# Where a split is below the folder that is given: plain, Kaggle's and ILSVRC's, and what the archives are called.
SPLIT_FOLDERS = {
    "train": ("train", "training", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "ILSVRC2012_img_train"),
    "val": ("val", "validation", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "ILSVRC2012_img_val"),
}
V2 = "ImageNet-V2"
# Title for people, number of images, and the folders of the published archives (and of the package imagenetv2_pytorch).
TEST_SETS = {
    "imagenet-v2": (V2, 10_000, ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency")),
    "imagenet-v2-threshold-0.7": (V2, 10_000, ("imagenetv2-threshold0.7-format-val", "ImageNetV2-threshold-0.7")),
    "imagenet-v2-top-images": (V2, 10_000, ("imagenetv2-top-images-format-val", "ImageNetV2-top-images")),
    "imagenet-r": ("ImageNet-R", 30_000, ("imagenet-r",)),
    "imagenet-a": ("ImageNet-A", 7_500, ("imagenet-a",)),
    "imagenet-sketch": ("ImageNet-Sketch", 50_889, ("sketch", "imagenet-sketch")),
}
KAGGLE_LABELS = "LOC_val_solution.csv"
DEVKIT_LABELS = "ILSVRC2012_validation_ground_truth.txt"
DEVKIT_FOLDERS = ("", "data/", "ILSVRC2012_devkit_t12/data/", "devkit/data/", "ILSVRC/devkit/data/")
TINY = "tiny-imagenet-200"
SYNSET = re.compile(r"n\d{8}")
VAL_PICTURE = re.compile(r"ILSVRC2012_val_(\d{8})", re.IGNORECASE)


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """The 1000 synsets in the order of the classes, from timm."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def class_numbers() -> dict[str, int]:
    """The number of each synset among the 1000."""
    return {synset: number for number, synset in enumerate(imagenet_synsets())}


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


def as_imagenet(data: LabelledImages) -> LabelledImages:
    """`data` with ImageNet's names and prompts; its folders are called after synsets, or are all by their numbers."""
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    classes = [class_numbers().get(folder, place) for place, folder in enumerate(data.folders)]
    whole = classes == list(range(len(IMAGENET_CLASSNAMES)))
    names = IMAGENET_CLASSNAMES if whole else [IMAGENET_CLASSNAMES[i] for i in classes]
    templates = OPENAI_IMAGENET_TEMPLATES
    return replace(data, classnames=names, templates=templates, imagenet_classes=[[i] for i in classes])


def holds_imagenet(folder: Path) -> bool:
    """Whether `folder` can only be ImageNet's: class folders called after synsets, or the flat validation set.

    Some of the 1000 classes alone are other data.
    """
    if (folder / "wnids.txt").is_file():
        return False  # Tiny-ImageNet
    for place in _splits(folder).values():
        classes = folders.list_folders(place.folder)
        if classes and not place.shards and all(SYNSET.fullmatch(name) for name in classes):
            # Then `any_data` finds them as well.
            plain = place.folder == folder or place.folder.name.lower() in folders.SPLIT_WORDS
            return not (plain and set(classes) < set(imagenet_synsets()))
        if not classes and any(VAL_PICTURE.match(path) for path in folders.list_pictures(place.folder)[0][:1]):
            return True
    return False


@data_set("imagenet", SIZES, found_in=holds_imagenet, aliases=("imagenet1k", "ilsvrc2012"))
def load_imagenet(folder: Path, split: str = "val") -> LabelledImages:
    """ImageNet (ILSVRC 2012), whose validation set has public classes.

    `folder` has the splits in it (see `SPLIT_FOLDERS`), or is one itself. A split is class folders called after
    synsets, or shards with `cls` from 0 to 999; the validation set may also be the flat `ILSVRC2012_val_00000001.JPEG`
    and so on with Kaggle's `LOC_val_solution.csv` or the development kit's ground truth and `meta.mat`.

    Raises:
        UserError: the split is not there, or its classes are not ImageNet's.
    """
    splits = _splits(folder)
    if not splits:
        raise folders.nothing_in(folder)
    found, place = folders.choose_split(splits, split, folder)
    synsets = imagenet_synsets()
    if place.shards:
        images, labels = folders.list_shard_pictures(place.shards)
        folders.check_numbers(images, labels, len(synsets), "ImageNet")
    elif there := folders.list_folders(place.folder):
        remedy = f"; for the classes that are there, say folder={folder}"
        folders.check_folders(place.folder, there, synsets, "ImageNet", remedy)
        images, labels = folders.list_class_pictures(place.folder, synsets)
    elif found == "train":
        raise folders.nothing_in(place.folder)
    else:
        images, labels = _flat_pictures(place.folder, folder)
    return as_imagenet(LabelledImages(images, labels, (), split=found, folders=synsets))


def load_test_set(name: str, folder: Path, split: str = "test") -> LabelledImages:
    """ImageNet-V2 (Recht et al. 2019), -R (Hendrycks et al. 2021a), -A (2021b) or -Sketch (Wang et al. 2019).

    V2's class folders are named 0 to 999, those of the others by synset: 200, 200 and all of ImageNet's.

    Args:
        name: a key of `TEST_SETS`; "imagenet-v2" has the matched-frequency images.
        folder: that of the class folders, or the one that the archive was unpacked in.

    Raises:
        UserError: the class folders are not exactly those of the data set, or those of another variant of V2.
    """
    title, _, inside = TEST_SETS[name]
    folder = folders.inner(folder, *inside)
    for other, (title_of_other, _, places) in TEST_SETS.items():
        wrong = next((place for place in places if folder.absolute().name == place or (folder / place).is_dir()), None)
        if wrong is not None and other != name and title_of_other == title:
            raise UserError(f"{folder} holds {wrong}; say {other}={folder} for it.")
    classes = _classes_of(name)
    folders.check_folders(folder, folders.list_folders(folder), classes, title)
    return as_imagenet(LabelledImages(*folders.list_class_pictures(folder, classes), (), folders=classes))


def _classes_of(name: str) -> list[str]:
    """The class folders of one of `TEST_SETS`."""
    if name.startswith("imagenet-v2"):
        return [str(number) for number in range(len(imagenet_synsets()))]
    return list(imagenet_synsets() if name == "imagenet-sketch" else subset_synsets(name))


def holds_test_set(name: str, folder: Path) -> bool:
    """Whether `folder` has the archive's folder or is it, or has its classes and is no other variant's."""
    title, _, places = TEST_SETS[name]
    called, root = folder.absolute().name, folders.inner(folder, *places)
    if title == V2 and (root != folder or any(called in known[2] for known in TEST_SETS.values())):
        return root != folder or called in places
    return name in ("imagenet-v2", "imagenet-r", "imagenet-a") and folders.list_folders(root) == _classes_of(name)


for _name, (_, _size, _) in TEST_SETS.items():
    _aliases = ("imagenet-v2-matched-frequency",) * (_name == "imagenet-v2")
    _register = data_set(_name, {"test": _size}, found_in=partial(holds_test_set, _name), aliases=_aliases)
    _register(partial(load_test_set, _name))


def _splits(folder: Path) -> dict[str, folders.Place]:
    # Folders before .tar files, since those may be the archives that the folders came from (ILSVRC2012_img_train.tar).
    splits = {}
    for split, names in SPLIT_FOLDERS.items():
        if (place := folders.inner(folder, *names)) != folder:
            splits[split] = folders.Place(place, () if _has_synsets(place) else tuple(folders.list_shards(place)))
    if not splits and not _has_synsets(folder) and folders.list_shards(folder):
        return folders.find_splits(folder, "val")
    if not splits and (folders.list_folders(folder) or folders.list_pictures(folder)[0]):
        return {folders.own_split(folder, "val"): folders.Place(folder)}
    return splits


def _has_synsets(folder: Path) -> bool:
    return any(SYNSET.fullmatch(name) for name in folders.list_folders(folder))


# -------------------------------------------------------------------------------------------- the flat validation set


def _flat_pictures(folder: Path, root: Path) -> tuple[ImageFiles, Tensor]:
    """Pictures without class folders; the labels are near them, or near `root`, or in a folder above."""
    paths = folders.list_pictures(folder)[0]
    if not paths:
        raise folders.nothing_in(folder)
    matches = {path: VAL_PICTURE.match(path) for path in paths}
    if wrong := next((path for path, match in matches.items() if match is None), None):
        raise UserError(f"{folder} has no class folders, and {wrong} is not named like ILSVRC2012_val_00000001.JPEG.")
    labels_file, labels = _validation_labels(folder, root)
    # Labels go by the number in the name: counting files would shift them all where one is missing.
    synsets = {path: labels.get(int(match[1])) for path, match in matches.items()}
    if missing := next((path for path, synset in synsets.items() if synset is None), None):
        raise UserError(f"{labels_file} has no class for {missing}; use the whole file.")
    if unknown := next((synset for synset in synsets.values() if synset not in class_numbers()), None):
        raise UserError(f"{labels_file} names the class {unknown!r}, which is not one of ImageNet's 1000 synsets.")
    return ImageFiles(folder, paths), torch.tensor([class_numbers()[synset] for synset in synsets.values()])


def _validation_labels(folder: Path, root: Path) -> tuple[Path, dict[int, str]]:
    """The file with labels, and the synset of each picture by its number."""
    readers = {KAGGLE_LABELS: _read_kaggle} | {f"{inside}{DEVKIT_LABELS}": _read_devkit for inside in DEVKIT_FOLDERS}
    for place in (root, folder, *folder.absolute().parents[:5]):
        for name, read in readers.items():
            if (path := place / name).is_file():
                return path, read(path)
    raise UserError(f"{folder} has no class folders; put {KAGGLE_LABELS} or the kit ILSVRC2012_devkit_t12 into {root}.")


def _read_kaggle(path: Path) -> dict[int, str]:
    """Rows such as `ILSVRC2012_val_00048981,n03995372 85 1 499 272`: the picture, its class and its boxes."""
    labels = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            match, boxes = VAL_PICTURE.match(row.get("ImageId") or ""), (row.get("PredictionString") or "").split()
            if not (match and boxes):
                raise UserError(f"{path} must have rows of ImageId and PredictionString; get it anew.")
            labels[int(match[1])] = boxes[0]
    return labels


def _read_devkit(path: Path) -> dict[int, str]:
    """A number from 1 to 1000 a line, which is not the class: `meta.mat` says which synset it stands for."""
    meta = path.with_name("meta.mat")
    if not meta.is_file():
        raise UserError(f"There is no {meta}, which says what the numbers in {path.name} stand for; get the whole kit.")
    try:
        from scipy.io import loadmat

        table = loadmat(meta, squeeze_me=True)["synsets"].reshape(-1)
        synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    except ImportError:
        raise UserError(f"Reading {meta} needs scipy; install it, or put {KAGGLE_LABELS} next to it.") from None
    except Exception as error:  # a damaged file raises almost anything
        raise UserError(f"{meta} is not the meta.mat of ILSVRC 2012 ({error}); get it anew.") from None
    try:
        numbers = [int(line) for line in path.read_text(encoding="ascii").split()]
        return {picture: synsets[number] for picture, number in enumerate(numbers, start=1)}
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} must hold the number of a class in {meta.name} a line ({error}).") from None


# -------------------------------------------------------------------------------------------------------- Tiny-ImageNet


def holds_tiny_imagenet(folder: Path) -> bool:
    """Whether `folder` has its list of classes and of what they are called."""
    return all((folders.inner(folder, TINY) / name).is_file() for name in ("wnids.txt", "words.txt"))


@data_set("tiny-imagenet", {"train": 100_000, "val": 10_000}, found_in=holds_tiny_imagenet, aliases=(TINY,))
def load_tiny_imagenet(folder: Path, split: str = "val") -> LabelledImages:
    """The archive as it unpacks, or with class folders in `val` too. Its test set has no public classes.

    Classes are in the order of their synsets. Names: ImageNet's where it has the synset, else the first of words.txt.

    Raises:
        UserError: a list is missing, or the pictures are not those of the classes.
    """
    root = folders.inner(folder, TINY)
    place, annotations = root / split, root / split / "val_annotations.txt"
    if not holds_tiny_imagenet(folder) or not place.is_dir():
        raise UserError(f"{root} needs {split}, wnids.txt and words.txt; unpack the whole archive of Tiny-ImageNet.")
    synsets = sorted(read_lines(root / "wnids.txt"))
    if split == "val" and annotations.is_file():
        rows = {file: synset for file, synset, *_ in (f"{line}\t".split("\t") for line in read_lines(annotations))}
        paths = folders.list_pictures(place)[0]
        wrong = next((path for path in paths if rows.get(os.path.basename(path)) not in synsets), None)
        if wrong:
            raise UserError(f"{annotations} has no line with {wrong} and one of the classes of wnids.txt; get it anew.")
        images = ImageFiles(place, paths)
        labels = torch.tensor([synsets.index(rows[os.path.basename(path)]) for path in paths])
    else:
        folders.check_folders(place, folders.list_folders(place), synsets, "Tiny-ImageNet")
        inner = [f"{synset}/images" if (place / synset / "images").is_dir() else synset for synset in synsets]
        images, labels = folders.list_class_pictures(place, inner)  # beside `images` there are files with boxes
    words = dict(line.split("\t", 1) for line in read_lines(root / "words.txt") if "\t" in line)
    data = as_imagenet(LabelledImages(images, labels, (), split=split, folders=synsets))
    if all(synset in class_numbers() for synset in synsets):
        return data
    pairs = zip(synsets, data.classnames, strict=True)
    names = [name if synset in class_numbers() else words.get(synset, synset).split(",")[0] for synset, name in pairs]
    return replace(data, classnames=names, imagenet_classes=None)
