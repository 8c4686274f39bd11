"""One walk through tar files of samples, wherever they are: training, counting and evaluation read them here."""
from __future__ import annotations

import io
import math
import os
import re
import tarfile
from collections.abc import Collection, Iterator
from typing import NamedTuple

from .streams import Stream, open_stream

_META = re.compile(r"__[^/]*__($|/)")  # webdataset leaves these out


class Member(NamedTuple):
    """A file in a tar.

    extension: in lower case, from the first dot on
    offset: where its content begins, in the tar as it is unpacked
    content: None unless it was asked for
    """

    name: str
    extension: str
    offset: int
    size: int
    content: bytes | None


def walk(
    url: str, failures: list[Exception], wanted: Collection[str] | None = None, compressed: bool = True
) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples of a tar: pairs of a key and its members by extension, in the order of the file.

    A sample is neighbouring files whose names agree up to the first dot after the last slash; what has no such dot does
    not count. Keys may come again. What ends the tar early joins `failures`, before the last sample comes: of that,
    members may be missing, but none is cut off. Nothing is raised.

    wanted: extensions to read the contents of; None reads all. The rest of a file on this machine is passed over.
    compressed: whether the tar may be
    """
    key, sample = None, {}
    for name, member in _members(url, failures, wanted, compressed):
        if name != key or member.extension in sample:
            if sample:
                yield key, sample
            key, sample = name, {}
        sample[member.extension] = member
    if sample:
        yield key, sample


def reason(error: Exception) -> str:
    """What happened, for people."""
    return getattr(error, "strerror", None) or str(error.args[0] if error.args else type(error).__name__)


def _members(
    url: str, failures: list[Exception], wanted: Collection[str] | None, compressed: bool
) -> Iterator[tuple[str, Member]]:
    try:
        with open_stream(url) as stream:
            try:
                yield from _read(stream, wanted, compressed)
            except Exception as error:  # a tar is lost after its first error
                failures.append(error)
            if (failure := stream.failure()) is not None:
                failures.insert(0, failure)
    except Exception as error:  # anything, depending on who opens it
        failures.append(error)


def _read(stream: Stream, wanted: Collection[str] | None, compressed: bool) -> Iterator[tuple[str, Member]]:
    """Pairs of the key and the member."""
    with _open(stream, compressed) as tar:
        end = os.fstat(stream.file.fileno()).st_size if tar.fileobj is stream.file else math.inf
        while (info := tar.next()) is not None:
            tar.members = []  # would grow
            folder, slash, name = info.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            if info.offset_data + info.size > end:
                raise tarfile.ReadError("unexpected end of data")
            if not (info.isreg() and stem and dot) or _META.match(info.name):
                continue
            extension = extension.lower()
            content = tar.extractfile(info).read() if wanted is None or extension in wanted else None
            yield folder + slash + stem, Member(info.name, extension, info.offset_data, info.size, content)
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
