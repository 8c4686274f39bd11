"""Walking through a tar file of samples; nothing is decoded."""
from __future__ import annotations

import tarfile
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError


class Member(NamedTuple):
    """A file in a tar file. `content`: None unless its extension was asked for."""

    name: str
    extension: str  # in lower case, from the first dot on
    offset: int
    size: int
    content: bytes | None


def read_samples(path: Path, wanted: Collection[str]) -> tuple[dict[str, list[Member]], bool]:
    """The samples of an uncompressed tar file: key -> members, both in the file's order; and whether it is whole.

    A sample's members have the name up to the first dot after the last slash, the key, in common; files without a dot
    do not count. Of a file that is cut off or damaged there is what is readable; of its last sample, members can be
    missing or go on behind the end.

    Args:
        wanted: extensions to read the contents of.

    Raises:
        UserError: it cannot be read, or is no tar file.
    """
    samples: dict[str, list[Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, slash, name = info.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not (info.isfile() and stem and dot):
                    continue
                extension = extension.lower()
                members = samples.setdefault(folder + slash + stem, [])
                content = tar.extractfile(info).read() if extension in wanted else None
                members.append(Member(info.name, extension, info.offset_data, info.size, content))
            # tarfile takes most kinds of damage for the end.
            tar.fileobj.seek(tar.offset)
            return samples, tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct the path.") from None
    except tarfile.ReadError as error:
        if not samples:
            raise UserError(f"{path} is not a readable tar file ({error}); mend or remove it.") from None
        return samples, False
