"""How many samples shards hold: what is noted beside them, and counting them."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from .images import load_rgb
from .report import DataReport
from .shards import ShardSet, listing, local_folders, usable_samples
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
    total, unknown = 0, []
    for folder, names in local_folders(shard_set.urls).items():
        count, problem = _count_folder(folder, names)
        total += count
        unknown += problem
    remote = [url for url in shard_set.urls if local_path(url) is None]
    if remote:
        count = _count_remote(remote)
        total += count or 0
        unknown += [] if count is not None else [f"{shard_set.pattern} (not on this machine)"]
    return (None if unknown else total), unknown


def _count_folder(folder: str, names: list[str]) -> tuple[int, list[str]]:
    present = listing(folder)
    sizes = read_sizes(os.path.join(folder, SIZES)) if SIZES in present else {}
    total, missing, stats_read = 0, [], 0
    for name in names:
        stats = _stats_name(name)
        if name in sizes:
            total += sizes[name]
        elif stats in present:
            total += _read_stats(os.path.join(folder, stats))
            stats_read += 1
        else:
            missing.append(name)
    if not missing:
        return total, []
    if SIZES in present:
        raise UserError(
            f"{os.path.join(folder, SIZES)} has no entry for {missing[0]} ({len(missing)} of {len(names)} shards lack "
            f"one): {HOW}."
        )
    if stats_read:
        return 0, [f"{os.path.join(folder, missing[0])} (no {_stats_name(missing[0])}; {len(missing)} shards lack one)"]
    if "__len__" not in present:
        return 0, [f"{folder} (no sizes.json or __len__, and no {_stats_name(names[0])} for {names[0]})"]
    unused = {name for name in present if name.endswith(".tar")} - set(names)
    if unused:
        return 0, [f"{folder} (its __len__ counts {len(unused)} more shards than are used)"]
    return _read_len(os.path.join(folder, "__len__")), []


def _count_remote(urls: list[str]) -> int | None:
    """By the `sizes.json` beside them; None if there is none to be had, or it lacks one of them."""
    folders: dict[str, list[str]] = {}
    for url in urls:
        if url.startswith("pipe:"):
            return None
        folder, _, name = url.rpartition("/")
        folders.setdefault(folder, []).append(name)
    total = 0
    for folder, names in folders.items():
        try:
            with open_stream(f"{folder}/{SIZES}") as stream:
                sizes = _checked_sizes(json.loads(stream.read()))
            total += sum(sizes[name] for name in names)
        except Exception:  # anything, depending on who opens it; it is for the person to say, then
            return None
    return total


def _stats_name(shard: str) -> str:
    return f"{shard.rpartition('.tar')[0] or shard}_stats.json"


def read_sizes(path: str) -> dict[str, int]:
    """Shard -> samples.

    Raises: UserError if it is not such a table.
    """
    try:
        with open(path) as file:
            return _checked_sizes(json.load(file))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a table of shard names and sample counts ({error}): correct or delete it."
        ) from None


def _checked_sizes(table: Any) -> dict[str, int]:
    return {name: int(size) for name, size in table.items()}


def _read_stats(path: str) -> int:
    try:
        with open(path) as file:
            return int(json.load(file)["successes"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} does not tell the number of 'successes' ({error!r}): {HOW}.") from None


def _read_len(path: str) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not hold a number of samples ({error}): write it anew.") from None


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
    for sample in usable_samples(path, failures, report, headers_only=not decode):
        if decode:
            try:
                load_rgb(sample.images[0])
            except Exception:  # PIL raises nearly anything on damaged files
                report.add("unreadable image", "")
                continue
        count += 1
    return ShardCount(count, report.skipped, reason(failures[0]) if failures else None)


def write_sizes(folder: str, counts: dict[str, int], since: float) -> None:
    """Put counts of shards into the `sizes.json` of their folder, in one stroke.

    Other entries stay, unless their shard has changed after they were written.
    since: when the counting began, in seconds of the clock; dates the file, for `changed_shards`
    """
    path = os.path.join(folder, SIZES)
    sizes = read_sizes(path) if os.path.exists(path) else {}
    old = changed_shards(folder, sizes.keys() & listing(folder))
    sizes = {name: size for name, size in sizes.items() if name not in old} | counts
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "w") as file:
            json.dump(dict(sorted(sizes.items())), file, indent=1)
            file.write("\n")
        os.utime(partial, (since, since))
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def changed_shards(folder: str, names: Iterable[str]) -> set[str]:
    """Those that the folder's `sizes.json` has no entry for, or an older one than the shard itself."""
    path = os.path.join(folder, SIZES)
    if not os.path.exists(path):
        return set(names)
    sizes, written = read_sizes(path), os.stat(path).st_mtime
    return {name for name in names if name not in sizes or os.stat(os.path.join(folder, name)).st_mtime >= written}
