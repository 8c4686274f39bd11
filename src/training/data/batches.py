"""The data of a run: training batches whose position can be saved, and validation batches."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..errors import UserError
from . import images
from .loader import Batch, BatchStream, run
from .pixels import makes_pixels
from .samples import DataReport, Encoding
from .sets.labelled import sizes_and_times
from .sources import RowSource, ShardSource


@dataclass(eq=False)
class _Data:
    source: ShardSource | RowSource
    encoding: Encoding
    options: Any  # with `batch_size`, `workers`, `seed` and `stall_seconds`
    rank: int
    world_size: int
    _report: DataReport = field(default_factory=DataReport, init=False)

    def report(self) -> DataReport:
        """What was skipped on this rank since the epoch or the iteration began, before a resume too."""
        return replace(self._report)


@dataclass(eq=False)
class TrainData(_Data):
    """Training batches of one rank, epoch by epoch, from any position."""

    num_batches: int  # per epoch on each rank
    identity: dict[str, Any]  # what the order depends on besides, in plain types
    plan: list[str]  # what to say of an epoch
    files: dict[str, list[int]] = field(init=False)  # that are read, each with its bytes and time of change; on rank 0

    def __post_init__(self):
        self.num_samples = self.num_batches * self.options.batch_size * self.world_size  # per epoch on all ranks
        self._num_readers = max(1, self.options.workers)
        self.identity = {
            **self.identity,
            "batch_size": self.options.batch_size,
            "world_size": self.world_size,
            "workers": self._num_readers,
            "seed": self.options.seed,
            "batches per epoch": self.num_batches,
        }
        files = [] if self.rank else self.source.files
        self.files = dict(zip(files, sizes_and_times(files, True).tolist(), strict=True))
        self._loaded = False
        self._go_to(epoch=0)

    def _go_to(self, epoch: int, batches: int = 0, positions: list | None = None, places: list | None = None) -> None:
        self._epoch, self._batches = epoch, batches
        self._positions = positions or [0] * self._num_readers
        self._places = places or [None] * self._num_readers
        self._report = DataReport()

    def describe(self) -> str:
        """The plan of an epoch, for people."""
        options, lines = self.options, self.plan.copy()
        if makes_pixels(getattr(self.encoding, "transform", None)):
            decoder = "simplejpeg" if images.simplejpeg else "Pillow (simplejpeg, which is faster, is not installed)"
            lines.append(f"images by --image-decode {options.image_decode}, JPEGs decoded by {decoder}")
        lines.append(
            f"{some(self.num_batches, 'batch', 'batches')} of {options.batch_size:,} on each of "
            f"{some(self.world_size, 'rank')} ({some(options.workers, 'worker')} each) = {self.num_samples:,} samples "
            "per epoch"
        )
        return "\n  ".join(lines)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Batches of an epoch: from the loaded position if it lies in this epoch, otherwise from the beginning.

        Each is what the encoding makes of it, and "key": a list of B strings.
        Raises: UserError if a worker finds nothing usable in a whole pass over its part of the data.
        """
        if not (self._loaded and self._epoch == epoch):
            self._go_to(epoch)
        self._loaded = False
        return self._batches_from_here()

    def _batches_from_here(self) -> Iterator[Batch]:
        done, readers = self._batches, self._num_readers
        if done == self.num_batches:
            return
        # Batch i is made by worker i % readers: the next one of each worker is
        firsts = [done + (worker - done) % readers for worker in range(readers)]
        quotas = [len(range(first, self.num_batches, readers)) for first in firsts]
        passes, seed = partial(self.source.train, self._epoch), (self.options.seed, self._epoch)
        stream = BatchStream(self, passes, seed, self._positions.copy(), self._places.copy(), quotas, done % readers)
        for batch, worker, position, place in run(stream, self._report):
            self._batches += 1
            self._positions[worker] = position
            self._places[worker] = place or self._places[worker]
            del batch["index"]
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out, for this rank only, as plain Python values."""
        return {
            "epoch": self._epoch,
            "batches": self._batches,
            "positions": list(self._positions),
            "places": list(self._places) if self._batches < self.num_batches else [],
            **asdict(self._report),
            "identity": dict(self.identity),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there: `epoch` of the saved epoch begins after its last batch.

        Raises: UserError if the position lies within an epoch whose order would be another one now.
        """
        epoch, batches, saved = state["epoch"], state["batches"], state["identity"]
        changed = ", ".join(
            f"{name} {saved.get(name)!r} (now {self.identity.get(name)!r})"
            for name in {**saved, **self.identity}
            if saved.get(name) != self.identity.get(name)
        )
        at_the_end = batches == saved["batches per epoch"]
        if at_the_end or batches == 0:
            self._go_to(epoch, self.num_batches if at_the_end else 0)
        elif changed:
            raise UserError(
                f"The checkpoint stops in the middle of epoch {epoch}, whose data were read with "
                f"{changed}: continue with the same values, or from the end of an epoch."
            )
        else:
            self._go_to(epoch, batches, list(state["positions"]), list(state.get("places", ())))
        self._report.merge(DataReport(state["skipped"], state["examples"]))
        self._loaded = True

    def skip_to(self, epoch: int, batches: int) -> None:
        """Continue without a saved position: `epoch` of this epoch begins with its batch number `batches`.

        For a run with another world size or batch size now. It is by count, not exact: every worker passes over as many
        samples as its part of so many batches has. Some samples come again and others not at all.
        """
        batches = min(batches, self.num_batches)
        made = [len(range(worker, batches, self._num_readers)) for worker in range(self._num_readers)]
        self._go_to(epoch, batches, [count * self.options.batch_size for count in made])
        self._loaded = True

@dataclass(eq=False)
class ValData(_Data):
    """Validation batches of one rank. Over all ranks, every sample comes exactly once; ranks may differ in batches.

    Batches are those of `TrainData.epoch`, the last ones maybe smaller, and have "index": (B,) long, an order key that
    is unique over all ranks.
    """

    num_samples: int | None  # of the whole set, all ranks together; None if unknown

    def __iter__(self) -> Iterator[Batch]:
        self._report = DataReport()
        readers = max(1, self.options.workers)
        stream = BatchStream(self, self.source.validation, ("validation",), [0] * readers, [None] * readers)
        for batch, *_ in run(stream, self._report):
            batch["index"] = torch.tensor(batch["index"])
            yield batch


def some(count: int, thing: str, things: str | None = None) -> str:
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"
