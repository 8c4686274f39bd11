"""Sources: streams of samples, whose order is a function of (seed, epoch, rank, world size, worker, workers) alone.

`train` yields passes without end; `validation` one, which gives every sample once over all readers. Nothing is decoded.
"""
from __future__ import annotations

import csv
import itertools
import json
import logging
import math
import os
import random
import re
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import fsspec
import numpy
import pandas
import torch
from PIL import Image

from ..errors import UserError, reason
from .randomness import stable_seed
from .samples import DataReport, Pass, Reader, Sample
from .sets.labelled import LabelledImages
from .shards import PAIRS, Read, read_shard
from .sizes import noted_size
from .streams import WHOLE, Run, local_path

log = logging.getLogger(__name__)

_PICTURE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)\b", re.IGNORECASE)


class ShardSource:
    """Webdataset shards. With `weights`, they are drawn with replacement, with these odds, instead of dealt."""

    def __init__(
        self, urls: Sequence[str], seed: int = 0, weights: Sequence[float] | None = None, read: Read = PAIRS
    ):
        self.urls, self.seed, self.weights, self.read = list(urls), seed, weights, read
        self.files = [path for path in map(local_path, urls) if path]

    def shard(
        self, url: str, reader: Reader, part: tuple[int, int] = (0, 1), runs: Sequence[Run] = WHOLE, before: int = 0
    ) -> Generator[Sample]:
        """Its usable samples; there are `before` of them before the runs."""
        reader.turns_to(url)
        usable, total = (yield from read_shard(url, reader.report, part, self.read, runs=runs)) or (0, math.inf)
        usable, noted = before + usable, noted_size(url)
        # A hundredth is for pictures that cannot be decoded, which a count may have left out.
        if noted is not None and not 0.99 * usable <= noted <= total:
            told = f"{url}: {usable} samples, but {noted} are noted; count anew with open-clip-elip count-shards"
            reader.report.add("shard of another size than noted", told)

    def train(self, epoch: int, reader: Reader) -> Iterator[Pass]:
        for number in itertools.count(json.loads(reader.place)["number"] if reader.place else 0):
            rng = random.Random(stable_seed(self.seed, "samples", epoch, reader.rank, reader.worker, number))
            if self.weights is None:  # shards are dealt anew in each pass, the same way on all ranks
                urls = self.urls.copy()
                random.Random(stable_seed(self.seed, "shards", epoch, number)).shuffle(urls)
                urls = urls[reader.rank :: reader.world_size][reader.worker :: reader.num_workers]
            else:  # a pass needs an end to find out that nothing is usable: long enough not to end on bad luck
                urls = rng.choices(self.urls, self.weights, k=max(64, len(self.urls)))
            yield ShardPass(self, number, urls, rng, reader)
            reader = reader._replace(place=None)

    def validation(self, reader: Reader) -> Iterator[Pass]:
        """Whole shards for each reader; where there are fewer of them, several readers divide one."""
        count, readers = len(self.urls), reader.world_size * reader.num_workers
        number = reader.worker * reader.world_size + reader.rank
        part, chosen = (0, 1), range(number, count, readers)
        if count < readers:
            chosen = [number % count]
            part = (number // count, len(range(chosen[0], readers, count)))
        yield Pass(
            sample._replace(index=(shard << 32) + sample.index)
            for shard in chosen
            for sample in self.shard(self.urls[shard], reader, part)
        )


class ShardPass(Pass):
    """The samples of shards, shuffled. Raises: UserError if one is not what it was when the place was noted."""

    def __init__(self, source: ShardSource, number: int, urls: list[str], rng: random.Random, reader: Reader):
        self.source, self.number, self.urls, self.rng, self.reader = source, number, urls, rng, reader
        self.at, self.shard, self.last, self.usable = 0, None, None, 0  # which it is, the samples to come, those so far
        self.buffer, self.states, self.passed, self.noted = [], {}, 0, 0
        if reader.place:
            self._go_to(**json.loads(reader.place))

    def __iter__(self) -> Iterator[Sample]:
        return shuffled(self._samples(), self.rng, buffer=self.buffer, **({"initial": 0} if self.passed else {}))

    def _samples(self) -> Iterator[Sample]:
        while self.at < len(self.urls):
            url = self.urls[self.at]
            if self.shard is None:
                self.states[url], self.shard = _state(url), self.source.shard(url, self.reader)
            for sample in self.shard:
                self.last, self.usable = sample, self.usable + 1
                yield sample
            self.at, self.shard, self.last, self.usable = self.at + 1, None, None, 0

    def place(self, position: int) -> str | None:
        """The buffer by reference, in JSON: often enough to leave little behind it, seldom enough to cost nothing."""
        if position - self.noted < len(self.buffer) // 8:
            return None
        self.noted, kept, shards = position, [*self.buffer, *([self.last] if self.last else [])], {}
        for spot, sample in enumerate(kept):
            state, places = shards.setdefault(sample.origin, (self.states[sample.origin], []))
            places.append((spot, sample.index, sample.entry))
        place = {"number": self.number, "position": position, "at": self.at, "usable": self.usable, "shards": shards}
        return json.dumps(place | {"draws": self.rng.getstate()[1], "keys": _checksum(kept)})

    def _go_to(self, number, position, at, usable, shards, draws, keys) -> None:
        self.passed = self.noted = position
        self.at, self.usable, kept = at, usable, {}
        self.rng.setstate((3, tuple(draws), None))
        for url, (state, places) in shards.items():
            runs = [(*place, 1) for place in sorted({(index, entry) for _, index, entry in places})]
            self.states[url], report = state, DataReport()
            self.reader.turns_to(url)
            samples = read_shard(url, report, read=self.source.read, runs=runs) if _state(url) == state else ()
            found = {sample.index: sample for sample in samples}
            _check(len(found) == len(runs), url, report.summary())
            kept |= {spot: found[index] for spot, index, _ in places}
        self.buffer = [kept[spot] for spot in range(len(kept))]
        _check(_checksum(self.buffer) == keys, " or ".join(shards))
        if at < len(self.urls):  # the last one is that up to which this shard was read
            self.last = self.buffer.pop()
            runs = [(self.last.index, self.last.entry, None)]
            self.shard = self.source.shard(self.urls[at], self.reader, runs=runs, before=usable - 1)
            _check(next(self.shard, None) is not None, self.urls[at])
            self.reader.report.take()


def _check(same: bool, url: str, why: str = "") -> None:
    if not same:
        raise UserError(
            f"{url} cannot be read as before the checkpoint{why and f' ({why})'}, so the epoch would go on in another "
            "order: put it back as it was, with its date, or continue from the end of an epoch."
        )


def _state(url: str) -> list[int]:
    """By which it is seen whether a shard on this machine has changed."""
    with suppress(OSError):
        stat = os.stat(local_path(url) or "")
        return [stat.st_size, stat.st_mtime_ns]
    return []


def _checksum(samples: Iterable[Sample]) -> int:
    return zlib.crc32("/".join(sample.key for sample in samples).encode(errors="backslashreplace"))


def shuffled(
    samples: Iterable[Sample], rng: random.Random, size: int = 5000, initial: int = 1000, buffer: list | None = None
) -> Iterator[Sample]:
    """Shuffle through a buffer, maybe a given one, that begins with `initial` samples and grows to `size` in use."""
    samples, buffer = iter(samples), [] if buffer is None else buffer
    buffer.extend(itertools.islice(samples, initial))
    while buffer:
        buffer.extend(itertools.islice(samples, 2 if len(buffer) < size else 1))
        pick = rng.randrange(len(buffer))
        buffer[pick], buffer[-1] = buffer[-1], buffer[pick]
        yield buffer.pop()


class RowSource:
    """Rows of a table. The batches of a rank do not depend on the number of workers, as long as no image is broken."""

    def __init__(self, rows: Sequence[Sample], seed: int = 0, batch_size: int = 1):
        self.rows, self.seed, self.batch_size = rows, seed, batch_size
        self.files = [rows.name] if isinstance(rows, CsvRows) else []

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
        start = reader.passed and (reader.passed - 1) % len(order) + 1  # maybe its end
        yield Pass((self.rows[row] for row in order[start:]), reader.passed)
        while True:
            yield Pass(self.rows[row] for row in order)

    def validation(self, reader: Reader) -> Iterator[Pass]:
        number = reader.worker * reader.world_size + reader.rank
        yield Pass(self.rows[row] for row in range(number, len(self.rows), reader.world_size * reader.num_workers))


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
                _check_lines(path, separator, flag, columns)
            options = {"usecols": columns, "dtype": str, "keep_default_na": False, "index_col": False}
            table = pandas.read_csv(path, sep=separator, **options).fillna("")
        except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
            remedy = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "give one table with a header"
            raise UserError(f"{flag}: {path} cannot be read ({reason(error)}); {remedy}.") from None
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


def _check_lines(path: str, separator: str, flag: str, columns: Sequence[str]) -> None:
    """UserError: two of `columns`, or a line that loses text by too many columns or a mark that quotes more rows."""
    csv.field_size_limit(1 << 30)
    with fsspec.open(path, "rt", compression="infer", encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        names, end = next(rows), rows.line_num
        if twice := [name for name in columns if names.count(name) > 1]:
            raise UserError(f"{flag}: {path} has more than one column {twice[0]!r}; give them different names.")
        for row in rows:
            start, end = end + 1, rows.line_num
            lines = [line for value in row for line in value.splitlines()[1:]] if end > start else []
            quoted = "".join(line for line in lines if separator in line)
            if any(row[len(names):]):
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
