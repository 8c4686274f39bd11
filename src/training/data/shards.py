"""Webdataset shards: which there are, whether they can be read, and what is in one."""

import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

from braceexpand import UnbalancedBracesError, braceexpand
from webdataset.tariterators import tar_file_expander

from training.data.report import DataReport
from training.data.samples import RawSample
from training.data.stalls import Status
from training.data.streams import local_path, open_stream
from training.errors import UserError

log = logging.getLogger(__name__)

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
CAPTION_KEY = "txt"
BROKEN_SHARD = "broken shard"


@dataclass(frozen=True)
class ShardSet:
    """One of the sources that `::` joins: its pattern as given, and the shards it stands for."""

    pattern: str
    urls: list[str]


def expand_shards(patterns: str, flag: str) -> list[ShardSet]:
    """Split at `::` and expand braces.

    Raises: UserError, naming `flag`.
    """
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


def check_shards(sets: Iterable[ShardSet], flag: str) -> None:
    """Make sure that all local shards exist, and that the first shard of each source has a sample to give.

    Raises: UserError, naming `flag`.
    """
    for shard_set in sets:
        check_present(shard_set, flag)
        _check_first_is_tar(shard_set, flag)
        _check_first_has_a_sample(shard_set, flag)


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


def _check_first_is_tar(shard_set: ShardSet, flag: str) -> None:
    path = local_path(shard_set.urls[0])
    if path is None:
        return
    try:
        if os.path.isdir(path):
            problem = "is a folder"
        elif os.path.getsize(path) == 0:
            problem = "is empty"
        elif not tarfile.is_tarfile(path):
            problem = "is not a tar file"
        else:
            return
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise UserError(f"The shard {path} in {flag} {problem}: give webdataset shards, tar files of images and captions.")


def _check_first_has_a_sample(shard_set: ShardSet, flag: str) -> None:
    url = shard_set.urls[0]
    if local_path(url) is None:
        log.info("Opening %s of %s ...", url, flag)  # the one to blame if it takes long
    report, failures = DataReport(), []
    with closing(read_files(url, failures)) as files:
        if next(samples_of(files, failures, url, report), None) is not None:
            return
    if failures and not report.skipped:
        raise UserError(
            f"The first shard {url} in {flag} cannot be read ({reason(failures[0])}): correct it, or make it reachable."
        )
    raise UserError(
        f"The first shard {url} in {flag} has not one usable sample ({report.summary() or 'it is empty'}): "
        f"each needs an image ({', '.join(IMAGE_KEYS)}) and a caption ({CAPTION_KEY}) of the same name."
    )


def read_shard(
    url: str, report: DataReport, part: tuple[int, int] = (0, 1), status: Status | None = None
) -> Iterator[RawSample]:
    """The usable samples of a shard, in its order; `index` counts all its samples from 0, usable or not.

    What cannot be used goes into `report`. A shard that breaks off gives the whole samples before the break.
    part: (i, n) takes and reports only every n-th sample, beginning with the i-th.
    """
    failures: list[Exception] = []
    status = status or Status()
    status.starts(url)
    yield from samples_of(read_files(url, failures), failures, url, report, part, status)
    if failures and part[0] == 0:
        report.add(BROKEN_SHARD, f"{url}: {reason(failures[0])}")


def samples_of(
    files: Iterable[dict],
    failures: list[Exception],
    url: str,
    report: DataReport,
    part: tuple[int, int] = (0, 1),
    status: Status | None = None,
) -> Iterator[RawSample]:
    """The usable samples that the files of a shard make up, all before `failures` has got an entry."""
    first, step = part
    status = status or Status()
    for index, (key, group) in enumerate(_group_by_key(files)):
        status.has_read(index + 1)
        if index % step == first:
            # What a break has cut in half is not one more thing to report.
            sample = _usable(key, group, url, index, DataReport() if failures else report)
            if sample is not None:
                yield sample


def read_files(url: str, failures: list[Exception]) -> Iterator[dict]:
    """The files of a tar, {"fname": ..., "data": ...} as webdataset has them. What ends them early joins `failures`."""

    def note(error: Exception) -> bool:
        failures.append(error)
        return False  # a tar stream is lost after its first error

    try:
        stream = open_stream(url)
    except Exception as error:  # anything, depending on who opens it
        note(error)
        return
    with stream:
        yield from tar_file_expander([{"url": url, "stream": stream}], handler=note, eof_value=None)
        if not failures and stream.is_cut_off():
            note(tarfile.ReadError("it has no end mark, or more data behind it"))
        failure = stream.failure()
        if failure is not None:
            failures.insert(0, failure)


def _group_by_key(files: Iterable[dict]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Join neighbouring files whose names agree up to the first dot."""
    key, group = None, {}
    for file in files:
        folder, slash, name = file["fname"].rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem or not dot:
            continue
        extension = extension.lower()
        if folder + slash + stem != key or extension in group:  # keys may come again in a shard
            if group:
                yield key, group
            key, group = folder + slash + stem, {}
        group[extension] = file["data"]
    if group:
        yield key, group


def _usable(key: str, files: dict[str, bytes], url: str, index: int, report: DataReport) -> RawSample | None:
    image = next((files[name] for name in IMAGE_KEYS if name in files), None)
    if image is None:
        problem = "no image"
    elif CAPTION_KEY not in files:
        problem = "no caption"
    else:
        caption = files[CAPTION_KEY].decode("utf-8", errors="replace")
        if caption.strip():
            return RawSample(key, image, caption, url, index)
        problem = "empty caption"
    report.add(problem, f"{url}: {key}: {problem}")
    return None


def reason(error: Exception) -> str:
    """webdataset appends streams and URLs to the arguments; the first one says what happened."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error.args[0]).split(" @ ")[0] if error.args else type(error).__name__
