"""Pictures and their captions, out of files, folders and shards."""
from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import webdataset
from PIL import Image, UnidentifiedImageError

from ..errors import ModelError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Pair(NamedTuple):
    name: str
    image: Image.Image
    caption: str | None


def read_pairs(path: str, count: int | None = None) -> Iterator[Pair]:
    """The first `count` readable pictures of a file, of a folder (with captions in .txt files beside them) or of shards
    (with braces). One that cannot be read is left out with a warning.

    Raises:
        ModelError: there is nothing of that kind, or no readable picture.
    """
    if path.endswith(".tar") or "{" in path:
        encoded = _in_shards(path)
    elif Path(path).is_dir():
        encoded = _files(sorted(file for file in Path(path).iterdir() if file.suffix.lower() in ENDINGS))
    elif Path(path).is_file():
        encoded = _files([Path(path)])
    else:
        raise ModelError(f"There is no picture, folder or shard {path}; correct --image.")
    pairs = itertools.islice(_readable(encoded), count)
    first = next(pairs, None)
    if first is None:
        raise ModelError(f"{path} has no readable picture ({', '.join(ENDINGS)}); name another one in --image.")
    return itertools.chain([first], pairs)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Transparent parts become white, as in training. A ValueError for deep grey, which Pillow would clip to white."""
    if picture.mode.startswith("I"):
        raise ValueError("more than 8 bits")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _readable(encoded: Iterable[tuple[str, bytes, str | None]]) -> Iterator[Pair]:
    for name, content, caption in encoded:
        try:
            image = to_rgb(Image.open(io.BytesIO(content)))
        except Exception as error:  # of nearly any kind, from a damaged file
            why = "not an image" if isinstance(error, UnidentifiedImageError) else error
            logging.warning(f"{name} is left out: it cannot be read as a picture ({why}).")
            continue
        yield Pair(name, image, caption)


def _files(paths: Iterable[Path]) -> Iterator[tuple[str, bytes, str | None]]:
    for path in paths:
        beside = path.with_suffix(".txt")
        try:
            caption = beside.read_text(encoding="utf-8", errors="replace").strip() if beside.is_file() else None
            yield path.name, path.read_bytes(), caption
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}); correct --image.") from error


def _in_shards(path: str) -> Iterator[tuple[str, bytes, str | None]]:
    try:
        for sample in webdataset.WebDataset(path, shardshuffle=False, empty_check=False):
            ending = next((key for key in sample if f".{key.rsplit('.', 1)[-1].lower()}" in ENDINGS), None)
            if ending is not None:
                caption = sample.get("txt", b"").decode(errors="replace").strip()
                yield f"{sample['__key__']}.{ending}", sample[ending], caption or None
    except (OSError, EOFError, ValueError) as error:
        raise ModelError(f"The shards {path} cannot be read ({error}); correct --image.") from error
