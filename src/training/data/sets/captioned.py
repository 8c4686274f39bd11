"""Image sets with several captions an image, listed but not decoded: COCO, Flickr and whatever has their form."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UserError
from ..arrow import ENDING
from ..shards import check_present, expand_shards, listing
from ..sources import CsvRows
from . import annotations
from .annotations import Entry, TxtRule
from .folders import list_shards
from .labelled import ImageFiles, Images

DEFAULT_SPLIT = "test"
# Folders of pictures beside a data set's captions, as the archives of COCO and Flickr unpack and people name them.
IMAGE_FOLDERS = ("", "images", "flickr30k-images", "flickr30k_images", "Images", "Flicker8k_Dataset")


class NoSuchSplit(UserError):
    """The split asked for is not there. `there`: those that are; none if the data is not divided."""

    def __init__(self, message: str, there: Sequence[str] = ()):
        super().__init__(message)
        self.there = list(there)


@dataclass(frozen=True)
class CaptionedImages:
    """Images and their captions; nothing is decoded yet."""

    images: Images  # in a fixed order, the same on every process; each has a caption
    captions: Sequence[str]  # without line breaks: every run of whitespace is one space
    image_of: Tensor  # (number of captions,) int64 image that each caption belongs to; not decreasing
    name: str = ""  # in results, as the split
    split: str = DEFAULT_SPLIT
    left_out: dict[str, int] = field(default_factory=dict)  # `empty_captions`, `images_without_caption`

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """A short hash of which images there are, in which order, and of their captions."""
        digest = hashlib.sha256(self.images.fingerprint().encode())
        digest.update(self.image_of.to(torch.int64).numpy().tobytes())
        digest.update("\n".join(self.captions).encode())
        return digest.hexdigest()[:16]

    def same_text(self) -> Tensor:
        """(number of captions,) int64, equal for the same text but for case and accents' form, which CLIP drops too."""
        numbers: dict[str, int] = {}
        texts = (unicodedata.normalize("NFC", caption).lower() for caption in self.captions)
        return torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts], dtype=torch.int64)


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are read."""

    split: str | None = None  # several joined with "+" ("train+restval"); None is "test" where there are splits
    images: Path | None = None  # folder of the pictures, if they are not beside the file with the captions
    per_image: int | None = None  # take no more than so many captions of an image, the first ones
    txt: TxtRule | None = None  # what a .txt file in shards is, see `read_caption_shards`
    csv_separator: str | None = None  # None for a tab if the header has one, else a comma
    csv_image_column: str = "filepath"
    csv_caption_column: str = "title"


def load_captions(spec: str, options: CaptionOptions | None = None) -> CaptionedImages:
    """The captioned images that `spec` names, as `PATH` or `NAME=PATH`.

    PATH is what docs/retrieval.md lists: a data set's folder, a file of captions, a table, or shards. Images are in the
    order in which the files name them first, captions in the order of the files.

    Raises: UserError if nothing of that kind is there, no such split (`NoSuchSplit`), no captions, or not all images.
    """
    options = options or CaptionOptions()
    match = None if Path(spec).exists() else re.fullmatch(r"([\w.+-]+)=(.+)", spec)
    name, path = (match[1], Path(match[2])) if match else ("", Path(spec))
    if options.images is not None and not options.images.is_dir():
        raise UserError(f"There is no folder {options.images}; correct --images.")
    found = _in_folder(name, path) if path.is_dir() else _in_file(name, path, options)
    split, parts = _chosen(found, options)
    if found.stored:
        if options.images is not None:
            raise UserError(f"--images is for captions beside pictures; {path} holds its pictures, so leave it out.")
        rows = parts[0].suffix == ENDING
        pictures, texts = (
            annotations.read_caption_rows(parts) if rows else annotations.read_caption_shards(parts, options.txt)
        )
        entries = [Entry(str(number), captions) for number, captions in enumerate(texts)]
    else:
        read = [annotations.read_annotations(part) if isinstance(part, Path) else [part] for part in parts]
        entries = list(itertools.chain(*read))

    grouped: dict[str, list[str]] = {}
    for entry in entries:
        grouped.setdefault(entry.image, []).extend(" ".join(caption.split()) for caption in entry.captions)
    empty = sum(texts.count("") for texts in grouped.values())
    full = {image: [text for text in texts if text] for image, texts in grouped.items()}
    kept = {image: texts[: options.per_image] for image, texts in full.items() if texts}
    if not kept:
        raise UserError(f"{found.source} has no caption for any of {len(grouped)} images; give a set with captions.")
    without = len(grouped) - len(kept)
    if empty or without:
        logging.warning(f"{found.source}: left out {empty} empty captions and {without} images without one.")
    if found.stored:
        images = pictures.subset(torch.tensor([int(number) for number in kept]))
    else:
        inside = [folder / images for folder in dict.fromkeys(found.near) for images in IMAGE_FOLDERS]
        images = _locate(list(kept), inside if options.images is None else [options.images], found.source)
    image_of = torch.arange(len(kept)).repeat_interleave(torch.tensor([len(texts) for texts in kept.values()]))
    captions = [text for texts in kept.values() for text in texts]
    left_out = {"empty_captions": empty, "images_without_caption": without}
    return CaptionedImages(images, captions, image_of, found.name, split, left_out)


class _Found(NamedTuple):
    """What may be read: entries, files of captions, or shards and Arrow files, in which the pictures are `stored`."""

    name: str
    source: Path
    splits: dict[str | None, list[Entry] | list[Path]]  # None: not divided
    near: Sequence[Path] = ()  # folders that the pictures may be in, or in one of `IMAGE_FOLDERS` in them
    stored: bool = False


def _in_file(name: str, path: Path, options: CaptionOptions) -> _Found:
    if path.suffix == ".tar" or "{" in str(path):
        sets = expand_shards(str(path), "--data")
        for shards in sets:
            check_present(shards, "--data")
        tars = [Path(url) for shards in sets for url in shards.urls]
        return _Found(name or path.parent.name, path, {None: tars}, stored=True)
    if path.suffix == ENDING:
        return _Found(name or annotations.described(path).name, path, {None: [path]}, stored=True)
    near = [path.parent, path.parent.parent]
    bars = path.suffix == ".csv" and options.csv_separator is None and path.is_file() and annotations.has_bars(path)
    if path.suffix.lower() in (".csv", ".tsv") and not bars:
        columns = options.csv_image_column, options.csv_caption_column
        rows = CsvRows(str(path), options.csv_separator or "\t", *columns, "--data")
        entries = [Entry(image, [caption]) for image, caption in zip(rows.images, rows.captions, strict=True)]
        entries.append(Entry(rows.images[0], [""] * rows.empty))  # to be counted
        near.append(Path())
    elif bars or path.suffix.lower() in (".json", ".jsonl", ".txt", ".token"):
        entries = annotations.read_annotations(path)
    else:
        there = "is no folder, JSON, CSV, tar or Arrow file" if path.exists() else "does not exist"
        kinds = "a data set's folder, its JSON file of captions, a CSV or Arrow file, or shards"
        raise UserError(f"{path} {there}; give {kinds}.")
    return _Found(name or annotations.described(path).name, path, _by_split(entries), near)


def _in_folder(name: str, folder: Path) -> _Found:
    files = annotations.find_annotations(folder)
    files = [file for file in files if file.name == name] or files
    if not files:
        inside = {place.name: list_shards(place) for place in sorted(folder.iterdir())}
        tars = list_shards(folder)
        splits = {None: tars} if tars else {split: shards for split, shards in inside.items() if shards}
        if not splits:
            raise UserError(
                f"{folder} holds no captions: there is neither a file like dataset_coco.json, coco_test.json or "
                "captions_val2017.json, nor a .tar file; name the file itself if it is called otherwise."
            )
        return _Found(name or folder.name, folder, splits, stored=True)
    names = sorted({file.name for file in files})
    if len(names) > 1:
        raise UserError(f"{folder} holds the captions of {' and '.join(names)}; say which with --data {names[0]}=...")
    splits = {}
    for file in files:
        if file.split is not None:
            splits.setdefault(file.split, [file.path])
        elif file is files[0]:  # holds all splits
            splits = _by_split(annotations.read_annotations(file.path))
    if len(splits) > 1:
        splits.pop(None, None)
    near = [place for file in files for place in (file.path.parent, file.path.parent.parent)]
    stored = files[0].path.suffix == ENDING
    return _Found(name or names[0], files[0].path if None in splits else folder, splits, near, stored)


def _by_split(entries: Sequence[Entry]) -> dict[str | None, list[Entry]]:
    """In the order of the file, without the entries that are in none; all under None if it has no splits."""
    splits = dict.fromkeys(entry.split for entry in entries if entry.split is not None) or [None]
    return {split: [entry for entry in entries if entry.split == split] for split in splits}


def _chosen(found: _Found, options: CaptionOptions) -> tuple[str, list]:
    """What the splits that are wanted are called together, and all that is there of them."""
    path, wanted = found.source, options.split
    if None not in found.splits:
        names = list(dict.fromkeys((wanted or DEFAULT_SPLIT).split("+")))
        for split in names:
            if split not in found.splits:
                only = f"only {', '.join(found.splits)}; choose with --split."
                raise NoSuchSplit(f"{path} has no split {split!r}, {only}", list(found.splits))
        return "+".join(names), [part for split in names for part in found.splits[split]]
    known = annotations.described(path).split
    if known is None and wanted in re.split(r"[^A-Za-z0-9]+", "/".join(path.parts[-2:])):
        known = wanted
    if wanted not in (None, known):
        holds = f"holds the split {known}" if known else "is not divided into splits"
        there = [known] if known else []
        raise NoSuchSplit(f"{path} {holds}: there is no {wanted!r} in it; leave --split out.", there)
    return known or "all", found.splits[None]


def _locate(names: Sequence[str], roots: Sequence[Path], source: Path) -> ImageFiles:
    """The pictures of these names, all in one of the folders and all found in the same way.

    Where some are nowhere, a UserError tells of the folder where most of them are.
    """
    names_in = cache(listing)  # all at once: asking for each file takes long on a network's disk

    def is_there(root: Path, path: str) -> bool:
        folder, name = os.path.split(os.path.join(root, path))
        return name in names_in(folder)

    failed: list[tuple[int, Path, str]] = []
    for root in roots:
        for way in zip(*map(_ways, names), strict=True):
            paths = [next((path for path in candidates if is_there(root, path)), None) for candidates in way]
            missing = paths.count(None)
            if len(set(paths) - {None}) < len(paths) - missing:
                continue  # several pictures in one: what this way leaves out of the names is needed
            if not missing:
                return ImageFiles(root, paths)
            failed.append((missing, root, names[paths.index(None)]))
    missing, root, first = min(failed, key=lambda failure: failure[0])
    raise UserError(
        f"{missing} of the {len(names)} images of {source} are not in {root.absolute()}, the first of them {first}: "
        "fetch them, or name the folder that holds them with --images."
    )


def _ways(name: str) -> tuple[Sequence[str], ...]:
    """Where the picture of this name may be below a folder, in each of the ways to look for it."""
    *_, last = parts = name.split("/")
    coco = re.fullmatch(r"COCO_((?:train|val|test)\d+)_(\d+\.jpg)", last)
    return (
        [name],
        ["/".join(parts[-2:])],  # the lists of others have their own paths before `val2014/COCO_val2014_000391895.jpg`
        [last],
        [f"{coco[1]}/{last}"] if coco else [],
        # COCO's release of 2017 has the pictures of 2014 under shorter names, in other folders.
        [f"{split}2017/{coco[2]}" for split in ("val", "train")] if coco else [],
    )
