"""From options to training and validation data. Everything that can be checked is checked here, before any work.

`options` is any object with the attributes of the command line: `train_data`, `batch_size` and so on.
"""
from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from .batches import TrainData, ValData
from .images import jpeg_decoder
from .pairs import LabelledRows
from .pixels import PixelTransform
from .samples import Encoding
from .sets.labelled import LabelledImages
from .shards import Read, ShardSet, check_shards, expand_shards, image_and_caption
from .sizes import HOW, count_samples
from .sources import CsvRows, RowSource, ShardSource, SyntheticRows

log = logging.getLogger(__name__)


class _Plan(NamedTuple):
    source: ShardSource | RowSource
    num_batches: int
    identity: dict[str, Any]
    lines: list[str]


def build_train_data(
    options: Any, encoding: Encoding, *, rank: int, world_size: int, read: Read = image_and_caption
) -> TrainData | None:
    """Training data as the options name them; None without --train-data.

    Raises: UserError for whatever is wrong with the options or the data they name.
    """
    if options.train_data is None and options.dataset_type != "synthetic":
        return None
    kind = _dataset_type(options.train_data, options.dataset_type, "--train-data")
    if options.train_data_upsampling_factors is not None and not (kind == "webdataset" and options.dataset_resampled):
        raise UserError(
            "--train-data-upsampling-factors needs --dataset-resampled and webdataset shards: "
            "only shards that are drawn with replacement can be drawn more often."
        )
    if kind == "webdataset":
        plan = _plan_shards(options, world_size, read)
    else:
        name = "synthetic" if kind == "synthetic" else options.train_data
        rows = _rows(kind, options, options.train_data, "--train-data", options.train_num_samples, rank)
        told = _some(len(rows), "row") + (f" ({rows.empty:,} more have no caption)" if rows.empty else "")
        plan = _plan_rows(name, rows, "usable row", [told], options, world_size, {"rows": len(rows)})
    if isinstance(getattr(encoding, "transform", None), PixelTransform):
        plan.lines.append(f"images by --image-decode {options.image_decode}, JPEGs decoded by {jpeg_decoder()}")
    return _train_data(kind, plan, encoding, options, rank, world_size)


def build_labelled_data(
    options: Any, data: LabelledImages, encoding: Encoding, *, rank: int, world_size: int
) -> TrainData:
    """Training data of labelled images. Raises: UserError for less than one batch."""
    counts = torch.bincount(data.labels, minlength=len(data.classnames)).tolist()
    empty = [name for name, count in zip(data.classnames, counts, strict=True) if not count]
    told = [f"{len(data):,} images of {len(data.classnames):,} classes"]
    if empty:
        names = ", ".join(empty[:3]) + ", ..." * (len(empty) > 3)
        told.append(f"{len(empty)} of the classes have no training image: {names}")
    identity = {"fingerprint": data.fingerprint(times=False)}
    plan = _plan_rows(data.name, LabelledRows(data), "training image", told, options, world_size, identity)
    return _train_data("labelled", plan, encoding, options, rank, world_size)


def build_val_data(
    options: Any, encoding: Encoding, *, rank: int, world_size: int, read: Read = image_and_caption
) -> ValData | None:
    """Validation data as the options name them; None without --val-data.

    Raises: UserError for whatever is wrong with the options or the data they name.
    """
    if options.val_data is None:
        return None
    kind = _dataset_type(options.val_data, options.dataset_type, "--val-data")
    if kind == "webdataset":
        sets = expand_shards(options.val_data, "--val-data")
        check_shards(sets, "--val-data", read)
        source = ShardSource([url for shard_set in sets for url in shard_set.urls], read=read)
        num_samples = options.val_num_samples or _total(_counts(sets))
    else:
        count = options.val_num_samples or options.train_num_samples
        rows = _rows(kind, options, options.val_data, "--val-data", count, rank)
        source, num_samples = RowSource(rows), len(rows)
    return ValData(source, encoding, options, rank=rank, world_size=world_size, num_samples=num_samples)


def _dataset_type(path: str | None, dataset_type: str, flag: str) -> str:
    if dataset_type != "auto":
        return dataset_type
    kind = {"csv": "csv", "tsv": "csv", "tar": "webdataset"}.get(path.strip(": ").rpartition(".")[2].lower())
    if kind is None:
        raise UserError(f"{flag} {path!r} does not end in .tar, .csv or .tsv: say what it is with --dataset-type.")
    return kind


def _train_data(kind: str, plan: _Plan, encoding: Encoding, options: Any, rank: int, world_size: int) -> TrainData:
    samples = plan.num_batches * options.batch_size * world_size
    lines = [
        f"Training data ({kind}):",
        *plan.lines,
        f"{_some(plan.num_batches, 'batch', 'batches')} of {options.batch_size:,} on each of "
        f"{_some(world_size, 'rank')} ({_some(options.workers, 'worker')} each) = {samples:,} samples per epoch",
    ]
    return TrainData(
        plan.source,
        encoding,
        options,
        rank=rank,
        world_size=world_size,
        num_batches=plan.num_batches,
        identity={"dataset_type": kind, **plan.identity},
        description="\n  ".join(lines),
    )


