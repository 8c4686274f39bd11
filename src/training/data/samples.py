"""What sources yield and whom they yield it to, and what a task makes of it."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from .images import ImageLike


class Sample(NamedTuple):
    """A sample before any work was put into it.

    fields: what else there is to it, by name: "caption", "label", ...
    origin: the shard or table it comes from, for messages
    index: an order key, unique in a validation set
    """

    key: str
    images: tuple[ImageLike, ...]
    fields: dict[str, Any]
    origin: str
    index: int


class Encoding(Protocol):
    """How a task's samples become tensors, and these a batch."""

    def encode(self, sample: Sample) -> Any:
        """In a worker; the global generators are seeded for this sample. Raises: Unreadable for a broken picture."""

    def collate(self, encoded: list[Any]) -> dict[str, Any]:
        """A batch, to which the loader adds "key" and "index"."""


class Reader(NamedTuple):
    """Who reads: worker `worker` of `num_workers` (at least one) on rank `rank` of `world_size`.

    turns_to: is told the shard or picture that it turns to
    """

    rank: int
    world_size: int
    worker: int
    num_workers: int
    turns_to: Callable[[str], None]


# Stands in an endless stream where everything that the reader can get has been yielded once more.
END_OF_PASS = None
