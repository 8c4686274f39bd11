"""Listing labelled images as they lie on disk: class folders and shards, their splits, files with names and templates.

Nothing is decoded. The order is the same wherever the files are listed; hidden files and folders (`._x.JPEG`,
`.ipynb_checkpoints`) do not count.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .labelled import DEFAULT_TEMPLATES, ImageFiles, LabelledImages, TarImages
from .tar_samples import Member, read_samples

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
SHARD_IMAGES = ("jpg", "jpeg", "png", "webp")
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


# ------------------------------------------------------------------------------------------------------------- splits


@dataclass(frozen=True)
class Place:
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
        raise UserError(f"{folder} holds neither class folders nor .tar shards.")
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


def _splits_of_shards(folder: Path, shards: list[Path], undivided: str) -> dict[str, Place]:
    groups: dict[str | None, list[Path]] = {}
    for shard in shards:
        words = re.findall("[a-z]+", shard.stem.lower())
        groups.setdefault(next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None), []).append(shard)
    if None not in groups:
        return {str(split): Place(folder, tuple(group)) for split, group in groups.items()}
    if len(groups) == 1:
        return {own_split(folder, undivided): Place(folder, tuple(shards))}
    raise UserError(
        f"{folder} has shards of some splits, but {groups[None][0].name} names none: have train, val or test in the "
        f"names of all shards or of none."
    )


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


def list_pictures(folder: Path, below: str = "") -> list[str]:
    """Pictures at any depth in `folder`/`below`: paths relative to `folder`, sorted. Links are followed."""
    found, waiting = [], [below]
    while waiting:
        inside = waiting.pop()
        with os.scandir(os.path.join(folder, inside)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = f"{inside}/{entry.name}" if inside else entry.name
                if entry.is_dir():
                    waiting.append(path)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    found.append(path)
    return sorted(found)


def list_class_pictures(folder: Path, classes: Sequence[str]) -> tuple[ImageFiles, Tensor]:
    """The pictures in the folders `classes` of `folder`, and the place of each one's folder in `classes`, (N,) int64.

    Raises:
        UserError: there is not one.
    """
    paths, counts = [], []
    for name in classes:
        pictures = list_pictures(folder, name)
        paths += pictures
        counts.append(len(pictures))
    if not paths:
        raise UserError(f"The class folders in {folder} hold no images.")
    return ImageFiles(folder, paths), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def check_folders(folder: Path, found: Sequence[str], wanted: Sequence[str], title: str) -> None:
    """The class folders are exactly those of the data set `title`.

    Raises:
        UserError: they are not; the sentence says how many are missing or unknown, and which.
    """
    there, known = set(found), set(wanted)
    missing = [name for name in wanted if name not in there]
    unknown = [name for name in found if name not in known]
    if missing or unknown:
        differences = [f"missing {_some(missing)}"] * bool(missing) + [f"unknown: {_some(unknown)}"] * bool(unknown)
        raise UserError(
            f"{len(wanted) - len(missing)} of the {len(wanted)} class folders of {title} are in {folder}; "
            f"{'; '.join(differences)}: it must hold all of them and no others."
        )


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ------------------------------------------------------------------------------------------------------------- shards


def list_shards(folder: Path) -> list[Path]:
    """The visible .tar files in `folder`, by name."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def list_shard_pictures(shards: Sequence[Path], classes: int, names_from: str) -> tuple[TarImages, Tensor]:
    """The pictures of samples with `cls` (the number of the class) and a jpg, jpeg, png or webp; (N,) int64 classes.

    Reads headers and labels only. What is readable of a shard that is cut off or damaged counts; a warning says so.

    Args:
        classes: how many there are, according to `names_from`.

    Raises:
        UserError: a shard is no tar file, a sample is incomplete, a class is out of range, or there is no sample.
    """
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, shard in enumerate(shards):
        for member, label in _shard_samples(shard):
            if not 0 <= label < classes:
                raise UserError(
                    f"{shard} has a sample of class {label}, "
                    f"but {names_from} names {classes} classes, 0 to {classes - 1}."
                )
            names.append(member.name)
            places.append((number, member.offset, member.size))
            labels.append(label)
    if not labels:
        raise UserError(f"The {len(shards)} shards in {shards[0].parent} hold no sample with 'cls' and an image.")
    return TarImages(shards, names, np.array(places, dtype=np.int64)), torch.tensor(labels)


