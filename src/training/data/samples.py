"""What sources yield and whom they yield it to, what a task makes of it, and what had to be left out."""
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .images import ImageLike
from .pixels import picture_to_tensor, stack

MAX_EXAMPLES = 5


class Sample(NamedTuple):
    """A sample before any work was put into it."""

    key: str
    images: tuple[ImageLike, ...]
    fields: dict[str, Any]  # what else there is to it, by name: "caption", "label", ...
    origin: str  # the shard or table it comes from, for messages
    index: int  # an order key, unique in a validation set
    entry: int = -1  # see `streams.Member`


@dataclass(eq=False)
class Pass:
    """The samples of one pass over all that a reader can get. Training goes on with a next pass, without end."""

    samples: Iterable[Sample]
    passed: int = 0  # samples that were used before it begins, where it is the first one after a resume

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def place(self, position: int) -> str | None:
        """Where it stands, after `position` samples of all passes, for `Reader.place`; None if not worth noting now."""


class Encoding(Protocol):
    """How a task's samples become tensors, and these a batch."""

    def encode(self, sample: Sample) -> Any:
        """In a worker; the global generators are seeded for this sample. Raises: Unreadable for a broken picture."""

    def collate(self, encoded: list[Any]) -> dict[str, Any]:
        """A batch, to which the loader adds "key" and "index"."""


class PairEncoding:
    """Batches {"image": `Images`, "text": (B, T) long} of samples with one picture and a "caption", or several captions
    of which one is drawn.

    transform: from an RGB picture to (3, H, W); a `PixelTransform` makes pixels, else it makes normalised floats
    """

    field, name = "caption", "text"

    def __init__(self, transform: Callable, tokenizer: Callable[[list], Tensor]):
        self.transform, self.tokenizer = transform, tokenizer

    def encode(self, sample: Sample) -> tuple[Tensor, Any]:
        value = sample.fields[self.field]
        value = random.choice(value) if isinstance(value, list) else value
        return picture_to_tensor(sample.images[0], self.transform), value

    def collate(self, encoded: list[tuple[Tensor, Any]]) -> dict[str, Any]:
        images, values = zip(*encoded, strict=True)
        return {"image": stack(images, self.transform), self.name: self.tokenizer(list(values))}


class LabelEncoding(PairEncoding):
    """Batches {"image": `Images`, "label": (B,) long} of samples with one picture and a "label", a class number."""

    field = name = "label"

    def __init__(self, transform: Callable):
        super().__init__(transform, torch.tensor)


@dataclass
class DataReport:
    """Counts of what was skipped, and why."""

    skipped: dict[str, int] = field(default_factory=dict)  # such as {"unreadable image": 2, "broken shard": 1}
    examples: list[str] = field(default_factory=list)  # the first few, as "shard: key: error"

    def add(self, reason: str, example: str) -> None:
        self.merge(DataReport({reason: 1}, [example]))

    def merge(self, more: DataReport) -> None:
        self.skipped = dict(Counter(self.skipped) + Counter(more.skipped))
        self.examples = [*self.examples, *more.examples][:MAX_EXAMPLES]

    def take(self) -> DataReport:
        """What there is, which begins anew here."""
        taken = replace(self)
        self.skipped, self.examples = {}, []
        return taken

    def sentence(self) -> str:
        """One line for the log; empty when nothing was skipped."""
        return f"Skipped or damaged in the data: {self.summary()}." if self.skipped else ""

    def summary(self) -> str:
        counts = ", ".join(f"{count} x {reason}" for reason, count in sorted(self.skipped.items()))
        return f"{counts} (for example {'; '.join(self.examples[:2])})" if self.examples else counts


class Reader(NamedTuple):
    """Who reads: worker `worker` of `num_workers` (at least one) on rank `rank` of `world_size`."""

    rank: int
    world_size: int
    worker: int
    num_workers: int
    report: DataReport
    turns_to: Callable[[str], None]  # is told the shard or picture that it turns to
    passed: int = 0  # samples that were used before
    place: str | None = None  # the last that `Pass.place` gave before so many
