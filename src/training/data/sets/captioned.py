"""Image sets with several captions an image, listed but not decoded: COCO, Flickr30K and whatever has their form."""
from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..shards import check_present, expand_shards
from ...errors import UserError
from .annotations import Entry, described, find_annotations, read_annotations, read_table, splits_of
from .caption_shards import TxtRule, read_caption_shards
from .folders import list_shards
from .labelled import ImageFiles, Images

log = logging.getLogger(__name__)

DEFAULT_SPLIT = "test"
# Folders of pictures beside a data set's captions, as the archives of COCO and Flickr30K unpack and people name them.
IMAGE_FOLDERS = ("", "images", "flickr30k-images", "flickr30k_images", "Images")


class NoSuchSplit(UserError):
    """The split asked for is not there. `there`: those that are; none if the data is not divided."""

    def __init__(self, message: str, there: Sequence[str]):
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
    in it or in `annotations`), one such JSON file under any name, a CSV file with a row for each caption, a folder of
    webdataset shards (or of one such folder a split), or shards as `PATH/{0000..0004}.tar`. The order of images and
    captions is that of the files.

    Raises:
        UserError: nothing of that kind is there, no such split (`NoSuchSplit`), no captions, or images are missing.
    """
    options = options or CaptionOptions()
    name, path = _parse(spec)
    if options.images is not None and not options.images.is_dir():
        raise UserError(f"There is no folder {options.images}; correct --images.")
    if path.suffix == ".tar" or "{" in str(path):
        return _from_shards(name or path.parent.name, _expand(str(path)), _undivided(path, options), options)
    if path.is_dir():
        return _from_folder(name, path, options)
    name = name or described(path).name
    if path.suffix.lower() in (".csv", ".tsv"):
        columns = (options.csv_separator, options.csv_image_column, options.csv_caption_column)
        entries, empty = read_table(path, *columns)
        return _from_entries(name, entries, _undivided(path, options), [path.parent, Path()], path, options, empty)
    if path.suffix.lower() not in (".json", ".txt"):
        there = "is no folder, JSON, CSV or tar file" if path.exists() else "does not exist"
        raise UserError(f"{path} {there}; give a data set's folder, its JSON file of captions, a CSV file, or shards.")
    entries = read_annotations(path)
    there = splits_of(entries)
    if there:
        wanted = _wanted(there, path, options)
        entries, split = [entry for split in wanted for entry in entries if entry.split == split], "+".join(wanted)
    else:
        split = _undivided(path, options)
    # The file may be beside the pictures or in `annotations`.
    roots = [folder / images for folder in (path.parent, path.parent.parent) for images in IMAGE_FOLDERS]
    return _from_entries(name, entries, split, roots, path, options)


def _parse(spec: str) -> tuple[str, Path]:
    """(name or "", path)"""
    match = re.fullmatch(r"([\w.+-]+)=(.+)", spec)
    if match is None or Path(spec).exists():
        return "", Path(spec)
    return match[1], Path(match[2])


def _from_folder(name: str, folder: Path, options: CaptionOptions) -> CaptionedImages:
    files = find_annotations(folder)
    if name and any(file.name == name for file in files):
        files = [file for file in files if file.name == name]
    names = sorted({file.name for file in files})
    if len(names) > 1:
        raise UserError(f"{folder} holds the captions of {' and '.join(names)}; say which with --data {names[0]}=...")
    if not files:
        return _from_shard_folder(name, folder, options)

    entries: list[Entry] = []
    there = {}
    whole = next((file.path for file in files if file.split is None), None)
    if whole is not None:
        entries = read_annotations(whole)
        there = dict.fromkeys(splits_of(entries), whole)
    for file in files:
        if file.split is not None:
            there.setdefault(file.split, file.path)
    wanted = _wanted(list(there), folder, options)
    chosen = []
    for split in wanted:
        if there[split] == whole:
            chosen += [entry for entry in entries if entry.split == split]
        else:
            chosen += read_annotations(there[split])
    roots = [folder / images for images in IMAGE_FOLDERS]
    return _from_entries(name or names[0], chosen, "+".join(wanted), roots, folder, options)


def _from_shard_folder(name: str, folder: Path, options: CaptionOptions) -> CaptionedImages:
    name = name or folder.name
    tars = list_shards(folder)
    if tars:
        return _from_shards(name, tars, _undivided(folder, options), options)
    splits = {inside.name: tars for inside in sorted(folder.iterdir()) if (tars := list_shards(inside))}
    if not splits:
        raise UserError(
            f"{folder} holds no captions: there is neither a file like dataset_coco.json, coco_test.json or "
            "captions_val2017.json, nor a .tar file; name the file itself if it is called otherwise."
        )
    wanted = _wanted(list(splits), folder, options)
    return _from_shards(name, [tar for split in wanted for tar in splits[split]], "+".join(wanted), options)


def _wanted(there: list[str], path: Path, options: CaptionOptions) -> list[str]:
    wanted = list(dict.fromkeys((options.split or DEFAULT_SPLIT).split("+")))
    for split in wanted:
        if split not in there:
            message = f"{path} has no split {split!r}, only {', '.join(there)}; choose with --split."
            raise NoSuchSplit(message, there)
    return wanted


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


def _expand(pattern: str) -> list[Path]:
    sets = expand_shards(pattern, "--data")
    for shards in sets:
        check_present(shards, "--data")
    return [Path(url) for shards in sets for url in shards.urls]


def _from_shards(name: str, tars: Sequence[Path], split: str, options: CaptionOptions) -> CaptionedImages:
    if options.images is not None:
        raise UserError("--images is for captions beside pictures; shards hold their pictures, so leave it out.")
    images, captions = read_caption_shards(tars, options.txt)
    entries = [Entry(str(number), texts) for number, texts in enumerate(captions)]
    source = tars[0] if len(tars) == 1 else tars[0].parent
    kept, captions, image_of, left_out = _assemble(entries, source, options.per_image)
    images = images.subset(torch.tensor([int(number) for number in kept]))
    return CaptionedImages(images, captions, image_of, name, split, left_out)


def _from_entries(
    name: str,
    entries: Sequence[Entry],
    split: str,
    roots: Sequence[Path],
    source: Path,
    options: CaptionOptions,
    empty: int = 0,
) -> CaptionedImages:
    kept, captions, image_of, left_out = _assemble(entries, source, options.per_image, empty)
    images = _locate(kept, [options.images] if options.images else roots, source)
    return CaptionedImages(images, captions, image_of, name, split, left_out)


def _assemble(
    entries: Sequence[Entry], source: Path, per_image: int | None, empty: int = 0
) -> tuple[list[str], list[str], Tensor, dict[str, int]]:
    """Images in the order in which they come first, captions by image, image of each caption, what was left out."""
    grouped: dict[str, list[str]] = {}
    for entry in entries:
        texts = [" ".join(caption.split()) for caption in entry.captions]
        empty += texts.count("")
        grouped.setdefault(entry.image, []).extend(filter(None, texts))
    images = [image for image, texts in grouped.items() if texts]
    if not images:
        raise UserError(f"{source} has no caption for any of {len(grouped)} images; give a set with captions.")
    captions, image_of = [], []
    for number, image in enumerate(images):
        texts = grouped[image][:per_image]
        captions += texts
        image_of += [number] * len(texts)
    left_out = {"empty_captions": empty, "images_without_caption": len(grouped) - len(images)}
    if any(left_out.values()):
        log.warning(
            f"{source}: left out {empty} empty captions and {left_out['images_without_caption']} images without one."
        )
    return images, captions, torch.tensor(image_of, dtype=torch.int64), left_out


# ------------------------------------------------------------------------------------------- where the pictures are


def _locate(names: Sequence[str], roots: Sequence[Path], source: Path) -> ImageFiles:
    """The pictures of these names, all in one of the folders and all found in the same way.

    Raises:
        UserError: some are nowhere. It tells of the folder where most of them are.
    """
    listing = cache(_listing)
    best: tuple[int, Path, str] | None = None
    for root in roots:
        for way in _WAYS:
            paths = [next((path for path in way(name) if _is_there(root, path, listing)), None) for name in names]
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


def _is_there(root: Path, path: str, listing: Callable[[str], frozenset[str]]) -> bool:
    folder, name = os.path.split(os.path.join(root, path))
    return name in listing(folder)


def _listing(folder: str) -> frozenset[str]:
    """Names in a folder, all at once: asking for each file takes long on a network's disk."""
    try:
        return frozenset(os.listdir(folder or "."))
    except OSError:
        return frozenset()


def _as_it_is(name: str) -> Iterator[str]:
    yield name


def _last_folder(name: str) -> Iterator[str]:
    """The lists of others have their own paths before `val2014/COCO_val2014_000000391895.jpg`."""
    yield "/".join(name.split("/")[-2:])


def _file_name(name: str) -> Iterator[str]:
    yield name.split("/")[-1]


def _coco_folder(name: str) -> Iterator[str]:
    match = re.fullmatch(r"COCO_(\w+)_\d+\.jpg", name.split("/")[-1])
    if match:
        yield f"{match[1]}/{match[0]}"


def _coco_2017(name: str) -> Iterator[str]:
    """COCO's release of 2017 has the pictures of 2014 under shorter names, in other folders."""
    match = re.fullmatch(r"COCO_(?:train|val)2014_(\d{12}\.jpg)", name.split("/")[-1])
    if match:
        yield from (f"val2017/{match[1]}", f"train2017/{match[1]}")


_WAYS: tuple[Callable[[str], Iterator[str]], ...] = (_as_it_is, _last_folder, _file_name, _coco_folder, _coco_2017)
