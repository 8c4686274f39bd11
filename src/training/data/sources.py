"""Sources: streams of samples, whose order is a function of (seed, epoch, rank, world size, worker, workers) alone.

`train` streams are endless, with END_OF_PASS where they begin again; `validation` streams give every sample once over
all readers. Nothing is decoded here.
"""
from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy
import pandas
import torch
from PIL import Image

from ..errors import UserError
from .randomness import stable_seed
from .report import DataReport
from .samples import END_OF_PASS, Reader, Sample
from .shards import Read, image_and_caption, read_shard


class ShardSource:
    """Webdataset shards.

    weights: draw shards with replacement, with these odds, instead of going through all of them
    read: what a sample is made of
    """

    def __init__(
        self,
        urls: Sequence[str],
        seed: int = 0,
        weights: Sequence[float] | None = None,
        read: Read = image_and_caption,
    ):
        self.urls, self.seed, self.weights, self.read = list(urls), seed, weights, read

    def _samples(
        self, url: str, reader: Reader, report: DataReport, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Sample]:
        reader.turns_to(url)
        return read_shard(url, report, part, self.read)

    def train(self, epoch: int, reader: Reader, report: DataReport) -> Iterator[Sample | None]:
        for number in itertools.count():
            rng = random.Random(stable_seed(self.seed, "samples", epoch, reader.rank, reader.worker, number))
            if self.weights is None:  # shards are dealt anew in each pass, the same way on all ranks
                urls = self.urls.copy()
                random.Random(stable_seed(self.seed, "shards", epoch, number)).shuffle(urls)
                urls = urls[reader.rank :: reader.world_size][reader.worker :: reader.num_workers]
            else:
                # A pass needs an end to find out that nothing is usable: long enough not to end on bad luck.
                urls = rng.choices(self.urls, self.weights, k=max(64, len(self.urls)))
            samples = itertools.chain.from_iterable(self._samples(url, reader, report) for url in urls)
            yield from shuffled(samples, rng)
            yield END_OF_PASS

    def validation(self, reader: Reader, report: DataReport) -> Iterator[Sample]:
        """Whole shards for each reader; where there are fewer of them, several readers divide one."""
        count, readers = len(self.urls), reader.world_size * reader.num_workers
        number = reader.worker * reader.world_size + reader.rank
        part, chosen = (0, 1), range(number, count, readers)
        if count < readers:
            chosen = [number % count]
            part = (number // count, len(range(chosen[0], readers, count)))
        for shard in chosen:
            for sample in self._samples(self.urls[shard], reader, report, part):
                yield sample._replace(index=(shard << 32) + sample.index)


def shuffled(
    samples: Iterable[Sample], rng: random.Random, size: int = 5000, initial: int = 1000
) -> Iterator[Sample]:
    """Shuffle through a buffer that begins with `initial` samples and grows to `size` while it is in use."""
    samples = iter(samples)
    buffer = list(itertools.islice(samples, initial))
    while buffer:
        buffer.extend(itertools.islice(samples, 2 if len(buffer) < size else 1))
        pick = rng.randrange(len(buffer))
        buffer[pick], buffer[-1] = buffer[-1], buffer[pick]
        yield buffer.pop()


class RowSource:
    """Rows of a table. The batches of a rank do not depend on the number of workers, as long as no image is broken."""

    def __init__(self, rows: Sequence[Sample], seed: int = 0, batch_size: int = 1, num_batches: int = 0):
        self.rows, self.seed = rows, seed
        self.batch_size, self.num_batches = batch_size, num_batches

    def train(self, epoch: int, reader: Reader, report: DataReport) -> Iterator[Sample | None]:
        """Every num_workers-th batch of the rank; then all else that the rank has, to replace broken rows."""
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "rows", epoch))
        order = torch.randperm(len(self.rows), generator=generator)[reader.rank :: reader.world_size]
        used = self.num_batches * self.batch_size
        batches, spare = order[:used].view(self.num_batches, self.batch_size), order[used:]
        shares = []
        for offset in range(reader.num_workers):
            worker = (reader.worker + offset) % reader.num_workers
            shares += [batches[worker :: reader.num_workers].flatten(), spare[worker :: reader.num_workers]]
        order = torch.cat(shares).numpy()
        while True:
            for row in order:
                yield self.rows[row]
            yield END_OF_PASS

    def validation(self, reader: Reader, report: DataReport) -> Iterator[Sample]:
        number = reader.worker * reader.world_size + reader.rank
        for row in range(number, len(self.rows), reader.world_size * reader.num_workers):
            yield self.rows[row]


class CsvRows:
    """The rows of a CSV file that have a caption. `empty` counts the others.

    Raises: UserError if the file, a column or every caption is missing.
    """

    def __init__(self, path: str, separator: str, image_column: str, caption_column: str, flag: str):
        if not os.path.isfile(path):
            raise UserError(f"The CSV file {path} of {flag} does not exist: correct the path.")
        columns = [image_column, caption_column]
        try:
            found = list(pandas.read_csv(path, sep=separator, nrows=0).columns)
            missing = [column for column in columns if column not in found]
            if missing:
                raise UserError(
                    f"{path} has no column {missing[0]!r}, only {found}: set --csv-img-key, --csv-caption-key or "
                    f"--csv-separator (now {separator!r})."
                )
            table = pandas.read_csv(path, sep=separator, usecols=columns, dtype=str, keep_default_na=False).fillna("")
        except pandas.errors.EmptyDataError:
            raise UserError(f"The CSV file {path} of {flag} is empty: give one with a header and rows.") from None
        except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
            raise UserError(f"The CSV file {path} of {flag} cannot be read ({str(error).strip()}).") from None
        full = table[table[caption_column].str.strip() != ""]
        if full.empty:
            raise UserError(
                f"Not one of the {len(table)} rows of {path} has a caption in the column {caption_column!r}: "
                "fill it in, or name another with --csv-caption-key."
            )
        self.path, self.folder = path, os.path.dirname(path)
        self.images, self.captions = (full[column].to_numpy(dtype=object) for column in columns)
        self.numbers = full.index.to_numpy()
        self.empty = len(table) - len(full)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Sample:
        image = self.images[row]
        opener = image if os.path.isabs(image) else partial(_read_relative, image, self.folder)
        return Sample(image, (opener,), {"caption": self.captions[row]}, self.path, int(self.numbers[row]))


def _read_relative(path: str, folder: str) -> bytes:
    """A relative path counts from the working directory or, if there is nothing, from the folder of its table."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return Path(folder, path).read_bytes()


class SyntheticRows:
    """Pictures of random patches and captions of a few words, both determined by the row."""

    SIZES = ("tiny", "small", "large", "huge")
    COLOURS = ("red", "green", "blue", "yellow", "black", "white", "purple", "orange")
    THINGS = ("cat", "dog", "tree", "house", "boat", "cup", "lamp", "chair", "bird", "bridge", "clock", "flower")

    empty = 0

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Sample:
        rng = random.Random(stable_seed("synthetic", int(row)))
        caption = f"a {rng.choice(self.SIZES)} {rng.choice(self.COLOURS)} {rng.choice(self.THINGS)}"
        return Sample(f"{row:08d}", (partial(_patches, int(row)),), {"caption": caption}, "synthetic", int(row))


def _patches(row: int) -> Image.Image:
    patches = numpy.random.default_rng(row).integers(0, 256, (7, 7, 3), dtype=numpy.uint8)
    return Image.fromarray(patches).resize((224, 224), Image.Resampling.NEAREST)


Source = ShardSource | RowSource
