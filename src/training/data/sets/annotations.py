"""What says which captions belong to which picture: files that come with COCO and Flickr, shards, and Arrow files."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ...errors import UserError
from ..arrow import ArrowFile
from ..streams import Member
from .folders import read_shards
from .labelled import ArrowImages, TarImages

TxtRule = Literal["lines", "whole"]


class Entry(NamedTuple):
    """Captions of a picture as a file has them; a picture may come again in another entry."""

    image: str  # path as the file has it
    captions: list[str]
    split: str | None = None  # None where the file is not divided


# How the files are called. The first kind holds all splits of a set, the next ones one each; the last three count where
# there is none of these.
_NAMES = (
    r"dataset_(?P<name>\w+)\.json",  # Karpathy
    r"(?P<name>\w+?)_karpathy_(?P<split>\w+)\.json",  # BLIP
    r"(?P<name>\w+?)_(?P<split>train|val|test)_karpathy\.(json|txt)",  # CLIP_benchmark
    r"(?P<name>\w+?)_(?P<split>train|val|test)\.jsonl?",  # ALBEF
    r"captions_(?P<split>\w+)\.json",  # COCO
    r"(?P<name>Flickr8k)\.token\.txt",
    r"captions\.(txt|jsonl?)|results\.csv",  # Kaggle's Flickr8k and Flickr30K
    r"(?P<name>\w+?)_caption_karpathy_(?P<split>\w+)\.arrow",  # METER
)
_SHAPES = 'a Karpathy file, a list of {"image", "caption"}, COCO\'s annotations, or {image: captions}'


class AnnotationFile(NamedTuple):
    """A file and what its name says."""

    path: Path
    name: str  # of the set
    split: str | None = None  # if it holds only one
    kind: int | None = None  # which of the known names it is


def described(path: Path) -> AnnotationFile:
    """Any file; called after itself where its name tells nothing."""
    for kind, pattern in enumerate(_NAMES):
        if match := re.fullmatch(pattern, path.name):
            name = path.parent.name if path.stem in ("captions", "results") else "coco"
            return AnnotationFile(path, **{"name": name, **match.groupdict()}, kind=kind)
    return AnnotationFile(path, path.stem)


def find_annotations(folder: Path) -> list[AnnotationFile]:
    """The files of captions, by their names, in a folder and its `annotations`; first those of all splits."""
    files = [described(path) for place in (folder, folder / "annotations") for path in sorted(place.glob("*"))]
    files = [file for file in files if file.kind is not None and (file.path.suffix != ".csv" or has_bars(file.path))]
    files = sorted(files, key=lambda file: file.kind)
    return [file for file in files if file.kind < len(_NAMES) - 3] or files


def has_bars(path: Path) -> bool:
    """Whether it is Flickr30K's table as Kaggle has it, `image_name| comment_number| comment`."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return re.match(r"\W*image\w*\s*\|", file.readline()) is not None


