"""Data sets by name, in the layouts that people have on disk; docs/evaluation_data.md describes them.

A data set is a function that reads one split of a folder, with `@data_set(name, ...)`; its file is imported in
`__init__.py`. `load_data("cifar10=/data", split="train")` calls it, and `load_data("/data/pets")` tells which it is.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...errors import UserError
from .classnames import named
from .folders import SPLITS, list_folders, some
from .labelled import LabelledImages


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set.

    read: the function of folder and split; it raises a UserError for data that are missing, damaged or others.
    splits: those that it has, with their published numbers of images (None: any); if empty, the function says what
        there is not. Where there is no "test", people report on "val", and that is read.
    found_in: whether a folder holds this data set; it must be sure, also where it is not the whole data set.
    takes_names: the function has a third argument, a file of class names to read instead of the data's own, or None.
        For any other data set the names are replaced afterwards.
    torchvision: the class of torchvision's that can download it, when the function raises `NotThere`.
    """

    name: str
    read: Callable[..., LabelledImages]
    splits: Mapping[str, int | None]
    found_in: Callable[[Path], bool] = lambda folder: False
    aliases: Sequence[str] = ()
    takes_names: bool = False
    torchvision: str | None = None


SETS: dict[str, DataSet] = {}


class NotThere(UserError):
    """The data set's files are not in the folder; they can be fetched if the data set says how."""


def data_set(name: str, splits: Mapping[str, int | None] | None = None, **known: object) -> Callable:
    """Registers the function that reads a data set, (folder, split) -> `LabelledImages`; `known`: as in `DataSet`."""

    def register(read: Callable[..., LabelledImages]) -> Callable[..., LabelledImages]:
        SETS[name] = DataSet(name, read, splits or {}, **known)
        return read

    return register


def load_data(
    spec: str, *, split: str = "test", download: bool = False, classnames: Path | None = None
) -> LabelledImages:
    """The images of one split, listed but not decoded, with class names and prompt templates.

    spec: "NAME=PATH" with a name in `SETS` (in any case, with or without the hyphens), or "PATH", and what it
        is is told from what is there.
    split: "train", "val" or "test"; "test" is what people report on, for ImageNet the validation set. The split that
        was taken is in the result.
    download: fetch CIFAR, MNIST or Fashion-MNIST if it is not there.
    classnames: a file of class names, as `classnames.txt`, to take instead of the data's own.

    Raises: UserError if the data are not there, incomplete or of other classes.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    name, folder = parse_spec(spec)
    if classnames is not None and not classnames.is_file():
        raise UserError(f"There is no file {classnames}; check --classnames.")
    try:
        known = SETS[name or tell_name(folder)]
        if split == "test" and "val" in known.splits and "test" not in known.splits:
            split = "val"
        if known.splits and split not in known.splits:
            there = " and ".join(known.splits)
            raise UserError(f"{known.name} has no {split} split, only {there}; take one that it has.")
        arguments = (folder, split, classnames) if known.takes_names else (folder, split)
        try:
            data = known.read(*arguments)
        except NotThere:
            if not (download and known.torchvision):
                raise
            _download(known, folder)
            data = known.read(*arguments)
        data = replace(data, name=data.name or known.name)
        if classnames is not None and not known.takes_names:
            data = named(data, classnames)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error}); check its files and permissions.") from None
    if not len(data):
        raise UserError(f"{folder} holds no images of {known.name} ({data.split}).")
    expected = known.splits.get(data.split) or len(data)
    if len(data) != expected:
        logging.warning(f"{folder} holds {len(data):,} images of {known.name} ({data.split}), which has {expected:,}.")
    counts = torch.bincount(data.labels, minlength=len(data.classnames)).tolist()
    if empty := [title for title, count in zip(data.classnames, counts, strict=True) if not count]:
        logging.warning(f"{folder} has no picture of {len(empty)} of its {len(counts)} classes: {some(empty)}.")
    return data


def _download(known: DataSet, folder: Path) -> None:
    """Fetched once by whichever process on this machine comes first; the others find it done."""
    from filelock import FileLock
    from torchvision import datasets

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{known.name}.lock"):
            getattr(datasets, known.torchvision)(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        message = f"{known.name} cannot be downloaded to {folder} ({error}); put its files there yourself."
        raise UserError(message) from None


def parse_spec(spec: str) -> tuple[str | None, Path]:
    """The name, if one is given, and the path; a UserError if there is no data set of this name, or no path."""
    head, equals, tail = spec.partition("=")
    name, path = _known(head), Path(spec).expanduser()
    if equals and name and tail:
        return name, Path(tail).expanduser()
    if not spec or (name and not path.exists()):
        raise UserError(f"{spec or 'The data'} must have the path of a folder: say {name or 'NAME'}=PATH.")
    if equals and os.sep not in head and not path.exists():
        close = sorted(difflib.get_close_matches(head.lower(), SETS), key=lambda known: abs(len(known) - len(head)))
        meant = f"did you mean {close[0]}?" if close else f"the names are {', '.join(SETS)}."
        raise UserError(f"There is no data set called {head!r}; {meant}")
    return None, path


def tell_name(folder: Path) -> str:
    """Which data set `folder` holds: "folder" unless it is another for sure; a UserError if it may be several."""
    list_folders(folder)
    if SETS["folder"].found_in(folder):  # own class names make it other data than the pictures say
        return "folder"
    found = [name for name, known in SETS.items() if known.found_in(folder)]
    called = _known(folder.absolute().name)
    if len(found) > 1 and called not in found:
        either = " or ".join(f"{name}={folder}" for name in found)
        raise UserError(f"{folder} may hold {' or '.join(found)}; say {either}.")
    return str(called) if len(found) > 1 else next(iter(found), "folder")


def _known(name: str) -> str | None:
    """The data set's name in our spelling, or None."""

    def plain(name: str) -> str:
        return re.sub("[^a-z0-9]", "", name.lower())

    spellings = ((spelling, known.name) for known in SETS.values() for spelling in (known.name, *known.aliases))
    return {plain(spelling): name for spelling, name in spellings}.get(plain(name))
