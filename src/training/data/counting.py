"""Counting the samples in shards, and what is told of it."""
from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from ..errors import UserError
from .shards import ShardSet, check_present, expand_shards, listing, local_folders
from .sizes import SIZES, ShardCount, changed_shards, count_shard, read_sizes, write_sizes
from .streams import local_path

EXIT_INTERRUPTED = 130
EXAMPLES = 3  # of what is wrong in samples

Sources = dict[str, list[str]]  # as they were named -> absolute paths of their shards
Counts = dict[str, ShardCount | str]  # path -> what is in the shard, or why it cannot be opened


def find_sources(names: Iterable[str]) -> Sources:
    """Folders and brace patterns, maybe joined by `::`. Files that are named one by one count as of their folder."""
    sources: Sources = {}
    for shard_set in itertools.chain.from_iterable(expand_shards(name, "the arguments") for name in names):
        paths = [local_path(url) for url in shard_set.urls]
        if None in paths:
            raise UserError(
                f"{shard_set.pattern} is not on this machine: count its shards where they are, or give "
                "--train-num-samples in training."
            )
        if len(paths) == 1 and os.path.isdir(paths[0]):
            label = os.path.normpath(paths[0])
            paths = sorted(os.path.join(label, name) for name in listing(label) if name.endswith(".tar"))
            if not paths:
                raise UserError(f"There are no .tar files in the folder {label}: name the one that holds the shards.")
        else:
            check_present(ShardSet(shard_set.pattern, paths), "the arguments")
            folder = next(filter(os.path.isdir, paths), None)
            if folder is not None:
                raise UserError(f"{folder} is a folder: name it by itself, or name the shards in it.")
            label = shard_set.pattern if len(paths) > 1 else os.path.dirname(paths[0]) or "."
        sources.setdefault(label, []).extend(paths)
    return {label: list(dict.fromkeys(map(os.path.abspath, paths))) for label, paths in sources.items()}


def outdated(paths: Iterable[str]) -> list[str]:
    """Those that are not in the sizes.json of their folder, or have changed since."""
    folders = local_folders(paths).items()
    return [os.path.join(folder, name) for folder, names in folders for name in sorted(changed_shards(folder, names))]


def count(paths: Sequence[str], workers: int, verify: bool) -> Counts:
    """Count in parallel. After Ctrl-C: what is known until then."""
    counts: Counts = {}
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        tasks = {pool.submit(count_shard, path, verify): path for path in paths}
        for task in tqdm(as_completed(tasks), total=len(tasks), unit="shard", disable=None):
            try:
                counts[tasks[task]] = task.result()
            except OSError as error:
                counts[tasks[task]] = error.strerror or str(error)
    except BrokenProcessPool:
        print("A counting process was killed: try again with fewer --workers.", file=sys.stderr)
    except KeyboardInterrupt:
        pass
    finally:
        pool.shutdown(cancel_futures=True)
    return counts


def write(counts: Counts, since: float) -> None:
    folders: dict[str, dict[str, int]] = {}
    for path, found in counts.items():
        if isinstance(found, ShardCount):
            folders.setdefault(os.path.dirname(path), {})[os.path.basename(path)] = found.samples
    for folder, sizes in folders.items():
        try:
            write_sizes(folder, sizes, since)
        except OSError as error:
            raise UserError(f"{SIZES} cannot be written in {folder} ({error.strerror}).") from None


def noted(paths: Iterable[str]) -> dict[str, int]:
    """Path -> samples, by the sizes.json files."""
    sizes = {}
    for folder, names in local_folders(paths).items():
        table = read_sizes(os.path.join(folder, SIZES)) if SIZES in listing(folder) else {}
        sizes |= {os.path.join(folder, name): table[name] for name in names if name in table}
    return sizes


def report(sources: Sources, counts: Counts, sizes: dict[str, int]) -> str:
    """A line for each source, one for all of them, and one for each shard that is not as it should be."""

    def row(label: str, paths: list[str]) -> list[str]:
        found = [counts[path] for path in paths if path in counts]
        read = [entry for entry in found if isinstance(entry, ShardCount)]
        whole = sum(entry.broken is None for entry in read)
        skipped = sum((Counter(entry.skipped) for entry in read), Counter())
        reasons = ", ".join(f"{number:,} x {reason}" for reason, number in sorted(skipped.items()))
        numbers = (len(paths), len(read), sum(sizes.get(path, 0) for path in paths), len(found) - whole)
        return [label, *(f"{number:,}" for number in numbers), reasons or "0"]

    rows = [["source", "shards", "read now", "samples", "broken shards", "what is wrong in samples"]]
    rows += [row(label, paths) for label, paths in sources.items()]
    if len(sources) > 1:
        rows.append(row("together", distinct(sources)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    examples = itertools.chain.from_iterable(e.examples for e in counts.values() if isinstance(e, ShardCount))
    lines += [f"for example {example}" for example in itertools.islice(examples, EXAMPLES)]
    for path, entry in sorted(counts.items()):
        if not isinstance(entry, ShardCount):
            lines.append(f"{path} cannot be opened and is not noted: {entry}")
        elif entry.broken is not None:
            lines.append(f"{path} breaks off after {entry.samples:,} samples: {entry.broken}")
    return "\n".join(lines)


def distinct(sources: Sources) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(sources.values())))


def run(names: Sequence[str], workers: int, force: bool, verify: bool) -> int:
    if workers < 1:
        raise UserError(f"--workers is {workers}, but it must be at least 1.")
    sources = find_sources(names)
    paths = distinct(sources)
    for folder in local_folders(paths):
        if not os.access(folder, os.W_OK):
            raise UserError(f"{SIZES} cannot be written in {folder} (no permission): count as someone who may.")
    since = time.time()
    due = paths if force or verify else outdated(paths)
    counts = count(due, workers, verify)
    write(counts, since)
    print(report(sources, counts, noted(paths)))
    if len(counts) < len(due):
        print(f"Interrupted: {len(due) - len(counts):,} shards are still to be counted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
