"""Image sets with several captions an image, listed but not decoded: COCO, Flickr and whatever has their form."""
from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UserError
from ..shards import check_present, expand_shards
from .annotations import Entry, described, find_annotations, read_annotations, read_table
from .caption_shards import TxtRule, read_caption_shards
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
    """Images and their captions; nothing is decoded yet.

    Attributes:
        images: in a fixed order, the same on every process; each has a caption.
        captions: all of them, without line breaks: every run of whitespace is one space.
        image_of: (number of captions,) int64 image that each caption belongs to; not decreasing.
        name, split: what it is called in results, such as "coco" and "test".
        left_out: what was not taken from the files: `empty_captions`, `images_without_caption`.
    """

    images: Images
    captions: Sequence[str]
    image_of: Tensor
    name: str = ""
    split: str = DEFAULT_SPLIT
    left_out: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """A short hash of which images there are, in which order, and of their captions."""
        digest = hashlib.sha256(self.images.fingerprint().encode())
        digest.update(self.image_of.to(torch.int64).numpy().tobytes())
        digest.update("\n".join(self.captions).encode())
        return digest.hexdigest()[:16]

    def same_text(self) -> Tensor:
        """(number of captions,) int64, the same number for captions with the same text.

        Case does not count, nor how a letter with an accent is composed, nor whitespace: CLIP's tokenizer drops these
        as well.
        """
        numbers: dict[str, int] = {}
        texts = (unicodedata.normalize("NFC", caption).lower() for caption in self.captions)
        return torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts], dtype=torch.int64)


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are read.

    Attributes:
        split: of the data set, several joined with "+" ("train+restval"); None is "test" where there are splits.
        images: folder of the pictures, if they are not beside the file with the captions.
        per_image: take no more than so many captions of an image, the first ones.
        txt: what a .txt file in shards is, see `read_caption_shards`.
        csv_separator: None for a tab if the header has one, else a comma.
        csv_image_column, csv_caption_column: as the trainer has them.
    """

    split: str | None = None
    images: Path | None = None
    per_image: int | None = None
    txt: TxtRule | None = None
    csv_separator: str | None = None
    csv_image_column: str = "filepath"
    csv_caption_column: str = "title"


def load_captions(spec: str, options: CaptionOptions | None = None) -> CaptionedImages:
    """The captioned images that `spec` names, as `PATH` or `NAME=PATH`.

    PATH is the folder of a data set (with `dataset_NAME.json`, `NAME_test.json`, `captions_val2017.json` or their like
    in it or in `annotations`), one such file under any name, a CSV file with a row for each caption, a folder of
    webdataset shards (or of one such folder a split), or shards as `PATH/{0000..0004}.tar`. The order of images and
    captions is that of the files.

    Raises:
        UserError: nothing of that kind is there, no such split (`NoSuchSplit`), no captions, or images are missing.
    """
    options = options or CaptionOptions()
    match = None if Path(spec).exists() else re.fullmatch(r"([\w.+-]+)=(.+)", spec)
    name, path = (match[1], Path(match[2])) if match else ("", Path(spec))
    if options.images is not None and not options.images.is_dir():
        raise UserError(f"There is no folder {options.images}; correct --images.")
    if path.suffix == ".tar" or "{" in str(path):
        sets = expand_shards(str(path), "--data")
        for shards in sets:
            check_present(shards, "--data")
        tars = [Path(url) for shards in sets for url in shards.urls]
        return _from_shards(name or path.parent.name, path, {None: tars}, options)
    if path.is_dir():
        return _from_folder(name, path, options)
    near = [path.parent, path.parent.parent]
    if path.suffix.lower() in (".csv", ".tsv"):
        entries = read_table(path, options.csv_separator, options.csv_image_column, options.csv_caption_column)
        near.append(Path())
    elif path.suffix.lower() in (".json", ".jsonl", ".txt", ".token"):
        entries = read_annotations(path)
    else:
        there = "is no folder, JSON, CSV or tar file" if path.exists() else "does not exist"
        raise UserError(f"{path} {there}; give a data set's folder, its JSON file of captions, a CSV file, or shards.")
    return _from_entries(name or described(path).name, path, _by_split(entries), near, options)


def _from_folder(name: str, folder: Path, options: CaptionOptions) -> CaptionedImages:
    files = find_annotations(folder)
    files = [file for file in files if file.name == name] or files
    if not files:
        tars = list_shards(folder)
        inside = {} if tars else {place.name: list_shards(place) for place in sorted(folder.iterdir())}
        splits = {None: tars} if tars else {split: tars for split, tars in inside.items() if tars}
        return _from_shards(name or folder.name, folder, splits, options)
    names = sorted({file.name for file in files})
    if len(names) > 1:
        raise UserError(f"{folder} holds the captions of {' and '.join(names)}; say which with --data {names[0]}=...")
    there: dict[str | None, list[Entry | Path]] = {}
    for file in files:
        if file.split is not None:
            there.setdefault(file.split, [file.path])
        elif file is files[0]:  # holds all splits
            there = _by_split(read_annotations(file.path))
    if len(there) > 1:
        there.pop(None, None)
    source = files[0].path if None in there else folder
    near = [place for file in files for place in (file.path.parent, file.path.parent.parent)]
    return _from_entries(name or names[0], source, there, near, options)


def _by_split(entries: Sequence[Entry]) -> dict[str | None, list[Entry]]:
    """In the order of the file, without the entries that are in none; all under None if it has no splits."""
    splits = dict.fromkeys(entry.split for entry in entries if entry.split is not None) or [None]
    return {split: [entry for entry in entries if entry.split == split] for split in splits}


def _chosen(there: dict[str | None, list], path: Path, options: CaptionOptions) -> tuple[str, list]:
    """What the splits that are wanted are called together, and all that is there of them."""
    if None in there:
        return _undivided(path, options), there[None]
    wanted = list(dict.fromkeys((options.split or DEFAULT_SPLIT).split("+")))
    for split in wanted:
        if split not in there:
            message = f"{path} has no split {split!r}, only {', '.join(there)}; choose with --split."
            raise NoSuchSplit(message, list(there))
    return "+".join(wanted), [part for split in wanted for part in there[split]]


def _undivided(path: Path, options: CaptionOptions) -> str:
    """What the split of a file or folder is called that holds only one."""
    known = described(path).split
    if options.split is None or options.split == known:
        return known or "all"
    if known is None and options.split in re.split(r"[^A-Za-z0-9]+", "/".join(path.parts[-2:])):
        return options.split
    holds = f"holds the split {known}" if known else "is not divided into splits"
    message = f"{path} {holds}: there is no {options.split!r} in it; leave --split out."
    raise NoSuchSplit(message, [known] if known else [])


def _from_shards(
    name: str, path: Path, splits: dict[str | None, list[Path]], options: CaptionOptions
) -> CaptionedImages:
    if not splits:
        raise UserError(
            f"{path} holds no captions: there is neither a file like dataset_coco.json, coco_test.json or "
            "captions_val2017.json, nor a .tar file; name the file itself if it is called otherwise."
        )
    split, tars = _chosen(splits, path, options)
    if options.images is not None:
        raise UserError("--images is for captions beside pictures; shards hold their pictures, so leave it out.")
    images, captions = read_caption_shards(tars, options.txt)
    entries = [Entry(str(number), texts) for number, texts in enumerate(captions)]
    source = tars[0] if len(tars) == 1 else tars[0].parent

    def find(kept: list[str]) -> Images:
        return images.subset(torch.tensor([int(number) for number in kept]))

    return _assembled(name, split, entries, source, options, find)


def _from_entries(
    name: str, source: Path, there: dict[str | None, list[Entry | Path]], near: list[Path], options: CaptionOptions
) -> CaptionedImages:
    """`near`: folders that the pictures may be in, or in one of `IMAGE_FOLDERS` in them."""
    split, parts = _chosen(there, source, options)
    entries = [entry for part in parts for entry in (read_annotations(part) if isinstance(part, Path) else [part])]
    inside = [folder / images for folder in dict.fromkeys(near) for images in IMAGE_FOLDERS]
    roots = inside if options.images is None else [options.images]
    return _assembled(name, split, entries, source, options, lambda kept: _locate(kept, roots, source))


def _assembled(
    name: str, split: str, entries: Sequence[Entry], source: Path, options: CaptionOptions, find: Callable
) -> CaptionedImages:
    """Images in the order in which they come first, each with all of its captions. `find`: names to `Images`."""
    grouped: dict[str, list[str]] = {}
    for entry in entries:
        grouped.setdefault(entry.image, []).extend(" ".join(caption.split()) for caption in entry.captions)
    empty = sum(texts.count("") for texts in grouped.values())
    full = {image: [text for text in texts if text] for image, texts in grouped.items()}
    kept = {image: texts[: options.per_image] for image, texts in full.items() if texts}
    if not kept:
        raise UserError(f"{source} has no caption for any of {len(grouped)} images; give a set with captions.")
    image_of = torch.arange(len(kept)).repeat_interleave(torch.tensor([len(texts) for texts in kept.values()]))
    left_out = {"empty_captions": empty, "images_without_caption": len(grouped) - len(kept)}
    if any(left_out.values()):
        logging.warning(
            f"{source}: left out {empty} empty captions and {left_out['images_without_caption']} images without one."
        )
    captions = [text for texts in kept.values() for text in texts]
    return CaptionedImages(find(list(kept)), captions, image_of, name, split, left_out)


# ------------------------------------------------------------------------------------------- where the pictures are


def _locate(names: Sequence[str], roots: Sequence[Path], source: Path) -> ImageFiles:
    """The pictures of these names, all in one of the folders and all found in the same way.

    Raises:
        UserError: some are nowhere. It tells of the folder where most of them are.
    """
    listing = cache(_listing)

    def is_there(root: Path, path: str) -> bool:
        folder, name = os.path.split(os.path.join(root, path))
        return name in listing(folder)

    best: tuple[int, Path, str] | None = None
    for root in roots:
        for way in zip(*map(_ways, names), strict=True):
            paths = [next((path for path in candidates if is_there(root, path)), None) for candidates in way]
            missing = paths.count(None)
            if len(set(paths) - {None}) < len(paths) - missing:
                continue  # several pictures in one: what this way leaves out of the names is needed
            if not missing:
                return ImageFiles(root, paths)
            if best is None or missing < best[0]:
                best = missing, root, names[paths.index(None)]
    missing, root, first = best
    raise UserError(
        f"{missing} of the {len(names)} images of {source} are not in {root.absolute()}, the first of them {first}: "
        "fetch them, or name the folder that holds them with --images."
    )


def _listing(folder: str) -> frozenset[str]:
    """Names in a folder, all at once: asking for each file takes long on a network's disk."""
    try:
        return frozenset(os.listdir(folder or "."))
    except OSError:
        return frozenset()


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
