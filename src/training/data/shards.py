"""Webdataset shards: which there are, whether they can be read, and what is in one."""
from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple

from braceexpand import UnbalancedBracesError, braceexpand

from ..errors import UserError, reason
from .images import ImageLike, Unreadable, decoding, load_rgb
from .samples import DataReport, Sample
from .streams import WHOLE, Run, first_names, local_path, walk

log = logging.getLogger(__name__)

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
CAPTION_KEY = "txt"
BRACES = "{00000..00099}.tar"  # an example
TRIED = 20  # samples, before it is said that not one picture can be decoded

# From a sample's key and the contents of its files, by extension, to its images and fields; or why it cannot be used.
Read = Callable[[str, dict[str, bytes]], tuple[tuple[ImageLike, ...], dict[str, Any]] | str]


class Pairs(NamedTuple):
    """Reads an image and a caption, by extensions: everything after the first dot of a name, in lower case."""

    image_keys: tuple[str, ...] = IMAGE_KEYS
    caption_key: str = CAPTION_KEY

    def __call__(self, key: str, files: dict[str, bytes]) -> tuple[tuple[ImageLike, ...], dict[str, Any]] | str:
        image = next((files[name] for name in self.image_keys if name in files), None)
        if image is None:
            return "no image"
        if self.caption_key not in files:
            return "no caption"
        caption = files[self.caption_key].decode("utf-8-sig", errors="replace")
        return ((image,), {"caption": caption}) if caption.strip() else "empty caption"


PAIRS = Pairs()


class ShardSet(NamedTuple):
    """One of the sources that `::` joins: its pattern as given, and the shards it stands for."""

    pattern: str
    urls: list[str]
    factor: float = 1.0  # how likely a shard is drawn, compared with those of others


def expand_shards(patterns: str, flag: str) -> list[ShardSet]:
    """Split at `::` and expand braces. Raises: UserError, naming `flag`."""
    sets = []
    for pattern in map(str.strip, patterns.split("::")):
        if not pattern:
            raise UserError(f"A source in {flag} {patterns!r} is empty: remove the extra '::' or fill it in.")
        try:
            sets.append(ShardSet(pattern, list(braceexpand(pattern))))
        except (UnbalancedBracesError, ValueError) as error:
            raise UserError(f"The braces of {pattern!r} in {flag} cannot be expanded ({error}).") from None
    return sets


def by_folder(paths: Iterable[str]) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        folders.setdefault(folder or ".", []).append(name)
    return folders


def local_folders(urls: Iterable[str]) -> dict[str, list[str]]:
    """Folder -> names of its shards, those on this machine."""
    return by_folder(filter(None, map(local_path, urls)))


def listing(folder: str) -> set[str]:
    """What is in it; asked once, for a stat of each shard is slow afar."""
    with suppress(OSError):
        return set(os.listdir(folder))
    return set()


def check_present(shard_set: ShardSet, flag: str) -> None:
    missing, path = [], local_path(shard_set.pattern) or ""
    if os.path.isdir(path):
        like = os.path.join(path, BRACES)
        raise UserError(f"{path} in {flag} is a folder: name the shards in it with braces, such as {like}.")
    for folder, names in local_folders(shard_set.urls).items():
        present = listing(folder)
        missing += [os.path.join(folder, name) for name in names if name not in present]
    if missing:
        remedy = "correct the pattern or fetch what is missing"
        if any(character in path for character in "*?[~"):
            remedy = f"wildcards and ~ are not expanded; name the shards with braces, such as /data/shards/{BRACES}"
        raise UserError(
            f"{len(missing)} of the {len(shard_set.urls)} shards of {shard_set.pattern!r} in {flag} do not exist, "
            f"the first of them {missing[0]}: {remedy}."
        )


def one_decodes(samples: Iterable[Sample], report: DataReport) -> bool:
    """Whether the pictures of one of the first samples can be decoded; what is wrong with others joins `report`."""
    for sample in itertools.islice(samples, TRIED):
        try:
            with decoding():
                for image in sample.images:
                    load_rgb(image)
            return True
        except Unreadable as error:
            report.add("unreadable image", f"{sample.origin}: {sample.key}: {error}")
    return False


def check_shards(sets: Iterable[ShardSet], flag: str, read: Read) -> None:
    """All local shards must exist, and the first of each source have a sample. Raises: UserError, naming `flag`."""
    for shard_set in sets:
        check_present(shard_set, flag)
        url, report, failures = shard_set.urls[0], DataReport(), []
        if local_path(url) is None:
            log.info("Opening %s of %s ...", url, flag)  # the one to blame if it takes long
        with closing(read_shard(url, report, read=read, failures=failures)) as samples:
            if one_decodes(samples, report):
                continue
        if failures and not report.skipped:
            why = reason(failures[0])
            raise UserError(f"The first shard {url} in {flag} cannot be read ({why}): give webdataset shards.")
        samples, names = list(walk(url, [], ())), first_names(url, 4)
        found = f"{report.summary() or 'no names that make samples'}; its files are {', '.join(names)}, ..."
        found = found if names else "it is empty"
        needs = "give shards with what this task needs"
        if isinstance(read, Pairs):
            needs = f"each needs an image ({', '.join(read.image_keys)}) and a caption ({read.caption_key}) of the same"
            needs += " name up to its first dot; for other endings give --shard-img-key and --shard-caption-key"
        if len(samples) > len(dict(samples)):
            needs += "; the files of one sample must be next to each other in the tar, so sort it by name"
        raise UserError(f"The first shard {url} in {flag} has not one usable sample ({found}): {needs}.")


def read_shard(
    url: str,
    report: DataReport,
    part: tuple[int, int] = (0, 1),
    read: Read = PAIRS,
    failures: list[Exception] | None = None,
    headers_only: bool = False,
    runs: Sequence[Run] = WHOLE,
) -> Generator[Sample, None, tuple[int, int] | None]:
    """The usable samples of a shard, in its order; `index` counts all its samples from 0, usable or not.

    What cannot be used goes into `report`. A shard that breaks off gives the whole samples before the break.
    part: (i, n) takes and reports only every n-th sample, beginning with the i-th
    failures: what makes the shard break off joins them, instead of the report
    headers_only: of all but captions; a byte stands for a content that is not empty
    runs: those that are read, instead of all
    Returns: how many samples are usable, and how many there are; None unless all of the shard was read
    """
    found = [] if failures is None else failures
    wanted = (getattr(read, "caption_key", CAPTION_KEY),) if headers_only else None
    numbers = itertools.chain.from_iterable(itertools.islice(itertools.count(run[0]), run[2]) for run in runs)
    samples, usable, total = zip(numbers, walk(url, found, wanted, runs=runs), strict=False), 0, 0
    for index, (key, members) in itertools.islice(samples, part[0], None, part[1]):
        files = {name: b"x"[: file.size] if file.content is None else file.content for name, file in members.items()}
        sample, total = read(key, files), index + 1
        if not isinstance(sample, str):
            for name in filter(lambda name: name.endswith(CAPTION_KEY), files):
                if (text := files[name].decode(errors="replace")).encode() != files[name]:
                    report.add("text that is not UTF-8", f"{url}: {key}.{name}: {text.strip()}")
            usable += 1
            yield Sample(key, *sample, url, index, next(iter(members.values())).entry)
        elif not found:  # what a break has cut in half is not one more thing to report
            report.add(sample, f"{url}: {key}: {sample}")
    if failures is None and found and part[0] == 0:
        report.add("broken shard", f"{url}: {reason(found[0])}")
    return None if found or part != (0, 1) else (usable, total)
