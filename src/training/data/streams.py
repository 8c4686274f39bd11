"""Shards wherever they are: files, commands, all that curl, gsutil or fsspec can reach; and one walk through them."""
from __future__ import annotations

import io
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import BinaryIO, NamedTuple

from webdataset.gopen import Pipe, gopen, gopen_schemes, rewrite_url

# What webdataset calls for a scheme. Where it is not installed, fsspec has its turn.
CLIENTS = {"gs": "gsutil", "ais": "ais"} | dict.fromkeys(("http", "https", "ftps", "sftp", "scp", "hf", "htgs"), "curl")

_SCHEME = re.compile("([a-zA-Z][a-zA-Z0-9+.-]+):")
_META = re.compile(r"__[^/]*__($|/)")  # webdataset leaves these out
_SECONDS_TO_END = 10
_running: set[subprocess.Popen] = set()
os.register_at_fork(after_in_child=_running.clear)  # they are the parent's


def local_path(url: str) -> str | None:
    """The path of a shard on this machine; None for other URLs and for `pipe:`."""
    path = re.sub(r"^file:(//)?", "", url)
    return path if path != url or not _SCHEME.match(url) else None


class Stream(AbstractContextManager):
    """The bytes of a shard, and what became of the command that makes them."""

    def __init__(self, file: BinaryIO, process: subprocess.Popen | None = None, owner: object = None):
        self.file, self.process, self.ended = file, process, False
        self.owner = owner  # would close the file when it is collected
        if process is not None:
            _running.add(process)

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.ended = self.ended or size < 0 or len(data) < size
        return data

    def failure(self) -> OSError | None:
        """How the command failed, if there is one and its output has come to an end."""
        if self.process is not None and self.ended:
            with suppress(subprocess.TimeoutExpired):
                if status := self.process.wait(_SECONDS_TO_END):
                    name = "its command" if isinstance(self.process.args, str) else self.process.args[0]
                    return OSError(f"{name} ended with status {status}")
        return None

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            _kill(self.process)
        with suppress(OSError):
            self.file.close()


def open_stream(url: str) -> Stream:
    """Open a path, `pipe:COMMAND`, or any other URL: as webdataset does if it can, otherwise through fsspec.

    Raises: anything, depending on who opens it; mostly OSError, ImportError or ValueError
    """
    url = rewrite_url(url)
    path = local_path(url)
    if path is not None:
        return Stream(open(path, "rb"))
    scheme = _SCHEME.match(url)[1]
    if scheme == "pipe":
        # A session of its own: signals for this process must not tear the data off in the middle of a step.
        process = subprocess.Popen(url[5:], shell=True, stdout=subprocess.PIPE, start_new_session=True)
        return Stream(process.stdout, process)
    if scheme in gopen_schemes and (scheme not in CLIENTS or shutil.which(CLIENTS[scheme])):
        opened = gopen(url)
        return Stream(opened.stream, opened.proc, opened) if isinstance(opened, Pipe) else Stream(opened)
    import fsspec  # slow, and seldom needed

    return Stream(fsspec.open(url, "rb").open())


def kill_commands() -> None:
    """Kill the commands behind all open streams, for a process that ends without closing them."""
    for process in list(_running):
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    if process not in _running:
        return
    _running.discard(process)
    if process.poll() is None:
        with suppress(ProcessLookupError):
            own_group = os.getpgid(process.pid) == process.pid
            (os.killpg if own_group else os.kill)(process.pid, signal.SIGKILL)  # a shell with all that it has started
        process.wait()


class Member(NamedTuple):
    """A file in a tar. `extension` is in lower case, from the first dot on."""

    name: str
    extension: str
    offset: int  # where its content begins, in the tar as it is unpacked
    size: int
    content: bytes | None  # None unless it was asked for
    entry: int = -1  # where a plain tar that is a file can be entered, to read it; -1 in others


