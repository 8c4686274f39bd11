"""The copy of a run's folder in another place: any that fsspec knows, or a mounted folder. Hidden files stay here."""
from __future__ import annotations

import fnmatch
import glob
import itertools
import logging
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
from fsspec.implementations.dirfs import DirFileSystem

from . import checkpoint
from .errors import UserError, reason
from .files import written_whole

_CHECKPOINT = re.compile(r"checkpoints/[^./][^/]*\.pt")
_NUMBERED = re.compile(r"checkpoints/(epoch|step)_\d+\.pt")
_SMALL = re.compile(r"(checkpoints/)?[^./][^/]*(?<!\.pt)")


class RemoteSync:
    """Copies new and changed files of a run's folder to `target` (a URL, or the path of a folder), in a thread.

    A checkpoint has its name there only once it is complete. One that the run has deleted since is deleted there too,
    as soon as all others have arrived; other files never are. UserError: the target cannot be used.
    """

    def __init__(self, local: Path, target: str, every_seconds: float):
        self.local, self.target, self.every_seconds = local, target, every_seconds
        self._fs = _folder(target)
        if "file" in self._fs.fs.protocol and Path(self._fs.path).resolve().is_relative_to(local.resolve()):
            raise UserError(f"--remote-sync would copy {local} into itself, to {target}; choose a place outside of it.")
        self._copied: dict[str, tuple[int, int]] = {}  # as `_files`, at the time of the copy
        self._failed: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="remote-sync", daemon=True)

    def start(self) -> None:
        """The first copy, which raises UserError if it fails; from then on one every `every_seconds`."""
        with _explained(f"The run's folder cannot be copied to {self.target}"):
            there, files = _sizes(self._fs), _files(self.local)
            # A checkpoint with a number never changes; of other files the size says too little.
            self._copied = {n: s for n, s in files.items() if _NUMBERED.fullmatch(n) and there.get(n) == s[0]}
            self.copy_changes()
        self._thread.start()

    def close(self) -> None:
        """Waits for the copy that is under way, if any, and for the last one."""
        self._stop.set()
        self._thread.join()

    def copy_changes(self) -> list[str]:
        """One copy of all that has changed since the one before; returns the names, and raises whatever fails."""
        files = _files(self.local)
        changed = [name for name in files if self._copied.get(name) != files[name]]
        # Small files first; one that fails is not to keep others from being copied.
        changed.sort(key=lambda name: (name in self._failed, files[name][0], name))
        for name in changed:
            self._failed.add(name)
            self._put(name)
            self._failed.remove(name)
            self._copied[name] = files[name]
        # A run deletes a checkpoint because it has a newer one; if there is none at all, that has another reason.
        if any(map(_CHECKPOINT.fullmatch, files)):
            for name in filter(_CHECKPOINT.fullmatch, self._copied.keys() - files.keys()):
                with suppress(FileNotFoundError):
                    self._fs.rm_file(name)
                del self._copied[name]
        return changed

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stop.wait(self.every_seconds)
            try:
                self.copy_changes()
            except Exception as error:  # each kind of target has exceptions of its own
                otherwise = f"training goes on, and the copy is tried again in {self.every_seconds:g} seconds"
                otherwise = f"copy {self.local} by hand" if last else otherwise
                what = f"The run's folder could not be copied to {self.target} ({reason(error)})"
                logging.warning(f"{what}; {otherwise}.")

    def _put(self, name: str) -> None:
        local, temporary = str(self.local / name), str(Path(name).with_name(f".{Path(name).name}.tmp"))
        try:
            if type(self._fs.fs).mv is fsspec.AbstractFileSystem.mv:  # an object store: shows only what is complete
                self._fs.put_file(local, name)
            else:
                self._fs.makedirs(str(Path(name).parent), exist_ok=True)
                self._fs.put_file(local, temporary)
                self._fs.mv(temporary, name)
        except FileNotFoundError:
            if os.path.exists(local):  # else deleted meanwhile
                raise


def check_unused(target: str) -> None:
    """Raises UserError if the target holds a run already, or cannot be read; for a run that starts anew."""
    with _explained(f"Whether there is a run at {target} cannot be found out"):
        names = _sizes(_folder(target))
    if "config.yaml" in names or any(map(_CHECKPOINT.fullmatch, names)):
        otherwise = "choose another --name, or continue it with --resume latest"
        raise UserError(f"There is a run at {target} already; {otherwise}.")


def fetch_newest(target: str, folder: Path) -> bool:
    """Brings the run at `target` to a machine that has no readable checkpoint of it; False: there is none there.

    These are the small files, and the newest readable checkpoint of each kind, of which `checkpoint.newest` takes one.
    Nothing in `folder` is replaced but an unreadable checkpoint. UserError: the target cannot be read, or none of its
    checkpoints: starting anew would overwrite them.
    """
    if checkpoint.newest(folder / "checkpoints") is not None:
        return False
    with _explained(f"The run at {target} cannot be fetched"):
        fs = _folder(target)
        names = _sizes(fs)
        checkpoints = list(filter(_CHECKPOINT.fullmatch, names))
        for name in names if checkpoints else ():  # first, for once there is a checkpoint here nothing is fetched
            if _SMALL.fullmatch(name) and not (folder / name).exists():
                _fetch(fs, name, folder)
        fetched = []
        for kind in ("epoch_latest", "epoch_[0-9]*", "step_[0-9]*"):
            of_kind = fnmatch.filter(checkpoints, f"checkpoints/{kind}.pt")
            newest_first = sorted(of_kind, key=lambda name: (len(name), name), reverse=True)
            fetched += itertools.islice((name for name in newest_first if _fetch(fs, name, folder)), 1)
    if checkpoints and not fetched:
        what = f"None of the {len(checkpoints)} checkpoint(s) at {target} can be continued from"
        raise UserError(f"{what}; delete them to start anew, or choose another --name.")
    if fetched:
        logging.info(f"Fetched {', '.join(fetched)} from {target}.")
    return bool(fetched)


def _fetch(fs: DirFileSystem, name: str, folder: Path) -> bool:
    """Copies one file here, whole or not at all. False: it is an unreadable checkpoint."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        with written_whole(folder / name) as file:
            fs.get_file(name, str(file.name))
            if name.endswith(".pt"):
                checkpoint.load(file.name)
    except UserError as error:
        logging.warning(f"{name} of the run's copy is passed over: {error}")
        return False
    return True


def _folder(target: str) -> DirFileSystem:
    with _explained(f"--remote-sync {target} cannot be used"):
        fs, root = fsspec.core.url_to_fs(os.path.expanduser(target))
        return DirFileSystem(root.rstrip("/"), fs)


def _sizes(fs: DirFileSystem) -> dict[str, int]:
    """Name -> size in bytes; empty if there is no such folder."""
    fs.fs.invalidate_cache()
    with suppress(FileNotFoundError):
        return {name: info["size"] for name, info in fs.find("", detail=True).items()}
    return {}


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """What is to be copied of a folder: name -> (size in bytes, time of the last change in ns)."""
    found = {}
    for name in glob.glob("**", root_dir=folder, recursive=True):
        with suppress(FileNotFoundError):  # deleted just now, or a link to nothing
            status = (folder / name).stat()
            if stat.S_ISREG(status.st_mode):
                found[name] = (status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        advice = "check its name, the package that belongs to it, its credentials and the free space"
        raise UserError(f"{problem} ({reason(error)}); {advice}.") from error
