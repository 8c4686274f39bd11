"""How many samples shards hold: what is noted beside them, and counting them."""
from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, reason
from ..files import written_whole
from .images import load_rgb
from .samples import DataReport
from .shards import PAIRS, Read, ShardSet, by_folder, listing, local_folders, read_shard
from .streams import local_path, open_stream

log = logging.getLogger(__name__)

SIZES = "sizes.json"
HOW = "count them with open-clip-elip count-shards, or give --train-num-samples"


def count_samples(shard_set: ShardSet, needed: bool = True, warn: bool = False) -> int | None:
    """The number of samples as it is noted beside the shards.

    That is in `sizes.json`; for shards that are not in there, in img2dataset's `NNNNN_stats.json`; or in `__len__`,
    for the whole folder. Of shards that are not on this machine, a `sizes.json` beside them is tried.
    warn: of numbers that are older than their shards
    Raises: UserError if it is unknown or one of these files is damaged; None instead where it is not `needed`
    """
    here, remote = local_folders(shard_set.urls), by_folder(url for url in shard_set.urls if local_path(url) is None)
    try:
        here_count = sum(_count_folder(folder, names, warn) for folder, names in here.items())
        return here_count + sum(starmap(_count_remote, remote.items()))
    except UserError:
        if needed:
            raise
        return None


def noted_size(url: str) -> int | None:
    """What is noted for one shard on this machine, if that can be read."""
    folder, name = os.path.split(local_path(url) or "")
    with suppress(UserError):
        return _noted(folder or ".", [name])[0].get(name) if name else None


def _noted(folder: str, names: list[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Shard -> its number, and shard -> the file that says so."""
    present = listing(folder)
    sizes = read_sizes(os.path.join(folder, SIZES)) if SIZES in present else {}
    files = {name: SIZES for name in names if name in sizes}
    for name in names:
        stats = f"{name.partition('.tar')[0]}_stats.json"
        if name not in sizes and stats in present:
            files[name], problem = stats, "does not tell the number of 'successes'"
            path = os.path.join(folder, stats)
            sizes[name] = _read(path, lambda text: _count(json.loads(text)["successes"]), problem, HOW)
    return sizes, files


def _count_folder(folder: str, names: list[str], warn: bool) -> int:
    present, (sizes, files) = listing(folder), _noted(folder, names)
    missing = [name for name in names if name not in sizes]
    if whole := len(missing) == len(names) and "__len__" in present:
        files = dict.fromkeys(names, "__len__")
    old = [name for name, file in files.items() if warn and _time(folder, name) > _time(folder, file)]
    if old:
        told = f"{files[old[0]]} in {folder} is older than {len(old)} of its shards, the first of them {old[0]}"
        log.warning("%s: its numbers of samples may be wrong; count anew with open-clip-elip count-shards.", told)
    if not missing:
        return sum(sizes[name] for name in names)
    unused = {name for name in present if name.endswith(".tar")} - set(names)
    if whole and not unused:
        return _read(os.path.join(folder, "__len__"), _count, "does not hold a number of samples", "write it anew")
    length = f"its __len__ counts {len(unused)} more shards than are used" if unused else "there is no __len__"
    raise UserError(
        f"How many samples there are is unknown for {len(missing)} of the shards in {folder}: the first, {missing[0]}, "
        f"is not in {SIZES}, has no {missing[0].partition('.tar')[0]}_stats.json, and {length}; {HOW}."
    )


def _time(folder: str, name: str) -> float:
    return os.stat(os.path.join(folder, name)).st_mtime


def _count_remote(folder: str, names: list[str]) -> int:
    try:
        if folder.startswith("pipe:"):
            raise ValueError
        with open_stream(f"{folder}/{SIZES}") as stream:
            sizes = _table(stream.read())
        return sum(sizes[name] for name in names)
    except Exception:  # anything, depending on who opens it; it is for the person to say, then
        raise UserError(f"How large {names[0]} is is unknown: {folder} is not on this machine; {HOW}.") from None


def read_sizes(path: str) -> dict[str, int]:
    """Shard -> samples. Raises: UserError if it is not such a table."""
    return _read(path, _table, "is not a table of shard names and sample counts", "correct or delete it")


def _table(text: str | bytes) -> dict[str, int]:
    return {name: _count(size) for name, size in json.loads(text).items()}


def _count(value: Any) -> int:
    if isinstance(value, bool) or not 0 <= float(value) <= 1e15 or int(value) != float(value):
        raise ValueError(f"not {value}")
    return int(value)


def _read(path: str, parse: Callable[[str], Any], problem: str, remedy: str) -> Any:
    try:
        return parse(Path(path).read_text())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} {problem} ({error}): {remedy}.") from None


class ShardCount(NamedTuple):
    """The usable samples of a shard up to where it breaks off, what is wrong in it, examples, and how it breaks."""

    samples: int
    skipped: dict[str, int]
    broken: str | None
    examples: list[str]


def count_shard(path: str, decode: bool = False, read: Read = PAIRS) -> ShardCount:
    """Count the samples that training finds in a shard, by headers of the tar and captions. Raises: OSError.

    decode: read it all, and count only samples whose picture can be decoded and whose caption is not blank
    """
    open(path, "rb").close()
    report, failures, count = DataReport(), [], 0
    for sample in read_shard(path, report, read=read, failures=failures, headers_only=not decode):
        try:
            if decode:
                load_rgb(sample.images[0])
            count += 1
        except Exception:  # PIL raises nearly anything on damaged files
            report.add("unreadable image", f"{path}: {sample.key}")
    return ShardCount(count, report.skipped, reason(failures[0]) if failures else None, report.examples)


def write_sizes(folder: str, counts: dict[str, int], since: float) -> None:
    """Put counts of shards into their folder's `sizes.json`; other entries stay, unless their shard has changed since.

    since: when the counting began, in seconds of the clock; dates the file, for `changed_shards`
    """
    path = Path(folder, SIZES)
    sizes = read_sizes(str(path)) if path.exists() else {}
    old = changed_shards(folder, sizes.keys() & listing(folder))
    sizes = {name: size for name, size in sizes.items() if name not in old} | counts
    with written_whole(path) as file:
        file.write((json.dumps(dict(sorted(sizes.items())), indent=1) + "\n").encode())
        file.flush()
        os.utime(file.fileno(), (since, since))


def changed_shards(folder: str, names: Iterable[str]) -> set[str]:
    """Those that the folder's `sizes.json` has no entry for, or an older one than the shard itself."""
    path = os.path.join(folder, SIZES)
    if not os.path.exists(path):
        return set(names)
    sizes, written = read_sizes(path), _time(folder, SIZES)
    return {name for name in names if name not in sizes or _time(folder, name) >= written}
