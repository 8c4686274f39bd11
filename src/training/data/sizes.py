"""How many samples shards hold: what is noted beside them, and counting them."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import written_whole
from .images import load_rgb
from .report import DataReport
from .shards import ShardSet, listing, local_folders, read_shard
from .streams import local_path, open_stream
from .tar import reason

SIZES = "sizes.json"
HOW = "count them with scripts/count_shards.py, or give --train-num-samples"


def count_samples(shard_set: ShardSet) -> tuple[int | None, list[str]]:
    """The number of samples as it is noted in the folders of the shards.

    That is in `sizes.json`; for shards that are not in there, in img2dataset's `NNNNN_stats.json`; or in `__len__`,
    for the whole folder. Of shards that are not on this machine, a `sizes.json` beside them is tried.

    Returns: the number, or None and the folders or shards for which it is unknown, each with the reason.
    Raises: UserError if a `sizes.json` lacks a shard or one of these files is damaged.
    """
    found = [_count_folder(folder, names) for folder, names in local_folders(shard_set.urls).items()]
    found.append(_count_remote([url for url in shard_set.urls if local_path(url) is None], shard_set.pattern))
    unknown = [problem for problem in found if isinstance(problem, str)]
    return (None if unknown else sum(found)), unknown


def _count_folder(folder: str, names: list[str]) -> int | str:
    """The number, or of what it is unknown and why."""
    present = listing(folder)
    sizes = read_sizes(os.path.join(folder, SIZES)) if SIZES in present else {}
    stats = {name: f"{name.rpartition('.tar')[0] or name}_stats.json" for name in names}
    for name in names:
        if name not in sizes and stats[name] in present:
            path = os.path.join(folder, stats[name])
            sizes[name] = _read(path, _successes, "does not tell the number of 'successes'", HOW)
    missing = [name for name in names if name not in sizes]
    if not missing:
        return sum(sizes[name] for name in names)
    lack = f"{len(missing)} shards lack one"
    if SIZES in present:
        raise UserError(f"{os.path.join(folder, SIZES)} has no entry for {missing[0]} ({lack}): {HOW}.")
    if len(missing) < len(names):
        return f"{os.path.join(folder, missing[0])} (no {stats[missing[0]]}; {lack})"
    if "__len__" not in present:
        return f"{folder} (no sizes.json or __len__, and no {stats[names[0]]} for {names[0]})"
    unused = {name for name in present if name.endswith(".tar")} - set(names)
    if unused:
        return f"{folder} (its __len__ counts {len(unused)} more shards than are used)"
    return _read(os.path.join(folder, "__len__"), int, "does not hold a number of samples", "write it anew")


def _count_remote(urls: list[str], pattern: str) -> int | str:
    """By the `sizes.json` beside them."""
    tables: dict[str, dict[str, int]] = {}
    total = 0
    try:
        for folder, _, name in (url.rpartition("/") for url in urls):
            if folder.startswith("pipe:"):
                raise ValueError
            if folder not in tables:
                with open_stream(f"{folder}/{SIZES}") as stream:
                    tables[folder] = _table(stream.read())
            total += tables[folder][name]
    except Exception:  # anything, depending on who opens it; it is for the person to say, then
        return f"{pattern} (not on this machine)"
    return total


def read_sizes(path: str) -> dict[str, int]:
    """Shard -> samples. Raises: UserError if it is not such a table."""
    return _read(path, _table, "is not a table of shard names and sample counts", "correct or delete it")


def _successes(text: str) -> int:
    return int(json.loads(text)["successes"])


def _table(text: str | bytes) -> dict[str, int]:
    return {name: int(size) for name, size in json.loads(text).items()}


def _read(path: str, parse: Callable[[str], Any], problem: str, remedy: str) -> Any:
    try:
        return parse(Path(path).read_text())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} {problem} ({error}): {remedy}.") from None


@dataclass
class ShardCount:
    """What is in a shard.

    samples: the usable ones, up to where it breaks off
    skipped: reason -> how many are not usable
    broken: how it breaks off; None if it does not
    """

    samples: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    broken: str | None = None


def count_shard(path: str, decode: bool = False) -> ShardCount:
    """Count the samples that training finds in a shard, by the headers of the tar alone unless it is compressed.

    decode: read it all, and count only samples whose picture can be decoded and whose caption is not blank

    Raises: OSError if it cannot be opened.
    """
    open(path, "rb").close()
    report, failures, count = DataReport(), [], 0
    for sample in read_shard(path, report, failures=failures, headers_only=not decode):
        try:
            if decode:
                load_rgb(sample.images[0])
            count += 1
        except Exception:  # PIL raises nearly anything on damaged files
            report.add("unreadable image", "")
    return ShardCount(count, report.skipped, reason(failures[0]) if failures else None)


def write_sizes(folder: str, counts: dict[str, int], since: float) -> None:
    """Put counts of shards into the `sizes.json` of their folder, in one stroke.

    Other entries stay, unless their shard has changed after they were written.
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
    sizes, written = read_sizes(path), os.stat(path).st_mtime
    return {name for name in names if name not in sizes or os.stat(os.path.join(folder, name)).st_mtime >= written}
