"""Rows of feature matrices and their classes, read in chunks: from the device, or from files that do not fit there."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Numbers in the widest intermediate result of a chunk; with 1000 classes a chunk has 16,777 rows, 64 MiB of logits.
CHUNK_NUMBERS = 2**24


class FeatureSet(NamedTuple):
    """Features and classes of a data set, or some of its rows.

    features: (M, D) of any floating type, in memory or mapped from `path`. labels: (M,) int64 on the CPU.
    rows: (n,) int64 on the CPU, increasing: the rows that are meant. skipped: names of the pictures of others.
    """

    features: Tensor
    labels: Tensor
    rows: Tensor
    skipped: Sequence[str] = ()
    path: Path | None = None


@dataclass(frozen=True)
class FeatureRows:
    """Labelled rows of one or more matrices, one matrix after the other.

    Each use of a row copies it to `device` and converts it to float32 (float64 stays), so a matrix may be larger than
    the memory. The chunks do not depend on where the matrices are: results are the same to the last bit. Labels are
    below `num_classes`. With `shift` and `scale`, (D,) on the device, a row x is given as (x - shift) / scale.
    """

    parts: Sequence[FeatureSet]
    num_classes: int
    device: torch.device
    shift: Tensor | None = None
    scale: Tensor | None = None

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    @property
    def width(self) -> int:
        return self.parts[0].features.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.parts[0].features.dtype, torch.float32)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows in order: features (b, D) and labels (b,), on the device."""
        size = max(1, CHUNK_NUMBERS // max(self.width, self.num_classes))
        places = [(part, start) for part in self.parts for start in range(0, len(part.rows), size)]
        elsewhere = any(part.features.device.type != self.device.type for part in self.parts)
        pin = elsewhere and self.device.type == "cuda"

        def fetch(place: tuple[FeatureSet, int]) -> tuple[Tensor, Tensor]:
            part, start = place
            rows = part.rows[start : start + size]
            first, last = int(rows[0]), int(rows[-1])
            if last - first == len(rows) - 1:  # side by side: no copy
                rows = slice(first, last + 1)
            features, labels = part.features[rows], part.labels[rows]
            return (features.pin_memory(), labels.pin_memory()) if pin else (features, labels)

        # Reading from a file goes on while the chunk before is worked on.
        for features, labels in _ahead(fetch, places) if elsewhere else map(fetch, places):
            x = features.to(self.device, non_blocking=True).to(self.dtype)
            if self.shift is not None:
                x = (x - self.shift) / self.scale
            yield x, labels.to(self.device, non_blocking=True)

    def standardized(self) -> FeatureRows:
        """The same rows with mean 0 and variance 1 in each column; a constant column becomes 0.

        Mean and variance are summed in float64, over two passes.
        """
        plain = replace(self, shift=None, scale=None)
        mean = sum(x.double().sum(dim=0) for x, _ in plain.chunks()) / len(self)
        variance = sum((x.double() - mean).square().sum(dim=0) for x, _ in plain.chunks()) / len(self)
        # What rounding leaves of a constant column must not be blown up.
        constant = variance.sqrt() <= 1e-6 * mean.abs()
        scale = variance.sqrt().masked_fill(constant, 1)
        return replace(self, shift=mean.to(self.dtype), scale=scale.to(self.dtype))


def _ahead(function: Callable, arguments: Iterable) -> Iterator:
    """`function` of each, computed by a thread one ahead of the one that is used."""
    with ThreadPoolExecutor(1) as pool:
        futures = (pool.submit(function, argument) for argument in arguments)
        for future, _ in pairwise(chain(futures, [None])):
            yield future.result()
