"""Listing labelled images as they lie on disk: splits, class folders and shards.

Nothing is decoded. The order is the same wherever the files are listed; hidden files and folders (`._x.JPEG`,
`.ipynb_checkpoints`) do not count.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import UserError, reason
from ..shards import IMAGE_KEYS
from ..streams import Member, walk
from .labelled import ImageFiles, Images, TarImages, is_picture, picture_endings

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Place(NamedTuple):
    """Where one split is: `folder` with class folders or pictures in it, or `shards`, which are in `folder`."""

    folder: Path
    shards: tuple[Path, ...] = ()


def find_splits(folder: Path, undivided: str = "test") -> dict[str, Place]:
    """The splits in `folder`, by name.

    Divided are class folders and shards in `train`, `val`, `test` (all visible folders must be called so), and shards
    whose file names have one of these words (`imagenet1k-train-0000.tar`). Anything else is a single split: the one
    that the folder is called after, else `undivided`. A UserError where it is not clear what belongs to which.
    """
    names, shards = list_folders(folder), list_shards(folder)
    if not names and not shards:
        raise nothing_in(folder)
    splits: dict[str, Place] = {}
    if names and all(name.lower() in SPLIT_WORDS for name in names):
        for name in names:
            split = SPLIT_WORDS[name.lower()]
            if split in splits:
                raise UserError(f"{folder} has both {splits[split].folder.name} and {name}; leave only one of them.")
            splits[split] = Place(folder / name, tuple(list_shards(folder / name)))
        return splits
    without = []
    for shard in shards:
        words = [word for word in re.findall("[a-z]+", shard.stem.lower()) if word in SPLIT_WORDS]
        if words:
            place = splits.get(SPLIT_WORDS[words[0]], Place(folder))
            splits[SPLIT_WORDS[words[0]]] = Place(folder, (*place.shards, shard))
        else:
            without.append(shard)
    if splits and without:
        odd = f"{without[0].name} names none: have train, val or test in the names of all shards or of none"
        raise UserError(f"{folder} has shards of some splits, but {odd}.")
    return splits or {own_split(folder, undivided): Place(folder, tuple(shards))}


def choose_split(splits: dict[str, Place], split: str, folder: Path) -> tuple[str, Place]:
    """The one asked for and its name; for "test" of data without one, "val", which is what people then report on."""
    name = "val" if split == "test" and split not in splits else split
    if name not in splits:
        raise UserError(
            f"{folder} has no {split} split, only {' and '.join(s for s in SPLITS if s in splits)}; "
            f"put its class folders or shards into {folder / split}, next to those of the other splits."
        )
    return name, splits[name]


def own_split(folder: Path, default: str) -> str:
    """The split that a folder is called after, such as "val" for `imagenet/val`."""
    return SPLIT_WORDS.get(os.path.basename(os.path.abspath(folder)).lower(), default)


def inner(folder: Path, *names: str) -> Path:
    """The first of these folders in `folder` that is there, such as an archive's own; else `folder`."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder)


def nothing_in(folder: Path) -> UserError:
    return UserError(f"{folder} holds neither class folders nor .tar shards.")


