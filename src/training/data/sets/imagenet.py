"""ImageNet, the test sets made for its classes (V2, R, A, Sketch and ObjectNet), and Tiny-ImageNet.

The order of the 1000 classes is that of their sorted synsets (WordNet ids such as n01440764), as everywhere but in the
numbers of the ILSVRC development kit.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Sequence
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
OBJECTNET = "objectnet-1.0"
IMAGENET_LABELS = "objectnet_to_imagenet_1k.json"
BORDER = 2  # of ObjectNet: the images have a red one of one pixel; the authors' own loader cuts two off
SYNSET = re.compile(r"n\d{8}")
NAME_OF_PICTURE = re.compile(r"ilsvrc2012_val_\d{8}|.*")  # in lower case; more may follow ILSVRC's names


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
    """The 200 synsets of "imagenet-r" or "imagenet-a" in ImageNet's order, from the lists that timm carries."""
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
    """Whether there are folders called after synsets, but not only some of the 1000, or the flat validation set."""
    if (folder / "wnids.txt").is_file():
        return False  # Tiny-ImageNet
    for place in _splits(folder).values():
        classes = folders.list_folders(place.folder)
        if classes and not place.shards and all(SYNSET.fullmatch(name) for name in classes):
            found_by_any = place.folder == folder or place.folder.name.lower() in folders.SPLIT_WORDS
            return not (found_by_any and set(classes) < set(imagenet_synsets()))
        if not classes and "".join(folders.list_pictures(place.folder)[0][:1]).lower().startswith("ilsvrc2012_val_"):
            return True
    return False


@data_set("imagenet", SIZES, found_in=holds_imagenet, aliases=("imagenet1k", "ilsvrc2012"))
def load_imagenet(folder: Path, split: str = "val") -> LabelledImages:
    """ImageNet (ILSVRC 2012), whose validation set has public classes.

    A split is class folders called after synsets, or shards with `cls` from 0 to 999; the validation set may also be
    flat, with Kaggle's `LOC_val_solution.csv` or the development kit's ground truth and `meta.mat`.
    """
    found, place = folders.choose_split(_splits(folder), split, folder)
    synsets = imagenet_synsets()
    if place.shards:
        images, labels = folders.list_shard_pictures(place.shards)
        folders.check_numbers(images, labels, len(synsets), "ImageNet")
    elif folders.list_folders(place.folder):
        remedy = f"; for the classes that are there, say folder={folder} (in training: --zeroshot-data {folder})"
        images, labels = folders.list_class_pictures(place.folder, synsets, "ImageNet", remedy)
    elif found == "train" or not folders.list_pictures(place.folder)[0]:
        raise folders.nothing_in(place.folder)
    else:
        images, labels = _listed(place.folder, synsets, *_validation_labels(place.folder, folder))
    return as_imagenet(LabelledImages(images, labels, (), split=found, folders=synsets))


def _splits(folder: Path) -> dict[str, folders.Place]:
    inside = {split: folders.inner(folder, *names) for split, names in SPLIT_FOLDERS.items()}
    splits = {split: _place(place) for split, place in inside.items() if place != folder}
    if splits:
        return splits
    place = _place(folder)
    return folders.find_splits(folder, "val") if place.shards else {folders.own_split(folder, "val"): place}


def _place(folder: Path) -> folders.Place:
    """Synsets before .tar files, since those may be the archives that the folders came from."""
    synsets = any(SYNSET.fullmatch(name) for name in folders.list_folders(folder))
    return folders.Place(folder, () if synsets else tuple(folders.list_shards(folder)))


def _listed(folder: Path, classes: Sequence[str], file: Path, synsets: dict[str, str]) -> tuple[ImageFiles, Tensor]:
    """Pictures without class folders. `synsets`: the class of each by its name in lower case, as `file` has it."""
    paths = folders.list_pictures(folder)[0]
    numbers = {synset: number for number, synset in enumerate(classes)}
    # By name and not by place: counting files would shift all labels where one is missing.
    keys = [NAME_OF_PICTURE.match(os.path.basename(path).lower())[0] for path in paths]
    labels = [numbers.get(synsets.get(key)) for key in keys]
    if None in labels:
        raise UserError(f"{file} has none of the {len(classes)} classes for {paths[labels.index(None)]}; get it anew.")
    return ImageFiles(folder, paths), torch.tensor(labels)


