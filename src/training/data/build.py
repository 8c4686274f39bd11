"""From options to training and validation data. Everything that can be checked is checked here, before any work.

`options` is any object with the attributes of the command line: `train_data`, `batch_size` and so on.
"""
from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

from ..errors import UserError
from ..options.config_file import SOURCE_SEPARATOR
from .batches import TrainData, ValData, some
from .false_pairs import FalsePairs
from .lists import ListRows, ReadItem, read_pair
from .samples import DataReport, Encoding
from .sets.labelled import LabelledImages
from .shards import BRACES, CAPTION_KEY, IMAGE_KEYS, TRIED, Pairs, Read, check_shards, expand_shards, one_decodes
from .sizes import count_samples
from .sources import CsvRows, LabelledRows, RowSource, ShardSource, SyntheticRows


def build_train_data(
    options: Any, encoding: Encoding, *, rank: int, world_size: int, read: Read | None = None
) -> TrainData | None:
    """Training data as the options name them; None without --train-data. Raises: UserError."""
    if options.train_data is None and options.dataset_type != "synthetic":
        return None
    kind = _dataset_type(options.train_data, options.dataset_type, "--train-data")
    if options.train_data_upsampling_factors is not None and not (kind == "webdataset" and options.dataset_resampled):
        raise UserError("--train-data-upsampling-factors needs --dataset-resampled and webdataset shards.")
    if kind == "webdataset":
        return _train_shards(options, encoding, rank, world_size, read or _pairs(options))
    rows = _rows(kind, options, options.train_data, "--train-data", options.train_num_samples)
    return _train_rows(kind, rows, {"rows": len(rows)}, options, encoding, rank, world_size)


def build_labelled_data(
    options: Any, data: LabelledImages, encoding: Encoding, *, rank: int, world_size: int
) -> TrainData:
    """Training data of labelled images. Raises: UserError for less than one batch."""
    identity = {"fingerprint": data.fingerprint(times=False)}
    return _train_rows("labelled", LabelledRows(data), identity, options, encoding, rank, world_size)


def build_list_data(
    options: Any, read: ReadItem, encoding: Encoding, *, rank: int, world_size: int
) -> TrainData:
    """Training data of the lists `train_data`, JSON or Arrow files. Raises: UserError."""
    rows = ListRows(options.train_data, options.image_root, read, "--train-data")
    return _train_rows("json", rows, {"rows": len(rows)}, options, encoding, rank, world_size)


def build_val_data(
    options: Any, encoding: Encoding, *, rank: int, world_size: int, read: Read | None = None
) -> ValData | None:
    """Validation data as the options name them; None without --val-data. Raises: UserError."""
    if options.val_data is None:
        return None
    kind = "auto" if options.dataset_type == "synthetic" else options.dataset_type  # only training makes up its pairs
    kind = _dataset_type(options.val_data, kind, "--val-data")
    if kind == "webdataset":
        sets, read = expand_shards(options.val_data, "--val-data"), read or _pairs(options)
        check_shards(sets, "--val-data", read)
        source = ShardSource([url for shard_set in sets for url in shard_set.urls], read=read)
        counts = [count_samples(shard_set, needed=False, warn=rank == 0) for shard_set in sets]
        num_samples = options.val_num_samples or (None if None in counts else sum(counts))
    else:
        count = options.val_num_samples or options.train_num_samples
        rows = _rows(kind, options, options.val_data, "--val-data", count)
        source, num_samples = RowSource(rows), len(rows)
        if isinstance(encoding, FalsePairs):
            encoding = replace(encoding, rows=rows)
    return ValData(source, encoding, options, rank, world_size, num_samples)


def _dataset_type(path: str | None, dataset_type: str, flag: str) -> str:
    if dataset_type != "auto":
        return dataset_type
    if os.path.isdir(path.rpartition("::")[2]):
        return "webdataset"
    kinds = {"csv": "csv", "tsv": "csv", "tar": "webdataset", "json": "json", "arrow": "json"}
    kind = kinds.get(path.strip(": ").rpartition(".")[2].lower())
    if kind is None:
        remedy = f"name shards with braces, such as shards/{BRACES}, or say what it is with --dataset-type"
        raise UserError(f"{flag} {path!r} does not end in .tar, .csv, .tsv, .json or .arrow: {remedy}.")
    return kind


def _pairs(options: Any) -> Pairs:
    image, caption = ((key or "").lower().lstrip(".") for key in (options.shard_img_key, options.shard_caption_key))
    return Pairs((image,) if image else IMAGE_KEYS, caption or CAPTION_KEY)


