"""Data of any kind: class folders or shards, with the names of the classes in `classnames.txt`."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from ...errors import UserError
from . import folders
from .classnames import named, read_templates
from .imagenet import as_imagenet, class_numbers
from .labelled import LabelledImages
from .registry import data_set

NAMES = "classnames.txt"
TEMPLATES = ("templates.txt", "zeroshot_classification_templates.txt")  # the second is CLIP_benchmark's


def has_names(folder: Path) -> bool:
    """Whether there is a file with class names, in `folder` or in the folder of a split."""
    splits = [folder / name for name in folders.list_folders(folder) if name.lower() in folders.SPLIT_WORDS]
    return any((place / NAMES).is_file() for place in (folder, *splits))


@data_set("folder", found_in=has_names, aliases=("imagefolder", "webdataset", "wds"), takes_names=True)
def load_any(folder: Path, split: str = "test", names: Path | None = None) -> LabelledImages:
    """Class folders, or `*.tar` with samples of `cls` (class number) and a picture, optionally divided.

    Class folders without `classnames.txt` have ImageNet's names and prompts if they are synsets of it, else their own.
    `classnames.txt` and `templates.txt` may be in the folder of the split, or else in `folder`. `names`: the file to
    read instead of `classnames.txt`.
    """
    splits = folders.find_splits(folder)
    found, place = folders.choose_split(splits, split, folder)
    names = names or _beside(place.folder, folder, NAMES)
    templates = _beside(place.folder, folder, *TEMPLATES)
    # After the folder, or after the one above if it is called train, val or test.
    path = Path(os.path.abspath(folder))
    title = path.parent.name if path.name.lower() in folders.SPLIT_WORDS else path.name
    classes: list[str] = []
    if place.shards:
        images, labels = folders.list_shard_pictures(place.shards)
    else:
        classes = folders.list_folders(place.folder)
        if not classes:
            raise folders.nothing_in(place.folder)
        for other in splits.values():  # names by place in the list would silently differ between splits
            others = folders.list_folders(other.folder)
            if others and not other.shards:
                folders.check_folders(other.folder, others, classes, f"the {found} split of {folder}")
        images, labels = folders.list_class_pictures(place.folder, classes)
    data = LabelledImages(images, labels, classes, name=title, split=found, folders=classes)
    data = _without_names(data, folder) if names is None else named(data, names)
    return data if templates is None else replace(data, templates=read_templates(templates))


def _without_names(data: LabelledImages, folder: Path) -> LabelledImages:
    remedy = f"{folder} has no {NAMES}; write one with the name of one class a line"
    if not data.folders:
        shard = data.images.tars[0].name
        raise UserError(f"{remedy}, or say imagenet={folder} if that is what {shard} holds.")
    if has_names(folder) or any(name.lower() in folders.SPLIT_WORDS for name in data.folders):
        raise UserError(f"{remedy}.")  # other splits have names, or it is not clear what are splits and what classes
    parts = [path.split("/") for path in data.images.paths]
    if all(len(part) > 2 for part in parts) and len({part[1] for part in parts}) > 1:
        deep = f"{data.images.root}: all pictures lie in folders within its {len(data.folders)} class folders"
        logging.warning(f"{deep}, the first in {'/'.join(parts[0][:2])}; if those are the classes, name their folder.")
    if all(name in class_numbers() for name in data.folders):
        there = f"{len(data.folders)} of ImageNet's {len(class_numbers())} classes"
        logging.warning(f"{folder} has no {NAMES}, but folders of {there}: names and prompts are ImageNet's.")
        return as_imagenet(data)
    logging.info(f"{folder} has no {NAMES}: the classes are called as their folders are, {folders.some(data.folders)}.")
    return data


def _beside(folder: Path, root: Path, *names: str) -> Path | None:
    return next((path for name in names for path in (folder / name, root / name) if path.is_file()), None)
