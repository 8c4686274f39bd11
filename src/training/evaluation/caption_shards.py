"""Webdataset shards as image sets with captions: where each picture is in its tar file, and what is said about it."""
from __future__ import annotations

import json
import logging
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..data.shards import IMAGE_KEYS
from ..errors import UserError
from .pictures import TarImages

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
    pictures: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, dict[str, str]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                key, extension = folder + slash + stem, extension.lower()
                if not (member.isfile() and stem and dot):
                    continue
                texts.setdefault(key, {})
                if extension in IMAGE_KEYS:
                    pictures.setdefault(key, member)
                elif extension in ("json", "txt"):
                    texts[key][extension] = tar.extractfile(member).read().decode("utf-8", errors="replace")
            tar.fileobj.seek(tar.offset)
            whole = tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct the path.") from None
    except tarfile.ReadError as error:
        if not pictures:
            raise UserError(f"{path} is not a readable tar file ({error}); mend or remove it.") from None
        whole = False
    if not whole:  # tarfile takes most kinds of damage for the end
        last = next(reversed(texts), None)
        if last is not None and not (texts[last] and last in pictures and _ends_in(path, pictures[last])):
            del texts[last]
        log.warning(f"{path} is cut off or damaged after {len(texts)} samples; the rest of it is left out.")
    for key, parts in texts.items():
        captions = _from_json(parts["json"], path, key) if "json" in parts else None
        if key in pictures:
            picture = pictures[key]
            yield _Sample(picture.name, picture.offset_data, picture.size, captions, parts.get("txt"))
        elif captions or "txt" in parts:
            raise UserError(f"{path}: {key} has a caption and no picture ({', '.join(IMAGE_KEYS)}).")


def _ends_in(path: Path, member: tarfile.TarInfo) -> bool:
    return member.offset_data + member.size <= path.stat().st_size


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