def _validation_labels(folder: Path, root: Path) -> tuple[Path, dict[str, str]]:
    """The file with labels, which is near the pictures, near `root`, or in a folder above; and what it says."""
    readers = {KAGGLE_LABELS: _read_kaggle} | {f"{inside}{DEVKIT_LABELS}": _read_devkit for inside in DEVKIT_FOLDERS}
    for place in (root, folder, *folder.absolute().parents[:5]):
        for name, read in readers.items():
            if (path := place / name).is_file():
                return path, read(path)
    raise UserError(f"{folder} has no class folders; put {KAGGLE_LABELS} or the kit ILSVRC2012_devkit_t12 into {root}.")


def _read_kaggle(path: Path) -> dict[str, str]:
    """Rows such as `ILSVRC2012_val_00048981,n03995372 85 1 499 272`: the picture, its class and its boxes."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {row["ImageId"].lower(): row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except (LookupError, AttributeError, ValueError, csv.Error):
        raise UserError(f"{path} must have rows of ImageId and PredictionString; get it anew.") from None


def _read_devkit(path: Path) -> dict[str, str]:
    """A number from 1 to 1000 a line, which is not the class: `meta.mat` says which synset it stands for."""
    meta = path.with_name("meta.mat")
    try:
        from scipy.io import loadmat

        with meta.open("rb") as file:
            table = loadmat(file, squeeze_me=True)["synsets"].reshape(-1)
        synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
        numbers = enumerate(path.read_text(encoding="ascii").split(), start=1)
        return {f"ilsvrc2012_val_{picture:08d}": synsets[int(number)] for picture, number in numbers}
    except ImportError:
        raise UserError(f"Reading {meta} needs scipy; install it, or put {KAGGLE_LABELS} next to it.") from None
    except Exception as error:  # a damaged file raises almost anything
        what = f"{path} must hold the number of a class in {meta.name} beside it a line"
        raise UserError(f"{what} ({type(error).__name__}: {error}); get the whole kit of ILSVRC 2012 anew.") from None


def load_test_set(name: str, folder: Path, split: str = "test") -> LabelledImages:
    """ImageNet-V2 (Recht et al. 2019), -R (Hendrycks et al. 2021a), -A (2021b) or -Sketch (Wang et al. 2019).

    V2's class folders are named 0 to 999, those of the others by synset: 200, 200 and all of ImageNet's.
    """
    title, _, inside = TEST_SETS[name]
    folder = folders.inner(folder, *inside)
    others = [other for other in _archives(folder) if TEST_SETS[other][0] == title]
    if others and name not in others:
        raise UserError(f"{folder} holds {others[0]}; say {others[0]}={folder} for it.")
    classes = _classes_of(name)
    return as_imagenet(LabelledImages(*folders.list_class_pictures(folder, classes, title), (), folders=classes))


def _archives(folder: Path) -> list[str]:
    """The test sets whose archive's folder this is, or has in it."""
    called = folder.absolute().name
    return [
        name for name, (*_, places) in TEST_SETS.items()
        if called in places or any((folder / place).is_dir() for place in places)
    ]  # fmt: skip


def _classes_of(name: str) -> list[str]:
    """The class folders of one of `TEST_SETS`."""
    if name.startswith("imagenet-v2"):
        return [str(number) for number in range(len(imagenet_synsets()))]
    return list(imagenet_synsets() if name == "imagenet-sketch" else subset_synsets(name))


def holds_test_set(name: str, folder: Path) -> bool:
    """Whether `folder` has the archive's folder or is it, or has its classes and is no other variant's."""
    archives = _archives(folder)
    if any(other.startswith("imagenet-v2") for other in archives):
        return name in archives
    root = folders.inner(folder, *TEST_SETS[name][2])
    return name in ("imagenet-v2", "imagenet-r", "imagenet-a") and folders.list_folders(root) == _classes_of(name)


for _name, (_, _size, _) in TEST_SETS.items():
    _aliases = ("imagenet-v2-matched-frequency",) * (_name == "imagenet-v2")
    _register = data_set(_name, {"test": _size}, found_in=partial(holds_test_set, _name), aliases=_aliases)
    _register(partial(load_test_set, _name))


def holds_objectnet(folder: Path) -> bool:
    """Whether `folder` has ObjectNet's mappings."""
    return (folders.inner(folder, OBJECTNET) / "mappings" / IMAGENET_LABELS).is_file()