Run = tuple[int, int, int | None]  # samples in a row: number and `Member.entry` of the first, how many (None: all)
WHOLE = ((0, -1, None),)


def walk(
    url: str, failures: list[Exception], wanted: Collection[str] | None = None, compressed: bool = True,
    runs: Sequence[Run] = WHOLE,
) -> Iterator[tuple[str, dict[str, Member]]]:  # fmt: skip
    """The samples of a tar: pairs of a key and its members by extension, in the order of the file.

    A sample is neighbouring files whose names agree up to the first dot after the last slash; what has no such dot does
    not count. Keys may come again. What ends the tar early joins `failures`, before the last sample comes: of that,
    members may be missing, but none is cut off. Nothing is raised.

    wanted: extensions to read the contents of; None reads all
    compressed: whether the tar may be
    runs: the samples to give, in ascending order; where a run has an entry, what lies before it is not read
    """
    try:
        with open_stream(url) as stream:
            samples, at = _samples(stream, failures, wanted, compressed), 0
            for number, entry, count in runs:
                if entry > 0:
                    stream.file.seek(entry)
                    samples, at = _samples(stream, failures, wanted, False), number
                start, at = number - at, number + (count or 0)
                yield from itertools.islice(samples, start, None if count is None else start + count)
    except Exception as error:  # anything, depending on who opens it
        failures.append(error)


def _samples(
    stream: Stream, failures: list[Exception], wanted: Collection[str] | None, compressed: bool
) -> Iterator[tuple[str, dict[str, Member]]]:
    key, sample = None, {}
    try:
        for name, member in _read(stream, wanted, compressed):
            if name != key or member.extension in sample:
                if sample:
                    yield key, sample
                key, sample = name, {}
            sample[member.extension] = member
    except Exception as error:  # a tar is lost after its first error
        failures.append(error)
    if (failure := stream.failure()) is not None:
        failures.insert(0, failure)
    if sample:
        yield key, sample


def first_names(url: str, count: int) -> list[str]:
    """Of the files in a tar, whatever they are called, as far as it can be read."""
    with suppress(Exception), open_stream(url) as stream, _open(stream, True) as tar:
        return [info.name for info in itertools.islice(itertools.filterfalse(tarfile.TarInfo.isdir, tar), count)]
    return []


def _read(stream: Stream, wanted: Collection[str] | None, compressed: bool) -> Iterator[tuple[str, Member]]:
    with _open(stream, compressed) as tar:
        plain = tar.fileobj is stream.file
        end = os.fstat(stream.file.fileno()).st_size if plain else math.inf
        while (info := tar.next()) is not None:
            tar.members = []  # would grow
            folder, slash, name = info.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            if info.offset_data + info.size > end:
                raise tarfile.ReadError("unexpected end of data")
            if not (info.isreg() and stem and dot) or _META.match(info.name):
                continue
            extension, entry = extension.lower(), info.offset if plain else -1
            content = tar.extractfile(info).read() if wanted is None or extension in wanted else None
            yield folder + slash + stem, Member(info.name, extension, info.offset_data, info.size, content, entry)
        rest = tar.fileobj.read(1 << 16)  # of a command, its end as well
        if not isinstance(tar.ended_by, tarfile.EOFHeaderError) or rest.strip(b"\0"):
            raise tarfile.ReadError("it has no end mark, or more data behind it")


def _open(stream: Stream, compressed: bool) -> tarfile.TarFile:
    if isinstance(stream.file, io.BufferedReader) and stream.file.seekable():
        try:
            return tarfile.open(fileobj=stream.file, mode="r:", tarinfo=_Header)
        except tarfile.ReadError:
            if not compressed:
                raise
            stream.file.seek(0)
    return tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header)


class _Header(tarfile.TarInfo):
    """Tells its tar what has ended it: `tarfile` silently takes a cut or damaged header for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            tar.ended_by = error
            raise
