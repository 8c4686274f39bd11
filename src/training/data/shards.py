"""Webdataset shards: which there are, how many samples they hold, and what is in one."""

import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from braceexpand import UnbalancedBracesError, braceexpand
from webdataset.tariterators import tar_file_expander, url_opener

from training.data.report import DataReport
from training.data.samples import RawSample
from training.errors import UserError

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
CAPTION_KEY = "txt"


@dataclass(frozen=True)
class ShardSet:
    """One of the sources that `::` joins: its pattern as given, and the shards it stands for."""

    pattern: str
    urls: list[str]


def expand_shards(patterns: str, flag: str) -> list[ShardSet]:
    """Split at `::`, expand braces, and make sure that local shards exist and begin as a tar file does.

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
    for shard_set in sets:
        _check_present(shard_set, flag)
        _check_first_is_tar(shard_set, flag)
    return sets


def local_path(url: str) -> str | None:
    """The path of a shard on this machine; None for other URLs and for `pipe:`."""
    if url.startswith("file:"):
        return re.sub(r"^file:(//)?", "", url)
    return None if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", url) else url


def _local_folders(urls: Iterable[str]) -> dict[str, list[str]]:
    """Folder -> names of its shards, local ones only. Folders are listed once: a stat for each shard is slow afar."""
    folders: dict[str, list[str]] = {}
    for path in filter(None, map(local_path, urls)):
        folder, name = os.path.split(path)
        folders.setdefault(folder or ".", []).append(name)
    return folders


def _listing(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _check_present(shard_set: ShardSet, flag: str) -> None:
    missing = []
    for folder, names in _local_folders(shard_set.urls).items():
        present = _listing(folder)
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


def count_samples(shard_set: ShardSet) -> tuple[int | None, list[str]]:
    """The number of samples from `sizes.json`, or else `__len__`, in the folders of the shards.

    Returns: the number, or None and the folders that do not tell it, each with the reason.
    Raises: UserError if a `sizes.json` lacks a shard or one of these files is damaged.
    """
    folders = _local_folders(shard_set.urls)
    if sum(map(len, folders.values())) < len(shard_set.urls):
        return None, [f"{shard_set.pattern} (not on this machine)"]
    total, unknown = 0, []
    for folder, names in folders.items():
        present = _listing(folder)
        unused = {name for name in present if name.endswith(".tar")} - set(names)
        if "sizes.json" in present:
            total += _sum_sizes(os.path.join(folder, "sizes.json"), names)
        elif "__len__" not in present:
            unknown.append(f"{folder} (no sizes.json or __len__)")
        elif unused:
            unknown.append(f"{folder} (its __len__ counts {len(unused)} more shards than are used)")
        else:
            total += _read_len(os.path.join(folder, "__len__"))
    return (None if unknown else total), unknown


def _sum_sizes(path: str, names: list[str]) -> int:
    try:
        with open(path) as file:
            sizes = json.load(file)
        missing = [name for name in names if name not in sizes]
        if not missing:
            return sum(int(sizes[name]) for name in names)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a table of shard names and sample counts ({error}): write it anew.") from None
    raise UserError(
        f"{path} has no entry for {missing[0]} ({len(missing)} of {len(names)} shards lack one): "
        "add it, or give --train-num-samples."
    )


def _read_len(path: str) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not hold a number of samples ({error}): write it anew.") from None


def read_shard(url: str, report: DataReport, part: tuple[int, int] = (0, 1)) -> Iterator[RawSample]:
    """The usable samples of a shard, in its order; `index` counts all its samples from 0, usable or not.

    What cannot be used goes into `report`. A shard that breaks off gives the whole samples before the break.
    part: (i, n) takes and reports only every n-th sample, beginning with the i-th.
    """
    failures: list[Exception] = []
    first, step = part
    for index, (key, files) in enumerate(_group_by_key(_read_files(url, failures))):
        if index % step == first:
            # What a break has cut in half is not one more thing to report.
            sample = _usable(key, files, url, index, DataReport() if failures else report)
            if sample is not None:
                yield sample
    if failures and first == 0:
        report.add("broken shard", f"{url}: {_reason(failures[0])}")


def _read_files(url: str, failures: list[Exception]) -> Iterator[dict]:
    """The files of a tar, {"fname": ..., "data": ...} as webdataset has them. What ends them early joins `failures`."""

    def note(error: Exception) -> bool:
        failures.append(error)
        return False  # a tar stream is lost after its first error

    for opened in url_opener([{"url": url}], handler=note):
        stream = opened["stream"] = _Watched(opened["stream"])
        try:
            yield from tar_file_expander([opened], handler=note, eof_value=None)
            if not failures and stream.is_cut_off():
                failures.append(tarfile.ReadError("it has no end mark, or more data behind it"))
        finally:
            stream.close()


class _Watched:
    """Passes a stream on and remembers its first and last bytes."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.head = self.tail = b""

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.head = self.head or data[: tarfile.BLOCKSIZE]
        self.tail = (self.tail + data if len(data) < tarfile.BLOCKSIZE else data)[-tarfile.BLOCKSIZE :]
        return data

    def is_cut_off(self) -> bool:
        """Whether a plain tar, read to its end, does not close with zeros.

        `tarfile` silently takes a cut or damaged header for the end.
        """
        if self.head[257:262] != b"ustar":  # compressed
            return False
        rest = b""
        with suppress(OSError):  # the exit status of a pipe
            rest = self.read(1 << 16)
        return bool(rest.strip(b"\0") or self.tail.strip(b"\0"))

    def close(self) -> None:
        with suppress(OSError):  # a pipe complains when it is closed early
            self.stream.close()


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


def _reason(error: Exception) -> str:
    """webdataset appends streams and URLs to the arguments; the first one says what happened."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error.args[0]).split(" @ ")[0] if error.args else type(error).__name__
