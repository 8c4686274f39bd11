"""Webdataset shards: which there are, whether they can be read, and what is in one."""
from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from braceexpand import UnbalancedBracesError, braceexpand

from ..errors import UserError
from .images import ImageLike
from .report import DataReport
from .samples import Sample
from .streams import local_path
from .tar import reason, walk

log = logging.getLogger(__name__)

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
CAPTION_KEY = "txt"

# From a sample's key and the contents of its files, by extension, to its images and fields; or why it cannot be used.
Read = Callable[[str, dict[str, bytes]], tuple[tuple[ImageLike, ...], dict[str, Any]] | str]


def image_and_caption(key: str, files: dict[str, bytes]) -> tuple[tuple[ImageLike, ...], dict[str, Any]] | str:
    image = next((files[name] for name in IMAGE_KEYS if name in files), None)
    if image is None:
        return "no image"
    if CAPTION_KEY not in files:
        return "no caption"
    caption = files[CAPTION_KEY].decode("utf-8", errors="replace")
    return ((image,), {"caption": caption}) if caption.strip() else "empty caption"


@dataclass(frozen=True)
class ShardSet:
    """One of the sources that `::` joins: its pattern as given, and the shards it stands for."""

    pattern: str
    urls: list[str]


def expand_shards(patterns: str, flag: str) -> list[ShardSet]:
    """Split at `::` and expand braces. Raises: UserError, naming `flag`."""
    sets = []
    parts = patterns.split("::")
    for number, pattern in enumerate(map(str.strip, parts), start=1):
        if not pattern:
            raise UserError(f"Source {number} of {len(parts)} in {flag} is empty: remove the extra '::' or fill it in.")
        try:
            sets.append(ShardSet(pattern, list(braceexpand(pattern))))
        except (UnbalancedBracesError, ValueError) as error:
            raise UserError(f"The braces of {pattern!r} in {flag} cannot be expanded ({error}).") from None
    return sets


def local_folders(urls: Iterable[str]) -> dict[str, list[str]]:
    """Folder -> names of its shards, local ones only. Folders are listed once: a stat for each shard is slow afar."""
    folders: dict[str, list[str]] = {}
    for path in filter(None, map(local_path, urls)):
        folder, name = os.path.split(path)
        folders.setdefault(folder or ".", []).append(name)
    return folders


def listing(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def check_present(shard_set: ShardSet, flag: str) -> None:
    missing = []
    for folder, names in local_folders(shard_set.urls).items():
        present = listing(folder)
        missing += [os.path.join(folder, name) for name in names if name not in present]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(shard_set.urls)} shards of {shard_set.pattern!r} in {flag} do not exist, "
            f"the first of them {missing[0]}: correct the pattern or fetch what is missing."
        )


def check_shards(sets: Iterable[ShardSet], flag: str, read: Read = image_and_caption) -> None:
    """Make sure that all local shards exist, and that the first shard of each source has a sample to give.

    Raises: UserError, naming `flag`.
    """
    for shard_set in sets:
        check_present(shard_set, flag)
        url, report, failures = shard_set.urls[0], DataReport(), []
        if local_path(url) is None:
            log.info("Opening %s of %s ...", url, flag)  # the one to blame if it takes long
        with closing(read_shard(url, report, read=read, failures=failures)) as samples:
            if next(samples, None) is not None:
                continue
        if failures and not report.skipped:
            raise UserError(
                f"The first shard {url} in {flag} cannot be read ({reason(failures[0])}): give webdataset shards, tar "
                "files of images and captions, that can be reached."
            )
        needs = f"each needs an image ({', '.join(IMAGE_KEYS)}) and a caption ({CAPTION_KEY}) of the same name"
        raise UserError(
            f"The first shard {url} in {flag} has not one usable sample ({report.summary() or 'it is empty'}): "
            f"{needs if read is image_and_caption else 'give shards with what this task needs'}."
        )


def read_shard(
    url: str,
    report: DataReport,
    part: tuple[int, int] = (0, 1),
    read: Read = image_and_caption,
    failures: list[Exception] | None = None,
    headers_only: bool = False,
) -> Iterator[Sample]:
    """The usable samples of a shard, in its order; `index` counts all its samples from 0, usable or not.

    What cannot be used goes into `report`. A shard that breaks off gives the whole samples before the break.

    part: (i, n) takes and reports only every n-th sample, beginning with the i-th
    failures: what makes the shard break off joins them, instead of the report
    headers_only: contents are not read; a byte stands for one that is not empty
    """
    found = [] if failures is None else failures
    for index, (key, members) in enumerate(walk(url, found, () if headers_only else None)):
        if index % part[1] != part[0]:
            continue
        files = {name: b"x"[: file.size] if headers_only else file.content for name, file in members.items()}
        usable = read(key, files)
        if not isinstance(usable, str):
            yield Sample(key, *usable, url, index)
        elif not found:  # what a break has cut in half is not one more thing to report
            report.add(usable, f"{url}: {key}: {usable}")
    if failures is None and found and part[0] == 0:
        report.add("broken shard", f"{url}: {reason(found[0])}")
