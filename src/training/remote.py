"""The copy of a run's folder in another place: any that fsspec knows, or a mounted folder. Hidden files stay here."""
from __future__ import annotations

import fnmatch
import glob
import logging
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from . import checkpoint
from .errors import UserError, reason

_CHECKPOINT = re.compile(r"checkpoints/[^/]+\.pt")
_NUMBERED = re.compile(r"checkpoints/(epoch|step)_\d+\.pt")
_SMALL = re.compile(r"(checkpoints/)?[^/]+(?<!\.pt)")


class RemoteSync:
    """Copies new and changed files of a run's folder to `target` (a URL, or the path of a folder), in a thread.

    A checkpoint has its name there only once it is complete. One that the run has deleted since is deleted there too,
    as soon as all others have arrived; other files never are. UserError: the target cannot be used.
    """

    def __init__(self, local: Path, target: str, every_seconds: float):
        self.local, self.target, self.every_seconds = local, target, every_seconds
        self._fs, self._root = _filesystem(target)
        if "file" in self._fs.protocol and Path(self._root).resolve().is_relative_to(local.resolve()):
            raise UserError(f"--remote-sync would copy {local} into itself, to {target}; choose a place outside of it.")
        self._copied: dict[str, tuple[int, int]] = {}  # as `_files`, at the time of the copy
        self._failed: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="remote-sync", daemon=True)

    def start(self) -> None:
        """The first copy, which raises UserError if it fails; from then on one every `every_seconds`."""
        with _explained(f"The run's folder cannot be copied to {self.target}"):
            there, files = _sizes(self._fs, self._root), _files(self.local)
            # A checkpoint with a number never changes; of other files the size says too little.
            self._copied = {n: s for n, s in files.items() if _NUMBERED.fullmatch(n) and there.get(n) == s[0]}
            self.copy_changes()
        self._thread.start()

    def close(self) -> None:
        """Waits for the copy that is under way, if any, and makes the last one."""
        self._stop.set()
        self._thread.join()
        self._attempt(f"copy {self.local} by hand")

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
            for name in [name for name in self._copied if _CHECKPOINT.fullmatch(name) and name not in files]:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(f"{self._root}/{name}")
                del self._copied[name]
        return changed

    def _run(self) -> None:
        while not self._stop.wait(self.every_seconds):
            self._attempt(f"training goes on, and the copy is tried again in {self.every_seconds:g} seconds")

    def _attempt(self, otherwise: str) -> None:
        try:
            self.copy_changes()
        except Exception as error:  # each kind of target has exceptions of its own
            what = f"The run's folder could not be copied to {self.target} ({reason(error)})"
            logging.warning(f"{what}; {otherwise}.")

    def _put(self, name: str) -> None:
        local, remote = self.local / name, f"{self._root}/{name}"
        try:
            if type(self._fs).mv is fsspec.AbstractFileSystem.mv:  # an object store: shows only what is complete
                self._fs.put_file(str(local), remote)
            else:
                folder, _, last = remote.rpartition("/")
                self._fs.makedirs(folder, exist_ok=True)
                self._fs.put_file(str(local), f"{folder}/.{last}.tmp")
                self._fs.mv(f"{folder}/.{last}.tmp", remote)
        except FileNotFoundError:
            if local.exists():  # else deleted meanwhile
                raise


def check_unused(target: str) -> None:
    """Raises UserError if the target holds a run already, or cannot be read; for a run that starts anew."""
    with _explained(f"Whether there is a run at {target} cannot be found out"):
        names = _sizes(*_filesystem(target))
    if "config.yaml" in names or any(map(_CHECKPOINT.fullmatch, names)):
        otherwise = "choose another --name, or continue it with --resume latest"
        raise UserError(f"There is a run at {target} already; {otherwise}.")


def fetch_newest(target: str, folder: Path) -> bool:
    """Brings the run at `target` to a machine that has no readable checkpoint of it; for `--resume latest`.

    Fetches the readable checkpoint of the last epoch and of the last step, of which `checkpoint.newest` takes the
    newer, and the small files beside them. None in `folder` is replaced, except an unreadable checkpoint. Returns
    whether there was something to fetch.

    Raises:
        UserError: the target cannot be read, or none of its checkpoints: starting anew would overwrite them.
    """
    if checkpoint.newest(folder / "checkpoints") is not None:
        return False
    with _explained(f"The run at {target} cannot be fetched"):
        fs, root = _filesystem(target)
        names = [name for name in _sizes(fs, root) if "/." not in f"/{name}"]
        checkpoints = list(filter(_CHECKPOINT.fullmatch, names))
        for name in names if checkpoints else ():  # first, for once there is a checkpoint here nothing is fetched
            if _SMALL.fullmatch(name) and not (folder / name).exists():
                _fetch(fs, root, name, folder)
        fetched = []
        for kind in ("epoch_latest", "epoch_[0-9]*", "step_[0-9]*"):
            of_kind = fnmatch.filter(checkpoints, f"checkpoints/{kind}.pt")
            newest_first = sorted(of_kind, key=lambda name: (len(name), name), reverse=True)
            fetched += filter(None, [next((n for n in newest_first if _fetch(fs, root, n, folder)), None)])
    if checkpoints and not fetched:
        what = f"None of the {len(checkpoints)} checkpoint(s) at {target} can be continued from"
        raise UserError(f"{what}; delete them to start anew, or choose another --name.")
    if fetched:
        logging.info(f"Fetched {', '.join(fetched)} from {target}.")
    return bool(fetched)


def _fetch(fs: fsspec.AbstractFileSystem, root: str, name: str, folder: Path) -> bool:
    """Copies one file here, where it appears only when it is complete. False: it is an unreadable checkpoint."""
    temporary = (folder / name).with_name(f".{Path(name).name}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        fs.get_file(f"{root}/{name}", str(temporary))
        if name.endswith(".pt"):
            checkpoint.load(temporary)
        os.replace(temporary, folder / name)
    except UserError as error:
        logging.warning(f"{name} of the run's copy is passed over: {error}")
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _filesystem(target: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a target, and the path of the target in it."""
    with _explained(f"--remote-sync {target} cannot be used"):
        fs, root = fsspec.core.url_to_fs(os.path.expanduser(target))
        return fs, root.rstrip("/")


def _sizes(fs: fsspec.AbstractFileSystem, root: str) -> dict[str, int]:
    """Name below `root` -> size in bytes; empty if there is no `root`."""
    fs.invalidate_cache()
    with suppress(FileNotFoundError):
        return {path.removeprefix(f"{root}/"): info["size"] for path, info in fs.find(root, detail=True).items()}
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