def _plan_shards(options: Any, world_size: int, read: Read) -> _Plan:
    sets = expand_shards(options.train_data, "--train-data")
    factors = options.train_data_upsampling_factors
    factors = [1.0] * len(sets) if factors is None else [float(factor) for factor in factors.split("::")]
    weighted = list(zip(sets, factors, strict=True))
    used = [shard_set for shard_set, factor in weighted if factor]
    check_shards(used, "--train-data", read)
    urls = [url for shard_set in sets for url in shard_set.urls]
    workers = max(1, options.workers)
    readers = workers * world_size
    if not options.dataset_resampled and len(urls) < readers:
        raise UserError(
            f"{_some(len(urls), 'shard')} in --train-data cannot be shared by {_some(workers, 'worker')} on each of "
            f"{_some(world_size, 'rank')} ({readers:,} readers): use fewer --workers, add "
            "--dataset-resampled, or make more shards."
        )

    counts = _counts(used, needed=options.train_num_samples is None)
    wanted = options.train_num_samples or sum(counts)
    # As in OpenCLIP: round up, first to whole global batches, then to equally many for each worker.
    num_batches = math.ceil(wanted / (options.batch_size * world_size))
    num_batches = math.ceil(num_batches / workers) * workers
    samples = num_batches * options.batch_size * world_size

    # Odds are those of shards; where their sizes are unknown, they count as equally large.
    sizes = [len(shard_set.urls) for shard_set in used] if None in counts else counts
    parts = [factor * size for factor, size in zip(filter(None, factors), sizes, strict=True)]
    lines = []
    for shard_set, count, part in zip(used, counts, parts, strict=True):
        line = f"{shard_set.pattern}: {_some(len(shard_set.urls), 'shard')}"
        if count is not None:
            line += f", {_some(count, 'sample')}"
        if options.dataset_resampled:
            share = part / (sum(parts) or 1)
            line += f", {share:.1%} of what is drawn"
            if count:
                line += f": each sample {share * samples / count:.2f} times per epoch"
        lines.append(line)
    lines += [f"{shard_set.pattern}: not read, its weight is 0" for shard_set, factor in weighted if not factor]
    if options.train_num_samples is not None:
        total = _total(counts)
        passes = f", {wanted / total:.2f} times the {total:,} that there are" if total else ""
        lines.append(f"{wanted:,} samples by --train-num-samples{passes}")
    odds = None
    if options.dataset_resampled:
        odds = [factor for shard_set, factor in weighted for _ in shard_set.urls]
        lines.append(f"shards are drawn with replacement by {_some(readers, 'reader')}")
    else:
        fewest, rest = divmod(len(urls), readers)
        each = f"{fewest:,} or {fewest + 1:,}" if rest else f"{fewest:,}"
        lines += [
            f"{_some(len(urls), 'shard')} for {_some(readers, 'reader')}: {each} for each, dealt anew in each pass",
            f"{samples - wanted:,} more than that per epoch, repeated to give each worker equally many whole batches",
        ]
    identity = {
        "sources": [shard_set.pattern for shard_set in sets],
        "resampled": bool(options.dataset_resampled),
        "upsampling factors": options.train_data_upsampling_factors,
    }
    return _Plan(ShardSource(urls, options.seed, odds, read), num_batches, identity, lines)


def _counts(sets: list[ShardSet], needed: bool = False) -> list[int | None]:
    """The samples of each source. None: it is unknown, which is an error where they are `needed`."""
    counts, unknown = [], []
    for shard_set in sets:
        try:
            count, problems = count_samples(shard_set)
        except UserError:
            if needed:
                raise
            count, problems = None, []
        counts.append(count)
        unknown += problems
    if needed and unknown:
        raise UserError(f"How many samples there are is unknown for {', '.join(unknown)}: {HOW}.")
    if needed and sum(counts) == 0:
        raise UserError("The sizes that are noted for --train-data say that there are no samples: correct them.")
    return counts


def _total(counts: list[int | None]) -> int | None:
    return None if None in counts else sum(counts)


def _plan_rows(
    name: str, rows: Any, kind: str, told: list[str], options: Any, world_size: int, identity: dict[str, Any]
) -> _Plan:
    num_batches, left_out = divmod(len(rows), options.batch_size * world_size)
    if num_batches == 0:
        raise UserError(
            f"{name} has only {_some(len(rows), kind)}, fewer than one batch of {options.batch_size} on each of "
            f"{_some(world_size, 'rank')}: use a smaller --batch-size or more data."
        )
    lines = [f"{name}: {told[0]}", *told[1:]]
    lines.append(f"{left_out:,} of them, others in each epoch, are left out by rounding down")
    source = RowSource(rows, options.seed, options.batch_size, num_batches)
    return _Plan(source, num_batches, {"sources": [name], **identity}, lines)


def _rows(kind: str, options: Any, path: str, flag: str, count: int | None, rank: int) -> CsvRows | SyntheticRows:
    if kind == "synthetic":
        if not count:
            raise UserError("--dataset-type synthetic needs --train-num-samples: say how many samples to make.")
        return SyntheticRows(count)
    rows = CsvRows(path, options.csv_separator, options.csv_img_key, options.csv_caption_key, flag)
    if rows.empty and rank == 0:
        log.warning("%s: %d of %d rows have no caption and are left out.", path, rows.empty, rows.empty + len(rows))
    return rows


def _some(count: int, thing: str, things: str | None = None) -> str:
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"
