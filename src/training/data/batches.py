"""The data of a run: training batches whose position can be saved, and validation batches."""
from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..errors import UserError
from .loader import Batch, BatchStream, run
from .report import DataReport
from .samples import Encoding
from .sources import Source

log = logging.getLogger(__name__)


class TrainData:
    """Training batches of one rank, epoch by epoch, from any position.

    options: with `batch_size`, `workers`, `seed`, and `stall_seconds`: how long to wait for a batch before the log
        tells whom the wait is for; 0 for never
    num_batches: per epoch on each rank
    num_samples: per epoch on all ranks together
    identity: what the order depends on besides, in plain types
    """

    def __init__(
        self,
        source: Source,
        encoding: Encoding,
        options: Any,
        *,
        rank: int,
        world_size: int,
        num_batches: int,
        identity: dict[str, Any],
        description: str,
    ):
        self.num_batches = num_batches
        self.num_samples = num_batches * options.batch_size * world_size
        self._source, self._options, self._description = source, options, description
        self._make_stream = partial(
            BatchStream, encoding=encoding, batch_size=options.batch_size, rank=rank, world_size=world_size
        )
        self._num_readers = max(1, options.workers)
        self._identity = {
            **identity,
            "batch_size": options.batch_size,
            "world_size": world_size,
            "workers": self._num_readers,
            "seed": options.seed,
            "batches per epoch": num_batches,
        }
        self._report = DataReport()
        self._loaded = False
        self._go_to(epoch=0)

    def _go_to(self, epoch: int, batches: int = 0, positions: list[int] | None = None) -> None:
        self._epoch, self._batches = epoch, batches
        self._positions = positions or [0] * self._num_readers
        self._report.clear()

    def describe(self) -> str:
        """The plan of an epoch, for people."""
        return self._description

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Batches of an epoch: from the loaded position if it lies in this epoch, otherwise from the beginning.

        Each is what the encoding makes of it, and "key": a list of B strings. `pixels.to_device` takes it further.
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
        stream = self._make_stream(
            samples=partial(self._source.train, self._epoch),
            seed=(self._options.seed, self._epoch),
            positions=self._positions.copy(),
            quotas=[len(range(first, self.num_batches, readers)) for first in firsts],
            first_worker=done % readers,
        )
        for batch, progress in run(stream, self._options.workers, self._report, self._options.stall_seconds):
            self._batches += 1
            self._positions[progress["worker"]] = progress["position"]
            del batch["index"]
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out, for this rank only, as plain Python values."""
        return {
            "epoch": self._epoch,
            "batches": self._batches,
            "positions": list(self._positions),
            "skipped": dict(self._report.skipped),
            "examples": list(self._report.examples),
            "identity": dict(self._identity),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there: `epoch` of the saved epoch begins after its last batch.

        Between epochs anything may have changed since; what makes the data differ is named in the log.

        Raises: UserError if the position lies within an epoch whose order would be another one now.
        """
        epoch, batches, saved = state["epoch"], state["batches"], state["identity"]
        changed = ", ".join(
            f"{name} {saved.get(name)!r} (now {self._identity.get(name)!r})"
            for name in {**saved, **self._identity}
            if saved.get(name) != self._identity.get(name)
        )
        at_the_end = batches == saved["batches per epoch"]
        if at_the_end or batches == 0:
            if changed:
                log.warning("From here on the data are not those of the uninterrupted run, read with %s.", changed)
            self._go_to(epoch, self.num_batches if at_the_end else 0)
        elif changed:
            raise UserError(
                f"The checkpoint stops in the middle of epoch {epoch}, whose data were read with "
                f"{changed}: continue with the same values, or from the end of an epoch."
            )
        else:
            self._go_to(epoch, batches, list(state["positions"]))
        self._report.merge(state["skipped"], state["examples"])
        self._loaded = True

    def skip_to(self, epoch: int, batches: int) -> None:
        """Continue without a saved position: `epoch` of this epoch begins with its batch number `batches`.

        For a run that goes on with another world size or batch size. It is by count, not exact: every worker passes
        over as many samples as its part of so many batches has. Broken pictures among them were not in those
        batches, and what was read by one reader is now another's, so some samples come again and others not at all.
        """
        batches = min(batches, self.num_batches)
        made = [len(range(worker, batches, self._num_readers)) for worker in range(self._num_readers)]
        self._go_to(epoch, batches, [count * self._options.batch_size for count in made])
        self._loaded = True

    def report(self) -> DataReport:
        """What was skipped on this rank since the epoch began, before a resume too."""
        return DataReport(dict(self._report.skipped), list(self._report.examples))


class ValData:
    """Validation batches of one rank. Over all ranks, every sample comes exactly once; ranks may differ in batches.

    num_samples: of the whole set, all ranks together; None if unknown

    Batches are those of `TrainData.epoch`, the last ones maybe smaller, and have "index": (B,) long, an order key that
    is unique over all ranks.
    """

    def __init__(
        self, source: Source, encoding: Encoding, options: Any, *, rank: int, world_size: int, num_samples: int | None
    ):
        self.num_samples = num_samples
        self._options = options
        self._stream = BatchStream(
            samples=source.validation,
            encoding=encoding,
            batch_size=options.batch_size,
            seed=("validation",),
            rank=rank,
            world_size=world_size,
            positions=[0] * max(1, options.workers),
        )
        self._report = DataReport()

    def __iter__(self) -> Iterator[Batch]:
        self._report.clear()
        for batch, _ in run(self._stream, self._options.workers, self._report, self._options.stall_seconds):
            batch["index"] = torch.tensor(batch["index"])
            yield batch

    def report(self) -> DataReport:
        """What was skipped on this rank since the iteration began."""
        return DataReport(dict(self._report.skipped), list(self._report.examples))
