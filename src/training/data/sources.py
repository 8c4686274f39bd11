"""Sources: streams of samples, whose order is a function of (seed, epoch, rank, world size, worker, workers) alone.

`train` yields passes without end; `validation` one, which gives every sample once over all readers. Nothing is decoded.
"""
from __future__ import annotations

import csv
import itertools
import logging
import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import fsspec
import numpy
import pandas
import torch
from PIL import Image

from ..errors import UserError, reason
from .randomness import stable_seed
from .samples import Pass, Reader, Sample
from .sets.labelled import LabelledImages
from .shards import PAIRS, Read, read_shard
from .sizes import noted_size

log = logging.getLogger(__name__)

_PICTURE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)\b", re.IGNORECASE)


class ShardSource:
    """Webdataset shards. With `weights`, they are drawn with replacement, with these odds, instead of dealt."""

    def __init__(
        self, urls: Sequence[str], seed: int = 0, weights: Sequence[float] | None = None, read: Read = PAIRS
    ):
        self.urls, self.seed, self.weights, self.read = list(urls), seed, weights, read

    def _shard(self, url: str, reader: Reader, part: tuple[int, int] = (0, 1)) -> Pass:
        reader.turns_to(url)
        usable, total = (yield from read_shard(url, reader.report, part, self.read)) or (0, math.inf)
        noted = noted_size(url)
        # A hundredth is for pictures that cannot be decoded, which a count may have left out.
        if noted is not None and not 0.99 * usable <= noted <= total:
            told = f"{url}: {usable} samples, but {noted} are noted; count anew with scripts/count_shards.py"
            reader.report.add("shard of another size than noted", told)

    def train(self, epoch: int, reader: Reader) -> Iterator[Pass]:
        for number in itertools.count():
            rng = random.Random(stable_seed(self.seed, "samples", epoch, reader.rank, reader.worker, number))
            if self.weights is None:  # shards are dealt anew in each pass, the same way on all ranks
                urls = self.urls.copy()
                random.Random(stable_seed(self.seed, "shards", epoch, number)).shuffle(urls)
                urls = urls[reader.rank :: reader.world_size][reader.worker :: reader.num_workers]
            else:  # a pass needs an end to find out that nothing is usable: long enough not to end on bad luck
                urls = rng.choices(self.urls, self.weights, k=max(64, len(self.urls)))
            yield shuffled(itertools.chain.from_iterable(self._shard(url, reader) for url in urls), rng)

    def validation(self, reader: Reader) -> Iterator[Pass]:
        """Whole shards for each reader; where there are fewer of them, several readers divide one."""
        count, readers = len(self.urls), reader.world_size * reader.num_workers
        number = reader.worker * reader.world_size + reader.rank
        part, chosen = (0, 1), range(number, count, readers)
        if count < readers:
            chosen = [number % count]
            part = (number // count, len(range(chosen[0], readers, count)))
        yield (
            sample._replace(index=(shard << 32) + sample.index)
            for shard in chosen
            for sample in self._shard(self.urls[shard], reader, part)
        )


def shuffled(samples: Iterable[Sample], rng: random.Random, size: int = 5000, initial: int = 1000) -> Pass:
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

    def __init__(self, rows: Sequence[Sample], seed: int = 0, batch_size: int = 1):
        self.rows, self.seed, self.batch_size = rows, seed, batch_size

    def train(self, epoch: int, reader: Reader) -> Iterator[Pass]:
        """Every num_workers-th batch of the rank; then all else that the rank has, to replace broken rows."""
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "rows", epoch))
        order = torch.randperm(len(self.rows), generator=generator)[reader.rank :: reader.world_size]
        num_batches = len(self.rows) // (self.batch_size * reader.world_size)
        used = num_batches * self.batch_size
        batches, spare = order[:used].view(num_batches, self.batch_size), order[used:]
        shares = []
        for offset in range(reader.num_workers):
            worker = (reader.worker + offset) % reader.num_workers
            shares += [batches[worker :: reader.num_workers].flatten(), spare[worker :: reader.num_workers]]
        order = torch.cat(shares).numpy()
        while True:
            yield (self.rows[row] for row in order)

    def validation(self, reader: Reader) -> Iterator[Pass]:
        number = reader.worker * reader.world_size + reader.rank
        yield (self.rows[row] for row in range(number, len(self.rows), reader.world_size * reader.num_workers))


