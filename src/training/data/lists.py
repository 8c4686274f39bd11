"""Lists of samples: JSON, as ALBEF and BLIP have their data, with pictures by path, and METER's Arrow files."""
from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, reason
from .arrow import ENDING, LeftOut, read_arrow
from .images import ImageLike
from .samples import Sample

log = logging.getLogger(__name__)

Item = dict[str, Any]
# From an item to the paths of its pictures and its fields; a string says what is wrong with it.
ReadItem = Callable[[Item], "tuple[Sequence[str], dict[str, Any]] | LeftOut | str"]


class ListRows:
    """The items of lists, as rows for `RowSource`.

    Args:
        files: of lists, one after the other.
        root: the folder that relative paths of pictures count from; None: each file's own.
        read: what an item is made of.
        flag: of the command line, for what is said.

    Raises:
        UserError: a file or picture is missing, or an item is not what `read` takes.
    """

    def __init__(self, files: Sequence[str], root: str | None, read: ReadItem, flag: str):
        self.name = "::".join(files)
        self.rows: list[tuple[str, tuple[ImageLike, ...], dict[str, Any]]] = []
        left_out: Counter[str] = Counter()
        for file in files:
            folder = Path(root or Path(file).parent)
            for number, (item, stored) in enumerate(read_items(file, flag)):
                found = read(item) if isinstance(item, dict) else item
                if isinstance(found, LeftOut):
                    left_out[found] += 1
                    continue
                if isinstance(found, str):
                    raise UserError(f"Item {number} of {file} cannot be used: {found}.")
                pictures, fields = found
                self.rows.append((file, stored or tuple(str(folder / picture) for picture in pictures), fields))
        self.contents = f"{len(self.rows):,} samples"
        if left_out:
            self.contents += f" ({', '.join(f'{count:,} x {why}' for why, count in left_out.items())} left out)"
            log.info("%s: %s.", self.name, self.contents)
        if not self.rows:
            raise UserError(f"{flag} {self.name} has nothing to use: {self.contents}.")
        self.check_pictures(flag)

    def check_pictures(self, flag: str) -> None:
        """UserError if not one of the first pictures that are files is there."""
        some = [picture for _, pictures, _ in self.rows[:100] for picture in pictures if isinstance(picture, str)]
        if some and not any(Path(picture).is_file() for picture in some):
            raise UserError(
                f"None of the pictures that {flag} names is there, {some[0]} for one: say in --image-root what their "
                "paths count from."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        file, pictures, fields = self.rows[int(row)]
        return Sample(str(pictures[0]), pictures, fields, file, int(row))


def read_items(file: str, flag: str) -> Iterable[tuple[Item | str, tuple[ImageLike, ...]]]:
    """The items of a file, each with its pictures if these are in there; a string says what is wrong with one."""
    if file.endswith(ENDING):
        return read_arrow(file, flag)
    return ((item if isinstance(item, dict) else "it is not an object", ()) for item in read_list(file, flag))


def read_list(file: str, flag: str) -> list[Any]:
    """A JSON list that is not empty, or a UserError."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{flag} {file} does not exist; correct the path.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file} cannot be read as JSON ({reason(error)}).") from error
    if not isinstance(found, list) or not found:
        raise UserError(f"{flag} {file} must hold a JSON list of samples, which has at least one.")
    return found


def text_of(item: Item, key: str) -> str | None:
    """A text that is not empty, or None."""
    value = item.get(key)
    return value if isinstance(value, str) and value.strip() else None


def read_pair(item: Item) -> tuple[Sequence[str], dict[str, Any]] | str:
    """{"image": path, "caption": text or list of texts, of which one is drawn each time}; maybe an "image_id"."""
    image, caption = text_of(item, "image"), item.get("caption")
    captions = [caption] if isinstance(caption, str) else caption
    if image is None:
        return 'it has no "image"'
    if not isinstance(captions, list) or not captions or not all(isinstance(one, str) for one in captions):
        return 'its "caption" is neither a text nor a list of texts'
    if not all(one.strip() for one in captions):
        return 'its "caption" is empty'
    return (image,), {"caption": captions, "image_id": item.get("image_id", image)}
