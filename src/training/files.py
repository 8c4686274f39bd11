"""Files that are there whole or not at all, and files that a run can do without."""
from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from .errors import UserError, reason

_failing: set[Path] = set()


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which becomes `path` at the end of the block, and is gone if that raises.

    At every moment, also if the machine dies, `path` is either absent, the old file or the new file, complete.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def expendable(path: Path) -> Iterator[None]:
    """For a block that updates `path`, which a run can do without: an OSError is told once, until it succeeds again."""
    try:
        yield
    except OSError as error:
        if path not in _failing:
            logging.error(f"{path} could not be updated ({reason(error)}); the run goes on without.")
        _failing.add(path)
    else:
        _failing.discard(path)


def append(path: Path, text: str) -> bool:
    """Adds whole lines to an expendable file; a line that was cut there is ended first. False: they were not added."""
    with expendable(path), path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
    return path not in _failing


def check_folder(folder: Path, flag: str) -> None:
    """Raises UserError if nothing can be written to a folder, which need not exist yet."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"{flag} {folder}: {place} is a file; name a folder.")
    try:
        TemporaryDirectory(prefix=".", dir=place).cleanup()
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written to ({reason(error)}); name another folder.") from None
