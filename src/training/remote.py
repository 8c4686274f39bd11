"""The copy of a run's folder in another place: any that fsspec knows, or a mounted folder.

`RemoteSync` keeps the copy up to date while the run goes on; `fetch_newest` brings a run to a machine that has nothing
of it. Temporary files (`.name`, `name.tmp`) are never copied.
"""
from __future__ import annotations

import json
import logging
import os
import re
import socket
import stat
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from . import checkpoint
from .errors import UserError
from .files import written_whole

_CHECKPOINT = re.compile(r"checkpoints/[^/]+\.pt")
_NUMBERED = re.compile(r"(.*?)(\d+)\.pt")
# What has been copied where, so that a restarted run does not copy it again. Lies in the run's folder.
_STATE = ".remote_sync.json"

_Stamp = tuple[int, int]  # size in bytes, time of the last change in ns: a file is copied again when either differs


class RemoteSync:
    """Copies new and changed files of a folder to `target`, in a thread.

    A checkpoint appears there under its name only once it is complete: object stores work like this anyway; elsewhere
    it is uploaded under a temporary name and renamed. A checkpoint that the run has deleted is deleted there too, as
    soon as all others have arrived; other files never are.

    Args:
        local: the run's folder.
        target: a URL (s3://bucket/run, gs://..., file://..., ...), or the path of a folder.
        every_seconds: time between two copies.

    Raises:
        UserError: the target is of a kind that is not known or not installed, or lies in the run's folder.
    """

    def __init__(self, local: Path, target: str, every_seconds: float):
        self.local, self.target, self.every_seconds = Path(local), target, every_seconds
        self._fs, self._root = _filesystem(target)
        if isinstance(self._fs, LocalFileSystem) and Path(self._root).resolve().is_relative_to(self.local.resolve()):
            raise UserError(f"--remote-sync would copy {local} into itself, to {target}; choose a place outside of it.")
        # Object stores cannot rename, so they keep fsspec's `mv`, which copies.
        self._renames = type(self._fs).mv is not fsspec.AbstractFileSystem.mv
        self._copied: dict[str, _Stamp] = {}
        self._checkpoints: set[str] = set()  # in the run's folder at the last copy
        self._failed: set[str] = set()
        self._failing = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """The first copy. Call it before `start`.

        Raises:
            UserError: the target cannot be written.
        """
        try:
            there = _sizes(self._fs, self._root)
            before = _read_state(self.local, self.target)
            self._copied = {name: stamp for name, stamp in before.items() if there.get(name) == stamp[0]}
            self.copy_changes()
        except Exception as error:  # each kind of target has exceptions of its own
            raise UserError(
                f"The run's folder cannot be copied to {self.target} ({_reason(error)}); check --remote-sync and its "
                "credentials."
            ) from error

    def start(self) -> None:
        """From now on copies every `every_seconds`; a failure is logged, and tried again the next time."""
        self._thread = threading.Thread(target=self._run, name="remote-sync", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Waits for the copy that is under way, if any, and makes the last one. Logs what fails, never raises it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.copy_changes()
        except Exception as error:
            logging.error(
                f"The last copy of the run's folder to {self.target} failed ({_reason(error)}); copy {self.local} by "
                "hand."
            )

    def copy_changes(self) -> list[str]:
        """One copy of all that has changed since the one before; returns the names of the files copied.

        Raises:
            Exception: whatever the target raises. What has arrived until then is not copied again.
        """
        files = _files(self.local)
        changed = [name for name in files if self._copied.get(name) != files[name]]
        # Small files first; a file that cannot be read is not to keep others from being copied.
        changed.sort(key=lambda name: (name in self._failed, files[name][0], name))
        done = []
        try:
            for name in changed:
                if self._copy(name):
                    self._copied[name] = files[name]
                    done.append(name)
            self._delete_rotated(set(filter(_CHECKPOINT.fullmatch, files)))
        finally:
            if done:
                _write_state(self.local, self.target, self._copied)
        return done

    def _run(self) -> None:
        while not self._stop.wait(self.every_seconds):
            try:
                self.copy_changes()
            except Exception as error:
                if not self._failing:
                    logging.warning(
                        f"The run's folder could not be copied to {self.target} ({_reason(error)}); training goes on, "
                        f"and the copy is tried again every {self.every_seconds:g} seconds."
                    )
                self._failing = True
            else:
                if self._failing:
                    logging.info(f"The run's folder is copied to {self.target} again.")
                self._failing = False

    def _copy(self, name: str) -> bool:
        """False if the file has been deleted meanwhile."""
        local, remote = self.local / name, f"{self._root}/{name}"
        try:
            if self._renames:
                self._copy_and_rename(local, remote)
            else:
                self._fs.put_file(str(local), remote)
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not local.exists():
                return False
            self._failed.add(name)
            raise
        self._failed.discard(name)
        return True

    def _copy_and_rename(self, local: Path, remote: str) -> None:
        folder, _, name = remote.rpartition("/")
        temporary = f"{folder}/.{name}.tmp"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            self._fs.put_file(str(local), temporary)
            try:
                self._fs.mv(temporary, remote)
            except FileExistsError:  # Windows shares do not rename onto a file
                self._fs.rm_file(remote)
                self._fs.mv(temporary, remote)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(temporary)
            raise

    def _delete_rotated(self, present: set[str]) -> None:
        """Deletes checkpoints that were in the run's folder at the last copy and are no more.

        Only those: what an earlier machine has copied is not this run's to delete. And never all of them: a run deletes
        a checkpoint because it has a newer one; an empty folder has another reason.
        """
        if not present:
            return
        for name in sorted(self._checkpoints - present):
            with suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/{name}")
            self._copied.pop(name, None)
        self._checkpoints = present


def check_unused(target: str) -> None:
    """For a run that starts anew.

    Raises:
        UserError: the target holds a run already, whose files would be mixed with this one's; or cannot be read.
    """
    fs, root = _filesystem(target)
    try:
        names = _sizes(fs, root)
    except Exception as error:
        raise UserError(
            f"Whether there is a run at {target} cannot be found out ({_reason(error)}); check --remote-sync and its "
            "credentials."
        ) from error
    if "config.yaml" in names or any(map(_CHECKPOINT.fullmatch, names)):
        raise UserError(
            f"There is a run at {target} already; choose another --name, or continue it with --resume latest."
        )


def fetch_newest(target: str, folder: Path) -> bool:
    """Brings the run at `target` to a machine that has no readable checkpoint of it; for `--resume latest`.

    Fetches the newest readable checkpoint of each kind (epoch_12.pt, step_5000.pt, best.pt, ...), among which
    `checkpoint.newest` chooses, and the files beside them that a run continues (train.csv, out.log, ...). No file that
    is in `folder` is replaced, except an unreadable checkpoint. Several processes may do it at the same time.

    Returns:
        Whether a checkpoint was fetched; False if there is one in `folder`, or none at `target`.

    Raises:
        UserError: the target cannot be read, or none of its checkpoints: starting anew would overwrite them.
    """
    if checkpoint.newest(folder / "checkpoints") is not None:
        return False
    fs, root = _filesystem(target)
    try:
        names = [name for name in _sizes(fs, root) if not _is_temporary(name)]
        checkpoints = [name for name in names if _CHECKPOINT.fullmatch(name)]
        if not checkpoints:
            return False
        fetched = []
        # What is small comes first: once there is a checkpoint here, nothing is fetched any more.
        for name in names:
            beside = name.rpartition("/")[0] in ("", "checkpoints") and name not in checkpoints
            if beside and not (folder / name).exists():
                fetched.append(_fetch(fs, root, name, folder))
        newest = [_fetch_first_readable(fs, root, kind, folder) for kind in _newest_first(checkpoints)]
    except Exception as error:
        raise UserError(
            f"The run at {target} cannot be fetched ({_reason(error)}); check --remote-sync, its credentials and the "
            f"free space for {folder}."
        ) from error
    newest = [name for name in newest if name is not None]
    if checkpoint.newest(folder / "checkpoints") is None:
        raise UserError(
            f"None of the {len(checkpoints)} checkpoint(s) at {target} can be continued from; delete them to start "
            "anew, or choose another --name."
        )
    files = _files(folder)
    _write_state(folder, target, {name: files[name] for name in (*fetched, *newest) if name in files})
    logging.info(f"Fetched {', '.join(newest)} from {target}.")
    return True


def _fetch_first_readable(fs: fsspec.AbstractFileSystem, root: str, names: Iterable[str], folder: Path) -> str | None:
    for name in names:
        try:
            return _fetch(fs, root, name, folder, check=checkpoint.load)
        except UserError as error:
            logging.warning(f"{name} of the run's copy is passed over: {error}")
    return None


def _fetch(
    fs: fsspec.AbstractFileSystem, root: str, name: str, folder: Path, check: Callable[[Path], Any] | None = None
) -> str:
    """Copies one file here, where it appears only when it is complete and `check` has not raised; returns its name."""
    path = folder / name
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fs.get_file(f"{root}/{name}", str(temporary))
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return name


def _newest_first(names: Iterable[str]) -> list[list[str]]:
    """Checkpoints by kind: those whose names differ in the number only, highest first."""
    kinds: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in names:
        match = _NUMBERED.fullmatch(name)
        kinds[match[1] if match else name].append((int(match[2]) if match else 0, name))
    return [[name for _, name in sorted(kind, reverse=True)] for kind in kinds.values()]


def _filesystem(target: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a target, and the path of the target in it."""
    try:
        fs, root = fsspec.core.url_to_fs(os.path.expanduser(target))
    except Exception as error:  # an unknown scheme, a missing package, credentials that are looked up at once
        raise UserError(
            f"--remote-sync {target} cannot be used ({_reason(error)}); install or set up what is missing, or choose "
            "another place."
        ) from error
    return fs, root.rstrip("/")


def _sizes(fs: fsspec.AbstractFileSystem, root: str) -> dict[str, int]:
    """Name below `root` -> size in bytes; empty if there is no `root`."""
    fs.invalidate_cache()
    try:
        found = fs.find(root, detail=True)
    except FileNotFoundError:
        return {}
    return {path[len(root) + 1 :]: info["size"] for path, info in found.items() if path.startswith(f"{root}/")}


def _files(folder: Path) -> dict[str, _Stamp]:
    """What is to be copied of a folder: name -> stamp."""
    found = {}
    # Links to folders are not followed (wandb has one to its newest run), but checkpoints are often kept elsewhere.
    roots = [folder, *([folder / "checkpoints"] if (folder / "checkpoints").is_symlink() else [])]
    for root in roots:
        for parent, folders, names in os.walk(root, onerror=_raise):
            folders[:] = [name for name in folders if not _is_temporary(name)]
            for path in (Path(parent, name) for name in names if not _is_temporary(name)):
                with suppress(FileNotFoundError):  # deleted just now, or a link to nothing
                    status = path.stat()
                    if stat.S_ISREG(status.st_mode):
                        found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
    return found


def _raise(error: OSError) -> None:
    raise error


def _is_temporary(name: str) -> bool:
    return name.endswith(".tmp") or any(part.startswith(".") for part in name.split("/"))


def _read_state(folder: Path, target: str) -> dict[str, _Stamp]:
    try:
        state = json.loads((folder / _STATE).read_text())
        return {name: (int(size), int(time)) for name, (size, time) in state[target].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a state that is missing, of another target or damaged only costs another copy


def _write_state(folder: Path, target: str, files: dict[str, _Stamp]) -> None:
    with suppress(OSError), written_whole(folder / _STATE) as file:  # as above
        file.write(json.dumps({target: files}).encode())


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")
