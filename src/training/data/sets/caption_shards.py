"""Webdataset shards as image sets with captions: where each picture is in its tar file, and what is said about it."""
from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ...errors import UserError
from .folders import picture_of, read_samples
from .labelled import TarImages

TxtRule = Literal["lines", "whole"]


def read_caption_shards(tars: Sequence[Path], txt: TxtRule | None = None) -> tuple[TarImages, list[list[str]]]:
    """The pictures of uncompressed tar files, and the captions of each as they are there; it may have none.

    A sample is the members that have the name up to the first dot in common, within one file: a picture, and a .json
    with "captions" or "caption" (a text or a list of texts) or else a .txt.

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
    names, places, captions, damaged = [], [], [], []
    for number, tar in enumerate(tars):
        samples, whole = read_samples(tar, {"json", "txt"})
        if not whole:
            last = next(reversed(samples), None)
            kinds = {member.extension for member in samples.get(last, ())}
            if kinds.isdisjoint(("json", "txt")) or picture_of(samples[last]) is None:
                samples.pop(last, None)
            logging.warning(f"{tar} is cut off or damaged after {len(samples)} samples; the rest of it is left out.")
        for key, members in samples.items():
            picture = picture_of(members)
            texts = {m.extension: m.content.decode("utf-8", errors="replace") for m in members if m.content is not None}
            damaged += [f"{tar}: {key}"] * any("\ufffd" in text for text in texts.values())
            found = _from_json(texts["json"], tar, key) if "json" in texts else None
            if picture is None and (found or "txt" in texts):
                there = ", .".join(member.extension for member in members)
                raise UserError(f"{tar}: {key} has a caption and no picture, but .{there}.")
            if picture is not None:
                if found is None and "txt" in texts:
                    found = _from_txt(texts["txt"], rule, f"{tar}: the .txt of {picture.name}")
                names.append(picture.name)
                places.append((number, picture.offset, picture.size))
                captions.append(found or [])
    if damaged:
        logging.warning(f"{len(damaged)} samples have captions that are not UTF-8, the first of them {damaged[0]}.")
    return TarImages(tars, names, np.asarray(places, dtype=np.int64)), captions


def _says_retrieval(folder: Path) -> bool:
    file = next((file for place in (folder, folder.parent) if (file := place / "dataset_type.txt").is_file()), None)
    return file is not None and file.read_text(encoding="utf-8", errors="replace").strip().lower() == "retrieval"


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