def _train_shards(options: Any, encoding: Encoding, rank: int, world_size: int, read: Read) -> TrainData:
    if isinstance(encoding, FalsePairs) and (encoding.texts or options.batch_size == 1):
        raise UserError("Shards have no false captions, and no false image for a batch of one pair: give lists.")
    sets = expand_shards(options.train_data, "--train-data")
    if options.train_data_upsampling_factors is not None:
        factors = map(float, options.train_data_upsampling_factors.split("::"))
        sets = [shard_set._replace(factor=factor) for shard_set, factor in zip(sets, factors, strict=True)]
    used = [shard_set for shard_set in sets if shard_set.factor]
    check_shards(used, "--train-data", read)
    urls = [url for shard_set in sets for url in shard_set.urls]
    workers = max(1, options.workers)
    readers = workers * world_size
    if not options.dataset_resampled and len(urls) < readers:
        raise UserError(
            f"{some(len(urls), 'shard')} in --train-data cannot be shared by {some(workers, 'worker')} on each of "
            f"{some(world_size, 'rank')} ({readers:,} readers): use fewer --workers, add "
            "--dataset-resampled, or make more shards."
        )

    needed = options.train_num_samples is None
    counts = [count_samples(shard_set, needed, warn=rank == 0) for shard_set in used]
    total = None if None in counts else sum(counts)
    wanted = options.train_num_samples or total
    if not wanted:
        raise UserError("The sizes that are noted for --train-data say that there are no samples: correct them.")
    # As in OpenCLIP: round up, first to whole global batches, then to equally many for each worker.
    num_batches = math.ceil(wanted / (options.batch_size * world_size))
    num_batches = math.ceil(num_batches / workers) * workers
    samples = num_batches * options.batch_size * world_size

    # Odds are those of shards; where their sizes are unknown, they count as equally large.
    sizes = [len(shard_set.urls) for shard_set in used] if total is None else counts
    parts = [shard_set.factor * size for shard_set, size in zip(used, sizes, strict=True)]
    lines = ["Training data (webdataset):"]
    for shard_set, count, part in zip(used, counts, parts, strict=True):
        line = f"{shard_set.pattern}: {some(len(shard_set.urls), 'shard')}"
        if count is not None:
            line += f", {some(count, 'sample')}"
        if options.dataset_resampled:
            share = part / (sum(parts) or 1)
            line += f", {share:.1%} of what is drawn"
            if count:
                line += f": each sample {share * samples / count:.2f} times per epoch"
        lines.append(line)
    lines += [f"{shard_set.pattern}: not read, its weight is 0" for shard_set in sets if not shard_set.factor]
    if options.train_num_samples is not None:
        passes = f", {wanted / total:.2f} times the {total:,} that there are" if total else ""
        lines.append(f"{wanted:,} samples by --train-num-samples{passes}")
    odds = None
    if options.dataset_resampled:
        odds = [shard_set.factor for shard_set in sets for _ in shard_set.urls]
        lines.append(f"shards are drawn with replacement by {some(readers, 'reader')}")
    else:
        fewest, rest = divmod(len(urls), readers)
        each = f"{fewest:,} or {fewest + 1:,}" if rest else f"{fewest:,}"
        lines += [
            f"{some(len(urls), 'shard')} for {some(readers, 'reader')}: {each} for each, dealt anew in each pass",
            f"{samples - wanted:,} more than that per epoch, repeated to give each worker equally many whole batches",
        ]
    identity = {
        "dataset_type": "webdataset",
        "sources": [shard_set.pattern for shard_set in sets],
        "resampled": bool(options.dataset_resampled),
        "upsampling factors": options.train_data_upsampling_factors,
    }
    source = ShardSource(urls, options.seed, odds, read)
    return TrainData(source, encoding, options, rank, world_size, num_batches, identity, lines)


def _train_rows(
    kind: str, rows: Any, identity: dict[str, Any], options: Any, encoding: Encoding, rank: int, world_size: int
) -> TrainData:
    num_batches, left_out = divmod(len(rows), options.batch_size * world_size)
    if num_batches == 0:
        raise UserError(
            f"{rows.name} has only {some(len(rows), 'usable sample')}, fewer than one batch of {options.batch_size} on "
            f"each of {some(world_size, 'rank')}: use a smaller --batch-size or more data."
        )
    lines = [
        f"Training data ({kind}):",
        f"{rows.name}: {rows.contents}",
        f"{left_out:,} of them, others in each epoch, are left out by rounding down",
    ]
    if isinstance(encoding, FalsePairs):
        encoding = replace(encoding, rows=rows)
    identity = {"dataset_type": kind, "sources": [rows.name], **identity}
    source = RowSource(rows, options.seed, options.batch_size)
    return TrainData(source, encoding, options, rank, world_size, num_batches, identity, lines)


def _rows(kind: str, options: Any, path: str, flag: str, count: int | None) -> CsvRows | ListRows | SyntheticRows:
    if kind == "synthetic":
        if not count:
            raise UserError("--dataset-type synthetic needs --train-num-samples: say how many samples to make.")
        return SyntheticRows(count)
    if kind == "json":
        return ListRows(path.split(SOURCE_SEPARATOR), options.image_root, read_pair, flag)
    rows = CsvRows(path, options.csv_separator, options.csv_img_key, options.csv_caption_key, flag)
    report = DataReport()
    if not one_decodes((rows[row] for row in range(0, len(rows), -(-len(rows) // TRIED))), report):
        where = "paths count from the working directory or from the folder of the table"
        raise UserError(f"{flag}: not one picture of {path} can be read ({report.summary()}): {where}.")
    return rows
