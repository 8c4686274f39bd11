"""Listing labelled images as they lie on disk: splits, class folders and shards.

Nothing is decoded. The order is the same wherever the files are listed; hidden files and folders (`._x.JPEG`,
`.ipynb_checkpoints`) do not count.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ..tar import Member, reason, walk
from .labelled import ImageFiles, Images, TarImages, picture_endings

SHARD_IMAGES = ("jpg", "jpeg", "png", "webp")  # where a sample has several pictures, the first of these
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


# ------------------------------------------------------------------------------------------------------------- splits


class Place(NamedTuple):
    """Where one split is: `folder` with class folders or pictures in it, or `shards`, which are in `folder`."""

    folder: Path
    shards: tuple[Path, ...] = ()


def find_splits(folder: Path, undivided: str = "test") -> dict[str, Place]:
    """The splits in `folder`, by name.

    Divided are class folders and shards in `train`, `val`, `test` (all visible folders must be called so), and shards
    whose file names have one of these words (`imagenet1k-train-0000.tar`). Anything else is a single split: the one
    that the folder is called after, else `undivided`.

    Raises:
        UserError: there is no such folder, it is empty, or it is not clear what belongs to which split.
    """
    names, shards = list_folders(folder), list_shards(folder)
    if not names and not shards:
        raise nothing_in(folder)
    if not names or not all(name.lower() in SPLIT_WORDS for name in names):
        return _splits_of_shards(folder, shards, undivided) if shards else {own_split(folder, undivided): Place(folder)}
    splits: dict[str, Place] = {}
    for name in names:
        split = SPLIT_WORDS[name.lower()]
        if split in splits:
            raise UserError(f"{folder} has both {splits[split].folder.name} and {name}; leave only one of them.")
        splits[split] = Place(folder / name, tuple(list_shards(folder / name)))
    return splits


def choose_split(splits: dict[str, Place], split: str, folder: Path) -> tuple[str, Place]:
    """The one asked for and its name; for "test" of data without one, "val", which is what people then report on.

    Raises:
        UserError: there is none; the sentence says which there are.
    """
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


def _splits_of_shards(folder: Path, shards: list[Path], undivided: str) -> dict[str, Place]:
    groups: dict[str | None, list[Path]] = {}
    for shard in shards:
        words = re.findall("[a-z]+", shard.stem.lower())
        groups.setdefault(next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None), []).append(shard)
    if None not in groups:
        return {str(split): Place(folder, tuple(group)) for split, group in groups.items()}
    if len(groups) == 1:
        return {own_split(folder, undivided): Place(folder, tuple(shards))}
    odd = f"{groups[None][0].name} names none: have train, val or test in the names of all shards or of none"
    raise UserError(f"{folder} has shards of some splits, but {odd}.")


# ------------------------------------------------------------------------------------------------------ class folders


def list_folders(folder: Path) -> list[str]:
    """Names of the visible folders in `folder`, by number if all are numbers (10 after 2), else by text.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; check the path of the data.")
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    if all(re.fullmatch("[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def list_pictures(folder: Path, below: str = "") -> tuple[list[str], list[str]]:
    """Pictures at any depth in `folder`/`below`, and files that are none by their ending: sorted paths relative to
    `folder`. Links are followed."""
    found: dict[bool, list[str]] = {True: [], False: []}
    waiting = [below]
    while waiting:
        inside = waiting.pop()
        with os.scandir(os.path.join(folder, inside)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = f"{inside}/{entry.name}" if inside else entry.name
                if entry.is_dir():
                    waiting.append(path)
                else:
                    found[_ending(path) in picture_endings()].append(path)
    return sorted(found[True]), sorted(found[False])


def list_class_pictures(folder: Path, classes: Sequence[str]) -> tuple[ImageFiles, Tensor]:
    """The pictures in the folders `classes` of `folder`, and the place of each one's folder in `classes`, (N,) int64.

    What is left out because of its ending is told in a warning.

    Raises:
        UserError: there is not one.
    """
    paths, counts, others = [], [], []
    for name in classes:
        pictures, rest = list_pictures(folder, name)
        paths += pictures
        others += rest
        counts.append(len(pictures))
    kinds = some(sorted({_ending(path) or "no ending" for path in others}))
    files = f"{len(others)} file(s) whose endings ({kinds}) are not those of pictures, the first of them "
    left_out = files + others[0] if others else ""
    if not paths:
        raise UserError(f"The class folders in {folder} hold no images{f', only {left_out}' if others else ''}.")
    if others:
        logging.warning(f"{folder}: left out {left_out}.")
    return ImageFiles(folder, paths), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def check_folders(
    folder: Path | str, found: Sequence[str], wanted: Sequence[str], title: str, remedy: str = ""
) -> None:
    """The class folders are exactly those of the data set `title`.

    Raises:
        UserError: they are not; the sentence says how many are missing or unknown, and which.
    """
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


# ------------------------------------------------------------------------------------------------------------- shards


def list_shards(folder: Path) -> list[Path]:
    """The visible .tar files in `folder`, by name."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def read_samples(path: Path, wanted: Collection[str]) -> tuple[dict[str, list[Member]], bool]:
    """The samples of an uncompressed tar file: key -> members, both in the file's order; and whether it is whole.

    Of a file that is cut off or damaged there is what is readable; of its last sample, members can be missing.

    wanted: extensions to read the contents of

    Raises:
        UserError: it cannot be read, or is no tar file.
    """
    samples: dict[str, list[Member]] = {}
    failures: list[Exception] = []
    for key, members in walk(str(path.absolute()), failures, wanted, compressed=False):
        samples.setdefault(key, []).extend(members.values())
    if failures and isinstance(failures[0], OSError):
        raise UserError(f"{path} cannot be read ({reason(failures[0])}); correct the path.")
    if failures and not samples:
        raise UserError(f"{path} is not a readable tar file ({reason(failures[0])}); mend or remove it.")
    return samples, not failures


def list_shard_pictures(shards: Sequence[Path]) -> tuple[TarImages, Tensor]:
    """The pictures of samples with `cls` (the number of the class) and a picture; (N,) int64 classes.

    Reads headers and labels only. What is readable of a shard that is cut off or damaged counts; a warning says so.

    Raises:
        UserError: a shard is no tar file, a sample is incomplete, or there is no sample.
    """
    names, places, labels = [], [], []
    for number, shard in enumerate(shards):
        samples, whole = read_samples(shard, {"cls"})
        if not whole:
            logging.warning(f"{shard} is cut off or damaged after {len(samples)} samples; the rest is not evaluated.")
        for i, (key, members) in enumerate(samples.items(), start=1):
            picture, label = picture_of(members), next((m for m in members if m.extension == "cls"), None)
            if picture is not None and label is not None:
                names.append(picture.name)
                places.append((number, picture.offset, picture.size))
                labels.append(_number(label, shard))
            elif whole or i < len(samples):
                there = ", .".join(member.extension for member in members)
                raise UserError(f"{shard}: the sample {key} needs a .cls file and an image, but has .{there}.")
    if not labels:
        raise UserError(f"The {len(shards)} shards in {shards[0].parent} hold no sample with 'cls' and an image.")
    return TarImages(shards, names, np.array(places, dtype=np.int64)), torch.tensor(labels)


def picture_of(members: Sequence[Member]) -> Member | None:
    """A sample's picture: of the first of `SHARD_IMAGES` that it has, else of any kind that can be decoded."""
    kinds = {member.extension: member for member in reversed(members) if f".{member.extension}" in picture_endings()}
    return next((kinds[kind] for kind in (*SHARD_IMAGES, *kinds) if kind in kinds), None)


def _number(member: Member, shard: Path) -> int:
    try:
        return int(member.content)
    except ValueError:
        shown = f"{member.content[:40]!r}"
        raise UserError(f"{shard}: {member.name} must hold a class number, but holds {shown}.") from None


def check_numbers(images: Images, labels: Tensor, classes: int, names_from: str) -> None:
    """Every label is the number of one of so many classes.

    Raises:
        UserError: one is not; the sentence names the picture.
    """
    wrong = ((labels < 0) | (labels >= classes)).nonzero()[:, 0].tolist()
    if wrong:
        known = f"{names_from} names {classes} classes, 0 to {classes - 1}"
        raise UserError(f"{images.name(wrong[0])} is of class {labels[wrong[0]]}, but {known}.")
