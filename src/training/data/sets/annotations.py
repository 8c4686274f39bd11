"""Files that say which captions belong to which picture, in the forms that COCO and Flickr30K are passed around in."""
from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..sources import CsvRows
from ...errors import UserError


class Entry(NamedTuple):
    """Captions of a picture as a file has them; a picture may come again in another entry.

    image: path as the file has it. split: None where the file is not divided into splits.
    """

    image: str
    captions: list[str]
    split: str | None = None


# How the files are called. The first kind holds all splits of a set, the others one each.
_NAMES = tuple(
    re.compile(pattern)
    for pattern in (
        r"dataset_(?P<name>\w+)\.json",  # Karpathy
        r"(?P<name>\w+?)_karpathy_(?P<split>\w+)\.json",  # BLIP
        r"(?P<name>\w+?)_(?P<split>train|val|test)_karpathy\.(json|txt)",  # CLIP_benchmark
        r"(?P<name>\w+?)_(?P<split>train|val|test)\.json",  # ALBEF
        r"captions_(?P<split>\w+)\.json",  # COCO
    )
)
_SHAPES = (
    'a Karpathy file ({"images": [{"filename", "split", "sentences"}]}), a list of {"image", "caption"} as ALBEF '
    'has it, or COCO\'s annotations ({"images", "annotations": [{"image_id", "caption"}]})'
)


class AnnotationFile(NamedTuple):
    """A file and what its name says: the set, and the split if it holds only one."""

    path: Path
    name: str
    split: str | None


def find_annotations(folder: Path) -> list[AnnotationFile]:
    """The files in a data set's folder, and in `annotations` in it, whose names tell that they hold captions.

    Those that hold all splits come first.
    """
    found = []
    for place in (folder, folder / "annotations"):
        for path in sorted(place.glob("*")):
            kind, name, split = _named(path)
            if kind is not None:
                found.append((kind, AnnotationFile(path, name, split)))
    return [file for _, file in sorted(found, key=lambda item: item[0])]


def described(path: Path) -> AnnotationFile:
    """Any file; called after itself where its name tells nothing."""
    _, name, split = _named(path)
    return AnnotationFile(path, name, split)


def _named(path: Path) -> tuple[int | None, str, str | None]:
    for kind, pattern in enumerate(_NAMES):
        if match := pattern.fullmatch(path.name):
            parts = match.groupdict()
            return kind, parts.get("name", "coco"), parts.get("split")
    return None, path.stem, None


def read_annotations(path: Path) -> list[Entry]:
    """What a JSON file says, or CLIP_benchmark's text files of lines `FILE.jpg,caption`.

    Raises:
        UserError: no such file, or nothing that is known here.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}; correct the path.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix != ".txt" else None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again.") from None
    try:
        if path.suffix == ".txt":
            return _lines(text)
        if isinstance(content, list):
            return [Entry(_text(_field(item, "image")), _texts(_field(item, "caption"))) for item in content]
        if isinstance(content, dict) and "annotations" in content:
            return _coco(content, described(path).split)
        return [_karpathy(item) for item in _field(content, "images")]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} has a shape that is not known here ({error}); it must be {_SHAPES}.") from None


def read_table(path: Path, separator: str | None, image_column: str, caption_column: str) -> tuple[list[Entry], int]:
    """The rows of a CSV file, and how many of them have no caption.

    separator: None for a tab if the header has one, else a comma.

    Raises:
        UserError: see `CsvRows`.
    """
    if separator is None and path.is_file():
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            separator = "\t" if "\t" in file.readline() else ","
    rows = CsvRows(str(path), separator or ",", image_column, caption_column, "--data")
    return [Entry(image, [caption]) for image, caption in zip(rows.images, rows.captions, strict=True)], rows.empty


def splits_of(entries: Iterable[Entry]) -> list[str]:
    """The splits that occur, in the order of the file."""
    return list(dict.fromkeys(entry.split for entry in entries if entry.split is not None))


def _karpathy(item: object) -> Entry:
    folder, file = item.get("filepath") if isinstance(item, dict) else None, _text(_field(item, "filename"))
    captions = [_text(_field(sentence, "raw")) for sentence in _field(item, "sentences")]
    return Entry(f"{folder}/{file}" if folder else file, captions, _text(_field(item, "split")))


def _coco(content: dict, split: str | None) -> list[Entry]:
    """COCO's own form; its pictures lie in a folder that is named like the split."""
    folder = f"{split}/" if split else ""
    files = {_field(image, "id"): folder + _text(_field(image, "file_name")) for image in _field(content, "images")}
    captions: dict[int, list[str]] = {number: [] for number in files}
    for annotation in content["annotations"]:
        number = _field(annotation, "image_id")
        if number not in captions:
            raise ValueError(f"there is a caption for image {number}, but no such image")
        captions[number].append(_text(_field(annotation, "caption")))
    return [Entry(files[number], captions[number]) for number in files]


def _lines(text: str) -> list[Entry]:
    """A header, then `FILE.jpg,caption`; the caption may have commas and no quotes."""
    entries = []
    for line in text.split("\n")[1:]:
        if line.strip():
            image, comma, caption = line.partition(".jpg,")
            if not comma:
                raise ValueError(f"a line is {line.strip()[:60]!r}")
            entries.append(Entry(f"{image}.jpg", [caption]))
    return entries


def _field(item: object, key: str) -> object:
    if not isinstance(item, dict) or key not in item:
        raise ValueError(f"{key!r} is missing in {str(item)[:60]}")
    return item[key]


def _texts(value: object) -> list[str]:
    return [_text(item) for item in value] if isinstance(value, list) else [_text(value)]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:60]} is no text")
    return value
