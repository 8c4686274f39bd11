"""Data sets by name, in the layouts that people have on disk; docs/evaluation_data.md describes them.

`load_data("imagenet=/data/imagenet")` is the validation set, `load_data("cifar10=/data", split="train")` what is for
training, and `load_data("/data/pets")` whatever is there, such as class folders or shards with `classnames.txt`.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from dataclasses import replace
from pathlib import Path

from ...errors import UserError
from .imagenet import (
    SYNSET_SETS,
    V2_FOLDERS,
    is_imagenet_layout,
    load_imagenet,
    load_imagenet_v2,
    load_synset_set,
    subset_synsets,
)
from .folders import SPLIT_WORDS, SPLITS, find_splits, list_folders, list_shards, load_named
from .objectnet import is_objectnet, load_objectnet
from .labelled import LabelledImages
from .arrays import CIFAR_FILES, MNIST_FOLDERS, MNIST_PREFIXES, find_cifar, find_mnist, load_cifar, load_mnist

# The published numbers of images, by split. ObjectNet's are those of the classes that ImageNet has too.
SIZES: dict[str, dict[str, int]] = {
    "imagenet": {"train": 1_281_167, "val": 50_000},
    "imagenet-v2": {"test": 10_000},
    "imagenet-v2-threshold-0.7": {"test": 10_000},
    "imagenet-v2-top-images": {"test": 10_000},
    "imagenet-r": {"test": 30_000},
    "imagenet-a": {"test": 7_500},
    "imagenet-sketch": {"test": 50_889},
    "objectnet": {"test": 18_574},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "mnist": {"train": 60_000, "test": 10_000},
    "fashion-mnist": {"train": 60_000, "test": 10_000},
}
ANY_DATA = ("folder", "webdataset")  # named after the folder they are in
ALIASES = {
    "imagenet1k": "imagenet",
    "ilsvrc2012": "imagenet",
    "imagenetv2matchedfrequency": "imagenet-v2",
    "imagefolder": "folder",
    "wds": "webdataset",
}


def list_datasets() -> tuple[str, ...]:
    """The names that `load_data` knows."""
    return (*SIZES, *ANY_DATA)


def load_data(spec: str, *, split: str = "test", download: bool = False) -> LabelledImages:
    """The images of one split, listed but not decoded, with class names and prompt templates.

    Args:
        spec: "NAME=PATH" with a name of `list_datasets` (in any case, with or without the hyphens), or "PATH", and what
            it is is told from what is there.
        split: "train", "val" or "test"; "test" is what people report on, for ImageNet the validation set. The split
            that was taken is in the result.
        download: fetch CIFAR, MNIST or Fashion-MNIST if it is not there.

    Raises:
        UserError: the data are not there, incomplete or of other classes.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    name, folder = parse_spec(spec)
    try:
        name = name or tell_name(folder)
        data = _load(name, folder, split, download)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error}); check its files and permissions.") from None
    data = replace(data, name=_called(folder) if name in ANY_DATA else name)
    expected = SIZES.get(name, {}).get(data.split, len(data))
    if len(data) != expected:
        logging.warning(f"{folder} holds {len(data):,} images of {name} ({data.split}), which has {expected:,}.")
    return data


def parse_spec(spec: str) -> tuple[str | None, Path]:
    """The name, if one is given, and the path.

    Raises:
        UserError: there is no data set of this name, or no path.
    """
    head, equals, tail = spec.partition("=")
    name = _known(head)
    path = Path(spec).expanduser()
    if equals and name and tail:
        return name, Path(tail).expanduser()
    if not spec or (name and not path.exists()):
        raise UserError(f"{spec or 'The data'} must have the path of a folder: say {name or 'NAME'}=PATH.")
    if equals and os.sep not in head and not path.exists():
        close = difflib.get_close_matches(head.lower(), list_datasets(), n=1)
        meant = f"did you mean {close[0]}?" if close else f"the names are {', '.join(list_datasets())}."
        raise UserError(f"There is no data set called {head!r}; {meant}")
    return None, path


def tell_name(folder: Path) -> str:
    """Which data set `folder` holds, from what is there.

    Raises:
        UserError: it is not clear; the sentence says what to add.
    """
    inside = list_folders(folder)
    splits = [folder / name for name in inside if name.lower() in SPLIT_WORDS]
    if any((place / "classnames.txt").is_file() for place in (folder, *splits)):
        return "folder"
    for name in CIFAR_FILES:
        if find_cifar(folder, name):
            return name
    mnist = [name for name in MNIST_FOLDERS if any(find_mnist(folder, name, split) for split in MNIST_PREFIXES)]
    if len(mnist) == 1:
        return mnist[0]
    if mnist and (name := _known(folder.absolute().name)) in mnist:
        return str(name)
    if mnist:
        raise UserError(f"{folder} may hold MNIST or Fashion-MNIST; say mnist={folder} or fashion-mnist={folder}.")
    if is_objectnet(folder):
        return "objectnet"
    for name, places in V2_FOLDERS.items():
        if folder.absolute().name in places or any(place in inside for place in places):
            return name
    if inside == [str(i) for i in range(1000)]:
        return "imagenet-v2"
    if is_imagenet_layout(folder):
        subsets = (name for name in SYNSET_SETS if name != "imagenet-sketch" and tuple(inside) == subset_synsets(name))
        return next(subsets, "imagenet")
    if shards := list_shards(folder) or [shard for place in splits for shard in list_shards(place)]:
        raise UserError(
            f"{folder} has no classnames.txt; write one with the name of one class a line, or say imagenet={folder} "
            f"if that is what {shards[0].name} holds."
        )
    if not inside:
        raise UserError(f"{folder} holds neither class folders nor .tar shards.")
    raise UserError(f"{folder} has no classnames.txt; write one with the name of one class a line.")


def _load(name: str, folder: Path, split: str, download: bool) -> LabelledImages:
    there = SIZES.get(name, {})
    if there and split not in there and not (name == "imagenet" and split == "test"):
        raise UserError(f"{name} has no {split} split, only {' and '.join(there)}; take one that it has.")
    if name == "imagenet":
        return load_imagenet(folder, split)
    if name in V2_FOLDERS:
        return load_imagenet_v2(folder, name)
    if name in SYNSET_SETS:
        return load_synset_set(folder, name)
    if name == "objectnet":
        return load_objectnet(folder)
    if name in CIFAR_FILES:
        return load_cifar(folder, name, split, download)
    if name in MNIST_FOLDERS:
        return load_mnist(folder, name, split, download)
    if name == "webdataset" and not any(place.shards for place in find_splits(folder).values()):
        raise UserError(f"{folder} holds no .tar shards.")
    return load_named(folder, split)


def _known(name: str) -> str | None:
    """The data set's name in our spelling, or None."""
    plain = re.sub("[^a-z0-9]", "", name.lower())
    return ALIASES.get(plain) or {re.sub("[^a-z0-9]", "", known): known for known in list_datasets()}.get(plain)


def _called(folder: Path) -> str:
    """What data in `folder` are called: after it, or after the folder above if it is called train, val or test."""
    path = Path(os.path.abspath(folder))
    return path.parent.name if path.name.lower() in SPLIT_WORDS else path.name
