"""The samples of a whole tar file at once, and where its pictures are; nothing is decoded."""
from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ...errors import UserError
from ..tar import Member, reason, walk


def read_samples(path: Path, wanted: Collection[str]) -> tuple[dict[str, list[Member]], bool]:
    """The samples of an uncompressed tar file: key -> members, both in the file's order; and whether it is whole.

    Of a file that is cut off or damaged there is what is readable; of its last sample, members can be missing.

    wanted: extensions to read the contents of

    Raises:
        UserError: it cannot be read, or is no tar file.
    """
    samples: dict[str, list[Member]] = {}
    failures: list[Exception] = []
    for key, members in walk(str(path.absolute()), failures, wanted, compressed=False):
        samples.setdefault(key, []).extend(members.values())
    if failures and isinstance(failures[0], OSError):
        raise UserError(f"{path} cannot be read ({reason(failures[0])}); correct the path.")
    if failures and not samples:
        raise UserError(f"{path} is not a readable tar file ({reason(failures[0])}); mend or remove it.")
    return samples, not failures