def _shard_samples(shard: Path) -> list[tuple[Member, int]]:
    """(picture, class) of each sample."""
    samples, whole = read_samples(shard, {"cls"})
    if not whole:
        logging.warning(f"{shard} is cut off or damaged after {len(samples)} samples; the rest of it is not evaluated.")
    found = []
    for i, (key, members) in enumerate(samples.items(), start=1):
        by_extension = {member.extension: member for member in members}
        image = next((by_extension[extension] for extension in SHARD_IMAGES if extension in by_extension), None)
        if image is not None and "cls" in by_extension:
            found.append((image, _label(by_extension["cls"], shard)))
        elif whole or i < len(samples):
            kinds = ", .".join(SHARD_IMAGES)
            raise UserError(f"{shard}: the sample {key} needs a .cls file and an image (.{kinds}).")
    return found


def _label(member: Member, shard: Path) -> int:
    try:
        return int(member.content)
    except ValueError:
        raise UserError(
            f"{shard}: {member.name} must hold a class number, but holds {member.content[:40]!r}."
        ) from None


# ------------------------------------------------------------------------------------- data with files of class names


def load_named(folder: Path, split: str = "test") -> LabelledImages:
    """Class folders or shards of any data set, with its class names in `classnames.txt`.

    - one folder a class, and `classnames.txt`: a name a line for the folders in sorted order (by number if all folders
      are numbers, else by text), or lines `folder<TAB>name`;
    - `*.tar` with samples of `cls` (class number) and a jpg, jpeg, png or webp, and `classnames.txt`;
    - both optionally divided as in `find_splits`.

    `templates.txt`, if there, has one prompt a line with {} for the name. Both files may be in the folder of the split,
    or else in `folder`.

    Raises:
        UserError: it is anything else, or classes and names do not match.
    """
    splits = find_splits(folder)
    found, place = choose_split(splits, split, folder)
    names_file = _beside(place.folder, folder, "classnames.txt")
    if names_file is None:
        raise UserError(f"{folder} has no classnames.txt; write one with the name of one class a line.")
    lines = read_lines(names_file)
    templates_file = _beside(place.folder, folder, "templates.txt")
    templates = DEFAULT_TEMPLATES if templates_file is None else read_templates(templates_file)
    if place.shards:
        images, labels = list_shard_pictures(place.shards, len(lines), names_file.name)
        return LabelledImages(images, labels, lines, templates, split=found)
    classes = list_folders(place.folder)
    if not classes:
        raise UserError(f"{place.folder} holds neither class folders nor .tar shards.")
    names = _folder_names(place.folder, classes, lines, names_file)
    for other in splits.values():  # names by place in the list would silently differ between splits
        others = list_folders(other.folder)
        if others and not other.shards:
            check_folders(other.folder, others, classes, f"the {found} split of {folder}")
    images, labels = list_class_pictures(place.folder, classes)
    return LabelledImages(images, labels, names, templates, split=found)


def read_lines(path: Path) -> list[str]:
    """Stripped lines; blank ones are allowed at the end only, since a line's place says which class it is.

    Raises:
        UserError: there is nothing in it, a blank line in between, or it is not UTF-8.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    if lines == [""]:
        raise UserError(f"{path} is empty; write one entry a line.")
    if "" in lines:
        raise UserError(f"{path} has nothing on line {lines.index('') + 1}; write one entry a line.")
    return lines


def read_templates(path: Path) -> list[str]:
    """Prompts with {} for the class name, one a line.

    Raises:
        UserError: one has no {}, or more than that in braces.
    """
    templates = read_lines(path)
    for template in templates:
        try:
            works = template.format("a") != template.format("b")
        except (IndexError, KeyError, ValueError, AttributeError):
            works = False
        if not works:
            raise UserError(f"{path}: the template {template!r} must have {{}} where the class name goes.")
    return templates


def packaged_lines(name: str) -> list[str]:
    """The entries of a file in `names/` of this package: its lines, without those that start with #."""
    text = resources.files(__package__).joinpath("names", name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _beside(folder: Path, root: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, root / name) if path.is_file()), None)


def _folder_names(folder: Path, classes: list[str], lines: list[str], path: Path) -> list[str]:
    """The name of each class folder, from the lines of classnames.txt."""
    if any("\t" in line for line in lines):
        names = {name.strip(): title.strip() for name, _, title in (line.partition("\t") for line in lines)}
        missing = next((name for name in classes if not names.get(name)), None)
        if missing is not None:
            raise UserError(f"{path} has no line 'folder<TAB>name' for the class folder {missing}.")
        check_folders(folder, classes, list(names), path.name)
        lines = [names[name] for name in classes]
    if len(lines) != len(classes):
        raise UserError(f"{folder} has {len(classes)} class folders, but its {path.name} names {len(lines)}.")
    return lines