def read_annotations(path: Path) -> list[Entry]:
    """What a JSON file (or one with JSON in each line) says, or a text file; see `_text_lines`."""
    if not path.is_file():
        raise UserError(f"There is no file {path}; correct the path.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".txt", ".token", ".csv"):
            return _text_lines(text, path)
        lines = path.suffix == ".jsonl"
        content = [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
        return _json_entries(content, described(path).split)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again.") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} has a shape that is not known here ({error}); it must be {_SHAPES}.") from None


def _json_entries(content: object, split: str | None) -> list[Entry]:
    """A list of pictures, COCO's own form, {picture: captions}, or a Karpathy file."""
    if isinstance(content, list):
        return [Entry(_text(_field(item, "image")), _texts(_field(item, "caption", "captions"))) for item in content]
    if isinstance(content, dict) and "annotations" in content:
        folder = f"{split}/" if split else ""  # COCO's pictures lie in a folder that is named like the split
        entries = {
            _field(image, "id"): Entry(folder + _text(_field(image, "file_name")), [])
            for image in _field(content, "images")
        }
        for annotation in content["annotations"]:
            number = _field(annotation, "image_id")
            if number not in entries:
                raise ValueError(f"there is a caption for image {number}, but no such image")
            entries[number].captions.append(_text(_field(annotation, "caption")))
        return list(entries.values())
    by_image = isinstance(content, dict) and "images" not in content and any(content.values())
    if by_image and all(isinstance(value, str | list) for value in content.values()):
        return [Entry(image, _texts(captions)) for image, captions in content.items()]
    entries = []
    for item in _field(content, "images"):
        image, folder = _text(_field(item, "filename")), item.get("filepath")
        captions = [_field(sentence, "raw", "tokens") for sentence in _field(item, "sentences")]
        captions = [" ".join(_texts(caption)) for caption in captions]  # tokens: where there is nothing else
        entries.append(Entry(f"{folder}/{image}" if folder else image, captions, _text(_field(item, "split"))))
    return entries


def _text_lines(text: str, path: Path) -> list[Entry]:
    r"""Lines `FILE#N\tcaption` (Flickr8k.token), or a header and lines `FILE,caption`.

    The latter are CSV (Kaggle), or captions have commas and no quotes (CLIP_benchmark); a line whose caption is a
    quoted field as a whole is CSV. `Flickr_8k.testImages.txt` and its like, beside the former, say what each split has.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    numbered = [re.fullmatch(r"([^\t]+)#\d+\t(.*)", line) for line in lines]
    if lines and all(numbered):
        splits = {}
        for split, word in (("train", "train"), ("val", "dev"), ("test", "test")):
            listed = path.with_name(f"Flickr_8k.{word}Images.txt")
            splits |= dict.fromkeys(listed.read_text(encoding="utf-8").split() if listed.is_file() else (), split)
        return [Entry(match[1], [match[2]], splits.get(match[1])) for match in numbered]
    if lines and "|" in lines[0]:  # one line of Flickr30K's has no bar before the caption
        rows = [re.fullmatch(r"([^|]+)\|\s*\d+\s*\|?(.*)", line) for line in lines[1:]]
        if None in rows:
            raise ValueError(f"a line is {lines[1 + rows.index(None)][:60]!r}")
        return [Entry(row[1].strip(), [row[2]]) for row in rows]
    try:
        rows = [row for row in csv.reader(text.split("\n"), strict=True) if row]
    except csv.Error:
        rows = [[]]
    header = "".join(lines[:1]).lower().split(",")
    if not header[0].startswith("image"):
        raise ValueError(f"its first line is {''.join(lines[:1])[:60]!r}, not 'image,caption'")
    if all(len(row) == len(header) for row in rows):  # Kaggle's Flickr30K has the caption's number in between
        return [Entry(row[0], [row[-1]]) for row in rows[1:]]
    if len(header) > 2:
        raise ValueError("it has other columns beside image and caption, and a row without quotes around its commas")
    entries = []
    for line in lines[1:]:
        match = re.match(r"(.+?\.[A-Za-z]\w{1,4}),(.*)", line)
        if match is None:
            raise ValueError(f"a line is {line[:60]!r}")
        quoted = re.fullmatch(r'"((?:[^"]|"")*)"', match[2].strip())
        entries.append(Entry(match[1], [quoted[1].replace('""', '"') if quoted else match[2]]))
    return entries


def _field(item: object, *keys: str) -> object:
    """What is there under the first of `keys` that is."""
    for key in keys:
        if isinstance(item, dict) and key in item:
            return item[key]
    raise ValueError(f"{keys[0]!r} is missing in {str(item)[:60]}")


def _texts(value: object) -> list[str]:
    return [_text(item) for item in value] if isinstance(value, list) else [_text(value)]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:60]} is no text")
    return value


def read_caption_shards(tars: Sequence[Path], txt: TxtRule | None = None) -> tuple[TarImages, list[list[str]]]:
    """The pictures of uncompressed tar files, and the captions of each as they are there; it may have none.

    A sample has a picture, and a .json with "captions" or "caption" (a text or a list of texts) or else a .txt.

    txt: what a .txt is: one caption ("whole"), as img2dataset writes it and the trainer reads it, or one caption a line
        ("lines"), as CLIP_benchmark's converter writes it (with a backslash and an n for a line break in a caption).
        None: lines if a `dataset_type.txt` beside the shards or above them says "retrieval", as that converter leaves
        it, else whole; then no .txt may have several lines.
    """
    kinds = [file for folder in tars[0].parents[:2] if (file := folder / "dataset_type.txt").is_file()]
    if txt is None and kinds and kinds[0].read_text(encoding="utf-8", errors="replace").strip().lower() == "retrieval":
        txt = "lines"
    damaged = []

    def captions(where: str, members: dict[str, Member], has_picture: bool) -> list[str]:
        texts = {k: members[k].content.decode("utf-8", errors="replace") for k in ("json", "txt") if k in members}
        damaged.extend([where] * any("\ufffd" in text for text in texts.values()))
        try:
            content = json.loads(texts.get("json", "{}"))
            found = content.get("captions", content.get("caption")) if isinstance(content, dict) else None
            found = None if found is None else _texts(found)
        except ValueError as error:
            raise UserError(f"{where}.json cannot be read ({error}).") from None
        if not has_picture and (found or "txt" in texts):
            raise UserError(f"{where} has a caption and no picture, but .{', .'.join(members)}.")
        if found is not None or "txt" not in texts:
            return found or []
        lines = [line for line in texts["txt"].split("\n") if line.strip()]
        if txt is None and len(lines) > 1:
            what = "say with --txt-captions whether these are captions (lines) or one caption (whole)"
            raise UserError(f"{where}.txt has {len(lines)} lines; {what}.")
        return [line.replace("\\n", " ") for line in lines] if txt == "lines" else [texts["txt"]]

    images, found = read_shards(tars, {"json", "txt"}, captions)
    if damaged:
        logging.warning(f"{len(damaged)} samples have captions that are not UTF-8, the first of them {damaged[0]}.")
    return images, found


def read_caption_rows(paths: Sequence[Path]) -> tuple[ArrowImages, list[list[str]]]:
    """The pictures of Arrow files, and the captions of each, equal ones once. Raises: UserError."""
    files = [ArrowFile(str(path), "--data") for path in paths]
    texts = [list(file.captions()) for file in files]
    places = [(number, row) for number, rows in enumerate(texts) for row in range(len(rows))]
    return ArrowImages(files, places), [captions for rows in texts for captions in rows]
