"""Webdataset shards as image sets with captions: where each picture is in its tar file, and what is said about it."""
from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..shards import IMAGE_KEYS
from ...errors import UserError
from .labelled import TarImages
from .tar_samples import Member, read_samples

log = logging.getLogger(__name__)

TxtRule = Literal["lines", "whole"]


class _Sample(NamedTuple):
    name: str  # of the picture's member
    offset: int
    size: int
    captions: list[str] | None  # of the JSON
    txt: str | None


def read_caption_shards(tars: Sequence[Path], txt: TxtRule | None = None) -> tuple[TarImages, list[list[str]]]:
    """The pictures of uncompressed tar files, and the captions of each as they are there; it may have none.

    A sample is the members that have the name up to the first dot in common, within one file: a picture (.jpg, .jpeg,
    .png, .webp), and a .json with "captions" or "caption" (a text or a list of texts) or else a .txt.

    txt: what a .txt is: one caption ("whole"), as img2dataset writes it and the trainer reads it, or one caption a line
        ("lines"), as CLIP_benchmark's converter writes it (with a backslash and an n for a line break in a caption).
        None: lines if a `dataset_type.txt` beside the shards or above them says "retrieval", as that converter leaves
        it, else whole; then no .txt may have several lines.

    A file that breaks off gives what is before the break, and a warning.

    Raises:
        UserError: a file is no tar, captions without a picture, JSON that cannot be read, or a .txt with several lines
            while it is not known what they are.
    """
    rule = txt or ("lines" if _says_retrieval(tars[0].parent) else None)
    names, places, captions = [], [], []
    for number, tar in enumerate(tars):
        for sample in _samples(tar):
            names.append(sample.name)
            places.append((number, sample.offset, sample.size))
            if sample.captions is None and sample.txt is not None:
                captions.append(_from_txt(sample.txt, rule, f"{tar}: the .txt of {sample.name}"))
            else:
                captions.append(sample.captions or [])
    return TarImages(tars, names, np.asarray(places, dtype=np.int64)), captions


def _says_retrieval(folder: Path) -> bool:
    for place in (folder, folder.parent):
        file = place / "dataset_type.txt"
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace").strip().lower() == "retrieval"
    return False


def _from_txt(txt: str, rule: TxtRule | None, where: str) -> list[str]:
    lines = [line for line in txt.split("\n") if line.strip()]
    if rule == "lines":
        return [line.replace("\\n", " ") for line in lines]
    if rule is None and len(lines) > 1:
        raise UserError(
            f"{where} has {len(lines)} lines; say with --txt-captions whether these are captions (lines) or one "
            "caption (whole)."
        )
    return [txt]


def _samples(path: Path) -> Iterator[_Sample]:
    samples, whole = read_samples(path, {"json", "txt"})
    if not whole:
        last = next(reversed(samples), None)
        if last is not None and not _is_complete(samples[last], path):
            del samples[last]
        log.warning(f"{path} is cut off or damaged after {len(samples)} samples; the rest of it is left out.")
    for key, members in samples.items():
        picture = _picture(members)
        texts = {m.extension: m.content.decode("utf-8", errors="replace") for m in members if m.content is not None}
        captions = _from_json(texts["json"], path, key) if "json" in texts else None
        if picture is not None:
            yield _Sample(picture.name, picture.offset, picture.size, captions, texts.get("txt"))
        elif captions or "txt" in texts:
            raise UserError(f"{path}: {key} has a caption and no picture ({', '.join(IMAGE_KEYS)}).")


def _picture(members: Sequence[Member]) -> Member | None:
    return next((member for member in members if member.extension in IMAGE_KEYS), None)


def _is_complete(members: Sequence[Member], path: Path) -> bool:
    """Whether a sample at the end of a file that breaks off has a caption and all of its picture."""
    picture = _picture(members)
    captioned = any(member.content is not None for member in members)
    return captioned and picture is not None and picture.offset + picture.size <= path.stat().st_size


def _from_json(text: str, path: Path, key: str) -> list[str] | None:
    """The captions in a sample's JSON; None if it has none."""
    try:
        content = json.loads(text)
        found = content.get("captions", content.get("caption")) if isinstance(content, dict) else None
        found = [found] if isinstance(found, str) else found
        if found is not None and not (isinstance(found, list) and all(isinstance(item, str) for item in found)):
            raise ValueError("its captions are neither a text nor a list of texts")
    except ValueError as error:
        raise UserError(f"{path}: the JSON of {key} cannot be read ({error}).") from None
    return found