class CsvRows:
    """The rows of a CSV file that have a caption. A comma table may be told to have tabs.

    Raises: UserError if the file, a column or every caption is missing.
    """

    def __init__(self, path: str, separator: str, image_column: str, caption_column: str, flag: str):
        columns = [image_column, caption_column]
        try:
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                separator = "," if separator == "\t" and "\t" not in file.readline() else separator
            found = list(pandas.read_csv(path, sep=separator, nrows=0).columns)
            missing = [column for column in columns if column not in found]
            if missing:
                raise UserError(
                    f"{path} has no column {missing[0]!r}, only {found}: set --csv-img-key, --csv-caption-key or "
                    f"--csv-separator (now {separator!r})."
                )
            if len(separator) == 1:
                _check_lines(path, separator, flag)
            options = {"usecols": columns, "dtype": str, "keep_default_na": False, "index_col": False}
            table = pandas.read_csv(path, sep=separator, **options).fillna("")
        except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
            raise UserError(f"{flag}: {path} cannot be read ({reason(error)}); give a table with a header.") from None
        full = table[table[caption_column].str.strip() != ""]
        if full.empty:
            raise UserError(
                f"Not one of the {len(table)} rows of {path} has a caption in the column {caption_column!r}: "
                "fill it in, or name another with --csv-caption-key."
            )
        self.name, self.folder = path, os.path.dirname(path)
        self.images, self.captions = (full[column].to_numpy(dtype=object) for column in columns)
        self.numbers = full.index.to_numpy()
        self.contents = f"{len(full):,} rows"
        self.empty = len(table) - len(full)
        if self.empty:
            self.contents += f" ({self.empty:,} more have no caption)"
            log.info("%s: %d of %d rows have no caption and are left out.", path, self.empty, len(table))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Sample:
        """A relative path counts from the working directory or, if there is nothing, from the folder of the table."""
        image = self.images[row]
        path = image if os.path.exists(image) else os.path.join(self.folder, image)
        return Sample(image, (path,), {"caption": self.captions[row]}, self.name, int(self.numbers[row]))


def _check_lines(path: str, separator: str, flag: str) -> None:
    """Raises: UserError for a line that loses text: by too many columns, or a mark that quotes the rows after it."""
    csv.field_size_limit(1 << 30)
    with fsspec.open(path, "rt", compression="infer", encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        width, end = len(next(rows)), rows.line_num
        for row in rows:
            start, end = end + 1, rows.line_num
            lines = [line for value in row for line in value.splitlines()[1:]] if end > start else []
            quoted = "".join(line for line in lines if separator in line)
            if any(row[width:]):
                problem = f"has more columns than the header; put what holds {separator!r} into quotation marks"
            elif quoted and (separator == "\t" or _PICTURE.search(quoted)):
                problem = f"has a quotation mark that takes in all up to line {end}; in quotes a mark is written twice"
            else:
                continue
            raise UserError(f"{flag}: line {start} of {path} {problem}.")


class LabelledRows:
    """Labelled images as rows for `RowSource`. contents: what there is, for people"""

    def __init__(self, data: LabelledImages):
        self.images, self.labels, self.name = data.images, data.labels.numpy(), data.name
        self.contents = f"{len(data):,} images of {len(data.classnames):,} classes"
        counts = torch.bincount(data.labels, minlength=len(data.classnames)).tolist()
        empty = [name for name, count in zip(data.classnames, counts, strict=True) if not count]
        if empty:
            self.contents += f"; {len(empty)} of the classes have no training image: {', '.join(empty[:3])}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Sample:
        row = int(row)
        image = partial(self.images.load, row)
        return Sample(self.images.name(row), (image,), {"label": int(self.labels[row])}, self.name, row)


class SyntheticRows:
    """Pictures of random patches and captions of a few words, both determined by the row."""

    WORDS = (
        ("tiny", "small", "large", "huge"),
        ("red", "green", "blue", "yellow", "black", "white", "purple", "orange"),
        ("cat", "dog", "tree", "house", "boat", "cup", "lamp", "chair", "bird", "bridge", "clock", "flower"),
    )
    name = "synthetic"

    def __init__(self, count: int):
        self.count, self.contents = count, f"{count:,} rows"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Sample:
        rng = random.Random(stable_seed("synthetic", int(row)))
        caption = " ".join(["a", *map(rng.choice, self.WORDS)])
        return Sample(f"{row:08d}", (partial(_patches, int(row)),), {"caption": caption}, self.name, int(row))


def _patches(row: int) -> Image.Image:
    patches = numpy.random.default_rng(row).integers(0, 256, (7, 7, 3), dtype=numpy.uint8)
    return Image.fromarray(patches).resize((224, 224), Image.Resampling.NEAREST)
