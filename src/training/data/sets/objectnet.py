"""ObjectNet (Barbu et al. 2019): the images of the 113 classes that ImageNet has too.

Its authors allow evaluation only: no model may be trained or tuned on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ...errors import UserError
from .folders import check_folders, inner, list_class_pictures, list_folders
from .imagenet import imagenet_synsets
from .labelled import ImageFiles, LabelledImages
from .registry import data_set

ARCHIVE = "objectnet-1.0"
FOLDER_LABELS = "folder_to_objectnet_label.json"
IMAGENET_LABELS = "objectnet_to_imagenet_1k.json"
CLASS_LINES = "pytorch_to_imagenet_2012_id.json"
LINES = "imagenet_to_label_2012_v2"
BORDER = 2  # the published images have a red border of one pixel; the authors' own loader cuts two off


def holds_objectnet(folder: Path) -> bool:
    """Whether `folder` has ObjectNet's mappings."""
    return (inner(folder, ARCHIVE) / "mappings" / IMAGENET_LABELS).is_file()


@data_set("objectnet", {"test": 18_574}, found_in=holds_objectnet)  # of the classes that ImageNet has too
def load_objectnet(folder: Path, split: str = "test") -> LabelledImages:
    """ObjectNet 1.0 as its archive unpacks: `images` with a folder a class, and `mappings`.

    Classes are in the order of their folders' names; `imagenet_classes` comes from the mappings, several for some.

    Raises:
        UserError: the class folders are not those of the mappings, or a mapping is not as published.
    """
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    folder = inner(folder, ARCHIVE)
    labels, groups = read_mappings(folder / "mappings")
    pictures = folder / "images"
    check_folders(pictures, list_folders(pictures), list(labels), "ObjectNet")
    classes = sorted(name for name, label in labels.items() if label in groups)
    images, numbers = list_class_pictures(pictures, classes)
    return LabelledImages(
        ImageFiles(pictures, images.paths, BORDER),
        numbers,
        [labels[name].lower() for name in classes],
        OPENAI_IMAGENET_TEMPLATES,
        imagenet_classes=[groups[labels[name]] for name in classes],
        folders=classes,
    )


def read_mappings(folder: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """The label of each class folder, and ImageNet's classes of each label that overlaps.

    The published files: folder -> label; label -> ImageNet's labels, separated by "; "; ImageNet's class (0 to 999) ->
    line (from 0) in the list of ImageNet's labels.

    Raises:
        UserError: a file is missing or not of this form.
    """
    labels, overlap = _mapping(folder / FOLDER_LABELS, str), _mapping(folder / IMAGENET_LABELS, str)
    lines_of_classes = _mapping(folder / CLASS_LINES, int)
    lines = [line.strip() for line in _read(folder / LINES, str.splitlines)]
    there = all(0 <= line < len(lines) for line in lines_of_classes.values())
    if not there or set(lines_of_classes) != {str(i) for i in range(len(imagenet_synsets()))}:
        wanted = f"the number of one of the {len(lines)} lines of {LINES} for each of ImageNet's classes 0 to 999"
        raise UserError(f"{folder / CLASS_LINES} must have {wanted}.")
    classes: dict[str, list[int]] = {}
    for number, line in lines_of_classes.items():
        classes.setdefault(lines[line], []).append(int(number))
    groups = {}
    for label, names in overlap.items():
        if label not in labels.values():
            raise UserError(f"{folder / FOLDER_LABELS} has no folder for {label!r}, which {IMAGENET_LABELS} names.")
        groups[label] = []
        for name in (name.strip() for name in names.split(";")):
            if len(found := classes.get(name, [])) != 1:
                wanted = f"the label of exactly one of ImageNet's classes in {LINES}, but is that of {len(found)}"
                raise UserError(f"{folder / IMAGENET_LABELS} names {name!r}, which must be {wanted}.")
            groups[label] += found
    return labels, groups


def _read(path: Path, parse: Callable[[str], object]) -> object:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # also of the encoding and of JSON
        raise UserError(f"{path} cannot be read ({error}); unpack the whole archive of ObjectNet.") from None


def _mapping(path: Path, kind: type) -> dict:
    mapping = _read(path, json.loads)
    if not (isinstance(mapping, dict) and mapping and all(type(value) is kind for value in mapping.values())):
        raise UserError(f"{path} must be a JSON object of {'numbers' if kind is int else 'texts'}; get it anew.")
    return mapping
