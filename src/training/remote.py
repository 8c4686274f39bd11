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
from fsspec.implementations.dirfs import DirFileSystem

from . import checkpoint
from .errors import UserError, reason
from .files import written_whole

_CHECKPOINT = re.compile(r"checkpoints/[^./][^/]*\.pt")
_NUMBERED = re.compile(r"checkpoints/(epoch|step)_\d+\.pt")
_SMALL = re.compile(r"(checkpoints/)?[^./][^/]*(?<!\.pt)")


class RemoteSync:
    """Keeps a copy of a run's folder at `target` (a URL, or the path of a folder), and brings one back.

    A checkpoint has its name there only once it is complete. One that the run has deleted since is deleted there too,
    as soon as all others have arrived; other files never are. UserError, of each method: the target cannot be used.
    """

    def __init__(self, local: Path, target: str, every_seconds: float = 300):
        self.local, self.target, self.every_seconds = local, target, every_seconds
        with self._usable():
            fs, root = fsspec.core.url_to_fs(os.path.expanduser(target))
            self._fs = DirFileSystem(root.rstrip("/"), fs)
        if "file" in fs.protocol and Path(root).resolve().is_relative_to(local.resolve()):
            raise UserError(f"--remote-sync would copy {local} into itself, to {target}; choose a place outside of it.")
        self._copied: dict[str, tuple[int, int]] = {}  # as `_files`, at the time of the copy
        self._failed: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="remote-sync", daemon=True)

    def start(self) -> None:
        """The first copy, which must succeed; from then on one every `every_seconds`, in a thread."""
        with self._usable():
            there, files = self._sizes(), self._files()
            # A checkpoint with a number never changes; of other files the size says too little.
            self._copied = {n: s for n, s in files.items() if _NUMBERED.fullmatch(n) and there.get(n) == s[0]}
            self.copy_changes()
        self._thread.start()

    def close(self) -> None:
        """Waits for the copy that is under way, if any, and for the last one."""
        self._stop.set()
        self._thread.join()

    def copy_changes(self) -> None:
        """One copy of all that has changed since the one before; raises whatever fails."""
        files = self._files()
        changed = [name for name in files if self._copied.get(name) != files[name]]
        # Small files first; one that fails is not to keep others from being copied.
        for name in sorted(changed, key=lambda name: (name in self._failed, files[name][0], name)):
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

    def check_unused(self) -> None:
        """For a run that starts anew: UserError if there is one at the target already."""
        with self._usable():
            names = self._sizes()
        if "config.yaml" in names or any(map(_CHECKPOINT.fullmatch, names)):
            otherwise = "choose another --name, or continue it with --resume latest"
            raise UserError(f"There is a run at {self.target} already; {otherwise}.")

    def fetch_newest(self) -> None:
        """Brings the run from the target to a folder that has no readable checkpoint of it, if there is one.

        These are the small files, and the newest readable checkpoint of each kind. Nothing here is replaced but an
        unreadable checkpoint. UserError also if none there is readable: starting anew would overwrite them.
        """
        if checkpoint.newest(self.local / "checkpoints") is not None:
            return
        with self._usable():
            names = self._sizes()
            checkpoints = list(filter(_CHECKPOINT.fullmatch, names))
            for name in names if checkpoints else ():  # first, for once there is a checkpoint here nothing is fetched
                if _SMALL.fullmatch(name) and not (self.local / name).exists():
                    self._fetch(name)
            newest_first = sorted(checkpoints, key=lambda name: (len(name), name), reverse=True)
            kinds = ("epoch_latest", "epoch_[0-9]*", "step_[0-9]*")
            fetched = [any(map(self._fetch, fnmatch.filter(newest_first, f"*/{kind}.pt"))) for kind in kinds]
        if checkpoints and not any(fetched):
            what = f"None of the {len(checkpoints)} checkpoint(s) at {self.target} can be continued from"
            raise UserError(f"{what}; delete them to start anew, or choose another --name.")

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stop.wait(self.every_seconds)
            try:
                self.copy_changes()
            except Exception as error:  # each kind of target has exceptions of its own
                again = f"training goes on, and the copy is tried again in {self.every_seconds:g} seconds"
                again = f"copy {self.local} by hand" if last else again
                logging.warning(f"The run's folder could not be copied to {self.target} ({reason(error)}); {again}.")

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

    def _fetch(self, name: str) -> bool:
        """Copies one file here, whole or not at all. False: it is an unreadable checkpoint."""
        (self.local / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_whole(self.local / name) as file:
                self._fs.get_file(name, str(file.name))
                if name.endswith(".pt"):
                    checkpoint.load(file.name)
        except UserError as error:
            logging.warning(f"{name} of the run's copy is passed over: {error}")
            return False
        logging.info(f"Fetched {name} from {self.target}.")
        return True

    def _sizes(self) -> dict[str, int]:
        """What is at the target: name -> size in bytes; empty if there is no such folder."""
        self._fs.fs.invalidate_cache()
        with suppress(FileNotFoundError):
            return {name: info["size"] for name, info in self._fs.find("", detail=True).items()}
        return {}

    def _files(self) -> dict[str, tuple[int, int]]:
        """What is to be copied: name -> (size in bytes, time of the last change in ns)."""
        found = {}
        for name in glob.glob("**", root_dir=self.local, recursive=True):
            with suppress(FileNotFoundError):  # deleted just now, or a link to nothing
                status = (self.local / name).stat()
                if stat.S_ISREG(status.st_mode):
                    found[name] = (status.st_size, status.st_mtime_ns)
        return found

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each kind of target has exceptions of its own
            advice = "check its name, the package that belongs to it, its credentials and the free space"
            raise UserError(f"--remote-sync {self.target} cannot be used ({reason(error)}); {advice}.") from error
