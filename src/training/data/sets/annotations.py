"""Files that say which captions belong to which picture, in the forms that COCO and Flickr are passed around in."""
from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError
from ..sources import CsvRows


class Entry(NamedTuple):
    """Captions of a picture as a file has them; a picture may come again in another entry.

    image: path as the file has it. split: None where the file is not divided into splits.
    """

    image: str
    captions: list[str]
    split: str | None = None


# How the files are called. The first kind holds all splits of a set, the next ones one each; the last two count where
# there is none of these.
_NAMES = tuple(
    re.compile(pattern)
    for pattern in (
        r"dataset_(?P<name>\w+)\.json",  # Karpathy
        r"(?P<name>\w+?)_karpathy_(?P<split>\w+)\.json",  # BLIP
        r"(?P<name>\w+?)_(?P<split>train|val|test)_karpathy\.(json|txt)",  # CLIP_benchmark
        r"(?P<name>\w+?)_(?P<split>train|val|test)\.jsonl?",  # ALBEF
        r"captions_(?P<split>\w+)\.json",  # COCO
        r"(?P<name>Flickr8k)\.token\.txt",
        r"captions\.(txt|jsonl?)",  # Kaggle's Flickr8k
    )
)
_SHAPES = (
    'a Karpathy file ({"images": [{"filename", "split", "sentences"}]}), a list of {"image", "caption"} as ALBEF '
    'has it, COCO\'s annotations ({"images", "annotations": [{"image_id", "caption"}]}), or {image: captions}'
)


class AnnotationFile(NamedTuple):
    """A file and what its name says: the set, the split if it holds only one, and which of the known names it is."""

    path: Path
    name: str
    split: str | None
    kind: int | None


def described(path: Path) -> AnnotationFile:
    """Any file; called after itself where its name tells nothing."""
    for kind, pattern in enumerate(_NAMES):
        if match := pattern.fullmatch(path.name):
            parts = match.groupdict()
            name = path.parent.name if path.stem == "captions" else "coco"
            return AnnotationFile(path, parts.get("name", name), parts.get("split"), kind)
    return AnnotationFile(path, path.stem, None, None)


def find_annotations(folder: Path) -> list[AnnotationFile]:
    """The files in a data set's folder, and in `annotations` in it, whose names tell that they hold captions.

    Those that hold all splits come first.
    """
    files = [described(path) for place in (folder, folder / "annotations") for path in sorted(place.glob("*"))]
    files = sorted((file for file in files if file.kind is not None), key=lambda file: file.kind)
    return [file for file in files if file.kind < len(_NAMES) - 2] or files


def read_annotations(path: Path) -> list[Entry]:
    """What a JSON file (or one with JSON in each line) says, or a text file; see `_text_lines`.

    Raises:
        UserError: no such file, or nothing that is known here.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}; correct the path.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".txt", ".token"):
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


def read_table(path: Path, separator: str | None, image_column: str, caption_column: str) -> list[Entry]:
    """The rows of a CSV file.

    separator: None for a tab if the header has one, else a comma.

    Raises:
        UserError: see `CsvRows`.
    """
    if separator is None and path.is_file():
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            separator = "\t" if "\t" in file.readline() else ","
    rows = CsvRows(str(path), separator or ",", image_column, caption_column, "--data")
    entries = [Entry(image, [caption]) for image, caption in zip(rows.images, rows.captions, strict=True)]
    return [*entries, Entry(rows.images[0], [""] * rows.empty)]  # to be counted


def _json_entries(content: object, split: str | None) -> list[Entry]:
    if isinstance(content, list):
        return [Entry(_text(_field(item, "image")), _texts(_field(item, "caption", "captions"))) for item in content]
    if isinstance(content, dict) and "annotations" in content:
        return _coco(content, split)
    by_image = isinstance(content, dict) and "images" not in content and any(content.values())
    if by_image and all(isinstance(value, str | list) for value in content.values()):
        return [Entry(image, _texts(captions)) for image, captions in content.items()]
    return [_karpathy(item) for item in _field(content, "images")]


def _karpathy(item: object) -> Entry:
    folder, file = item.get("filepath") if isinstance(item, dict) else None, _text(_field(item, "filename"))
    captions = [_field(sentence, "raw", "tokens") for sentence in _field(item, "sentences")]
    captions = [" ".join(_texts(caption)) for caption in captions]  # tokens: where there is nothing else
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


def _text_lines(text: str, path: Path) -> list[Entry]:
    r"""Lines `FILE#N\tcaption` (Flickr8k.token), or a header and lines `FILE,caption`.

    The latter are CSV (Kaggle), or captions have commas and no quotes (CLIP_benchmark); a line whose caption is a
    quoted field as a whole is CSV. `Flickr_8k.testImages.txt` and its like, beside the former, say what each split has.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if lines and all(re.match(r"[^\t]+#\d+\t", line) for line in lines):
        splits = {}
        for split, word in (("train", "train"), ("val", "dev"), ("test", "test")):
            listed = path.with_name(f"Flickr_8k.{word}Images.txt")
            splits |= dict.fromkeys(listed.read_text(encoding="utf-8").split() if listed.is_file() else (), split)
        pairs = [(line.split("\t", 1)[0].rpartition("#")[0], line.split("\t", 1)[1]) for line in lines]
        return [Entry(image, [caption], splits.get(image)) for image, caption in pairs]
    try:
        rows = [row for row in csv.reader(text.split("\n"), strict=True) if row]
    except csv.Error:
        rows = [[]]
    if all(len(row) == 2 for row in rows):
        return [Entry(image, [caption]) for image, caption in rows[1:]]
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
    key = next((key for key in keys if isinstance(item, dict) and key in item), None)
    if key is None:
        raise ValueError(f"{keys[0]!r} is missing in {str(item)[:60]}")
    return item[key]


def _texts(value: object) -> list[str]:
    return [_text(item) for item in value] if isinstance(value, list) else [_text(value)]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:60]} is no text")
    return value