def list_folders(folder: Path) -> list[str]:
    """Names of the visible folders in `folder`, by number if all are numbers (10 after 2), else by text."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; check the path of the data.")
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    if all(re.fullmatch("[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def list_pictures(folder: Path, below: str = "") -> tuple[list[str], list[str]]:
    """Pictures at any depth in `folder`/`below`, and files that are none by their ending, or by what is in them if they
    have none: sorted paths relative to `folder`. Links are followed."""
    found: dict[bool, list[str]] = {True: [], False: []}
    waiting = [below]
    for inside in waiting:
        with os.scandir(os.path.join(folder, inside)) as entries:
            for entry in entries:
                path = f"{inside}/{entry.name}" if inside else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(path)
                else:
                    known = _ending(path) in picture_endings() or not _ending(path) and is_picture(entry.path)
                    found[known].append(path)
    return sorted(found[True]), sorted(found[False])


def list_class_pictures(
    folder: Path, classes: Sequence[str], title: str = "", remedy: str = ""
) -> tuple[ImageFiles, Tensor]:
    """The pictures in the folders `classes` of `folder`, and the place of each one's folder in `classes`, (N,) int64.

    What is left out because of its ending is told in a warning, or in a UserError if nothing else is there. `title`:
    check that these are the class folders of this data set.
    """
    if title:
        check_folders(folder, list_folders(folder), classes, title, remedy)
    paths, labels, others = [], [], []
    for number, name in enumerate(classes):
        pictures, rest = list_pictures(folder, name)
        paths += pictures
        others += rest
        labels += [number] * len(pictures)
    kinds, first = some(sorted({_ending(path) or "no ending" for path in others})), "".join(others[:1])
    told = f"{len(others)} file(s) whose endings ({kinds}) are not those of pictures, the first of them {first}"
    if not paths:
        raise UserError(f"The class folders in {folder} hold no images{f', only {told}' if others else ''}.")
    if others:
        logging.warning(f"{folder}: left out {told}.")
    return ImageFiles(folder, paths), torch.tensor(labels)


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def check_folders(
    folder: Path | str, found: Sequence[str], wanted: Sequence[str], title: str, remedy: str = ""
) -> None:
    """A UserError, with what is missing and unknown, unless the class folders are those of the data set `title`."""
    there, known = set(found), set(wanted)
    missing = [name for name in wanted if name not in there]
    unknown = [name for name in found if name not in known]
    if missing or unknown:
        differences = [f"missing {some(missing)}"] * bool(missing) + [f"unknown: {some(unknown)}"] * bool(unknown)
        raise UserError(
            f"{len(wanted) - len(missing)} of the {len(wanted)} class folders of {title} are in {folder}; "
            f"{'; '.join(differences)}: it must hold all of them and no others{remedy}."
        )


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def list_shards(folder: Path) -> list[Path]:
    """The visible .tar files in `folder`, by name."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def read_shards(
    shards: Sequence[Path], wanted: Collection[str], read: Callable[[str, dict[str, Member], bool], Any]
) -> tuple[TarImages, list]:
    """The pictures of the samples in uncompressed tar files, and what is said about each.

    A sample is the members of a file with the name up to the first dot in common. Of a file that is cut off or damaged
    there is what is readable, and a warning; its last sample counts if it has a picture and one of `wanted`.

    wanted: extensions whose contents are read; of all others only headers are
    read: from where a sample is, its members by extension and whether one is a picture, to what is said about it
    """
    names, places, said = [], [], []
    for number, shard in enumerate(shards):
        samples: dict[str, dict[str, Member]] = {}
        failures: list[Exception] = []
        for key, members in walk(str(shard.absolute()), failures, wanted, compressed=False):
            samples[key] = members | samples.get(key, {})
        if failures and isinstance(failures[0], OSError):
            raise UserError(f"{shard} cannot be read ({reason(failures[0])}); correct the path.")
        if failures and not samples:
            raise UserError(f"{shard} is not a readable tar file ({reason(failures[0])}); mend or remove it.")
        if failures:
            last = next(reversed(samples))
            if _picture(samples[last]) is None or samples[last].keys().isdisjoint(wanted):
                del samples[last]
            logging.warning(f"{shard} is cut off or damaged after {len(samples)} samples; the rest of it is left out.")
        for key, members in samples.items():
            picture = _picture(members)
            found = read(f"{shard}: {key}", members, picture is not None)
            if picture is not None:
                names.append(picture.name)
                places.append((number, picture.offset, picture.size))
                said.append(found)
    return TarImages(shards, names, places), said


def _picture(members: Mapping[str, Member]) -> Member | None:
    """Of the first of `IMAGE_KEYS` that a sample has, else of any kind that can be decoded."""
    return next((members[k] for k in (*IMAGE_KEYS, *members) if k in members and f".{k}" in picture_endings()), None)


def list_shard_pictures(shards: Sequence[Path]) -> tuple[TarImages, Tensor]:
    """The pictures of samples with `cls` (the number of the class) and a picture; (N,) int64 classes."""

    def label(where: str, members: dict[str, Member], has_picture: bool) -> int:
        if not has_picture or "cls" not in members:
            raise UserError(f"{where} needs a .cls file and an image, but has .{', .'.join(members)}.")
        try:
            return int(members["cls"].content)
        except ValueError:
            found = f"{members['cls'].content[:40]!r}"
            raise UserError(f"{where}.cls must hold a class number, but holds {found}.") from None

    images, labels = read_shards(shards, {"cls"}, label)
    if not labels:
        raise UserError(f"The {len(shards)} shards in {shards[0].parent} hold no sample with 'cls' and an image.")
    return images, torch.tensor(labels)


def check_numbers(images: Images, labels: Tensor, classes: int, names_from: str) -> None:
    """A UserError that names the picture, unless every label is the number of one of so many classes."""
    wrong = ((labels < 0) | (labels >= classes)).nonzero()[:, 0].tolist()
    if wrong:
        known = f"{names_from} names {classes} classes, 0 to {classes - 1}"
        raise UserError(f"{images.name(wrong[0])} is of class {labels[wrong[0]]}, but {known}.")
