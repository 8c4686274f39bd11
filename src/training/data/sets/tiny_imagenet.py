"""Tiny-ImageNet (Le and Yang 2015): 200 classes, most of them ImageNet's, at 64 x 64 pixels."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from ...errors import UserError
from .classnames import read_lines
from .folders import check_folders, list_class_pictures, list_folders, list_pictures
from .imagenet import as_imagenet, class_numbers
from .labelled import ImageFiles, LabelledImages
from .registry import data_set

ARCHIVE = "tiny-imagenet-200"
LABELS = "val_annotations.txt"


def _root(folder: Path) -> Path:
    return folder / ARCHIVE if (folder / ARCHIVE).is_dir() else folder


def holds_tiny_imagenet(folder: Path) -> bool:
    """Whether `folder` has its list of classes and of what they are called."""
    return all((_root(folder) / name).is_file() for name in ("wnids.txt", "words.txt"))


@data_set("tiny-imagenet", {"train": 100_000, "val": 10_000}, found_in=holds_tiny_imagenet, aliases=(ARCHIVE,))
def load_tiny_imagenet(folder: Path, split: str = "val") -> LabelledImages:
    """The archive as it unpacks, or with class folders in `val` too. Its test set has no public classes.

    Classes are in the order of their synsets. Names: ImageNet's where it has the synset, else the first of words.txt.

    Raises:
        UserError: a list is missing, or the pictures are not those of the classes.
    """
    root = _root(folder)
    place, annotations = root / split, root / split / LABELS
    if not holds_tiny_imagenet(folder) or not place.is_dir():
        raise UserError(f"{root} needs {split}, wnids.txt and words.txt; unpack the whole archive of Tiny-ImageNet.")
    synsets = sorted(read_lines(root / "wnids.txt"))
    if split == "val" and annotations.is_file():
        rows = {file: synset for file, synset, *_ in (f"{line}\t".split("\t") for line in read_lines(annotations))}
        paths = list_pictures(place)[0]
        wrong = next((path for path in paths if rows.get(os.path.basename(path)) not in synsets), None)
        if wrong is not None:
            raise UserError(f"{annotations} has no line with {wrong} and one of the classes of wnids.txt; get it anew.")
        images = ImageFiles(place, paths)
        labels = torch.tensor([synsets.index(rows[os.path.basename(path)]) for path in paths])
    else:
        check_folders(place, list_folders(place), synsets, "Tiny-ImageNet")
        inner = [f"{synset}/images" if (place / synset / "images").is_dir() else synset for synset in synsets]
        images, labels = list_class_pictures(place, inner)  # beside `images` there are files with boxes
    words = dict(line.split("\t", 1) for line in read_lines(root / "words.txt") if "\t" in line)
    data = as_imagenet(LabelledImages(images, labels, (), split=split, folders=synsets))
    if all(synset in class_numbers() for synset in synsets):
        return data
    pairs = zip(synsets, data.classnames, strict=True)
    names = [name if synset in class_numbers() else words.get(synset, synset).split(",")[0] for synset, name in pairs]
    return replace(data, classnames=names, imagenet_classes=None)