@data_set("objectnet", {"test": 18_574}, found_in=holds_objectnet)  # of the classes that ImageNet has too
def load_objectnet(folder: Path, split: str = "test") -> LabelledImages:
    """ObjectNet 1.0 (Barbu et al. 2019) as its archive unpacks: `images` with a folder a class, and `mappings`.

    Its authors allow evaluation only: no model may be trained or tuned on it. Classes are in the order of their
    folders' names; `imagenet_classes` comes from the mappings, several for some.
    """
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    folder = folders.inner(folder, OBJECTNET)
    labels, groups = _read_mappings(folder / "mappings")
    pictures = folder / "images"
    folders.check_folders(pictures, folders.list_folders(pictures), list(labels), "ObjectNet")
    classes = sorted(name for name, label in labels.items() if label in groups)
    images, numbers = folders.list_class_pictures(pictures, classes)
    images.border = BORDER
    names, known = [labels[name].lower() for name in classes], [groups[labels[name]] for name in classes]
    data = LabelledImages(images, numbers, names, OPENAI_IMAGENET_TEMPLATES, folders=classes)
    return replace(data, imagenet_classes=known)


def _read_mappings(folder: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """The label of each class folder, and ImageNet's classes of each label that overlaps.

    The files: folder -> label; label -> ImageNet's labels, separated by "; "; ImageNet's class -> line in their list.
    """
    files = ("folder_to_objectnet_label.json", IMAGENET_LABELS, "pytorch_to_imagenet_2012_id.json")
    try:
        labels, overlap, lines_of_classes = (json.loads((folder / file).read_text(encoding="utf-8")) for file in files)
        lines = dict(enumerate((folder / "imagenet_to_label_2012_v2").read_text(encoding="utf-8").splitlines()))
        classes: dict[str, list[int]] = {}
        for number in range(len(imagenet_synsets())):
            classes.setdefault(lines[lines_of_classes[str(number)]].strip(), []).append(number)
        groups = {}
        for label, names in overlap.items():
            groups[label] = [number for name in names.split(";") for (number,) in [classes[name.strip()]]]
        if not set(overlap) <= set(labels.values()):
            raise ValueError(f"it has no folder for some of the labels in {IMAGENET_LABELS}")
        return {name: str(label) for name, label in labels.items()}, groups
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        what = f"{folder} is not as published ({type(error).__name__}: {error})"
        raise UserError(f"{what}; unpack the whole archive of ObjectNet.") from None


def holds_tiny_imagenet(folder: Path) -> bool:
    """Whether `folder` has its list of classes and of what they are called."""
    return all((folders.inner(folder, TINY) / name).is_file() for name in ("wnids.txt", "words.txt"))


@data_set("tiny-imagenet", {"train": 100_000, "val": 10_000}, found_in=holds_tiny_imagenet, aliases=(TINY,))
def load_tiny_imagenet(folder: Path, split: str = "val") -> LabelledImages:
    """The archive as it unpacks, or with class folders in `val` too. Its test set has no public classes.

    Classes are in the order of their synsets. Names: ImageNet's where it has the synset, else the first of words.txt.
    """
    root = folders.inner(folder, TINY)
    place, annotations = root / split, root / split / "val_annotations.txt"
    if not holds_tiny_imagenet(folder) or not place.is_dir():
        raise UserError(f"{root} needs {split}, wnids.txt and words.txt; unpack the whole archive of Tiny-ImageNet.")
    synsets = sorted(read_lines(root / "wnids.txt"))
    if split == "val" and annotations.is_file():
        rows = (f"{line}\t".split("\t") for line in read_lines(annotations))
        images, labels = _listed(place, synsets, annotations, {file.lower(): synset for file, synset, *_ in rows})
    else:
        folders.check_folders(place, folders.list_folders(place), synsets, "Tiny-ImageNet")
        inner = [f"{synset}/images" if (place / synset / "images").is_dir() else synset for synset in synsets]
        images, labels = folders.list_class_pictures(place, inner)  # beside `images` there are files with boxes
    data = as_imagenet(LabelledImages(images, labels, (), split=split, folders=synsets))
    if all(synset in class_numbers() for synset in synsets):
        return data
    words = dict(line.split("\t", 1) for line in read_lines(root / "words.txt") if "\t" in line)
    pairs = zip(synsets, data.classnames, strict=True)
    names = [name if synset in class_numbers() else words.get(synset, synset).split(",")[0] for synset, name in pairs]
    return replace(data, classnames=names, imagenet_classes=None)
