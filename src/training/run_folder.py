"""The folder of a run: its name, who may write it, what may be in it, its configuration."""
from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import yaml

from . import checkpoint
from .errors import UserError, reason
from .files import expendable, written_whole


def default_name(options: Any) -> str:
    """From the time and the main options, and unlike that of a run that starts in the same second."""
    model = re.sub(r"[/:\\]+", "-", options.model)
    main = f"lr_{options.lr}-b_{options.batch_size}-j_{options.workers}-p_{options.precision}"
    return f"{datetime.now():%Y_%m_%d-%H_%M_%S}-model_{model}-{main}-{secrets.token_hex(2)}"


@contextmanager
def claimed(folder: Path | None) -> Iterator[None]:
    """Within it the folder is this process's alone; it is made, and gone again at the end if nothing came into it.

    The lock is the kernel's, on the file `.lock`: it ends with the process, however that ends, so none is ever stale,
    and on network file systems it holds between machines. UserError: another process has it, or it cannot be written.
    """
    if folder is None:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with _locked(folder):
        try:
            yield
        finally:
            with suppress(OSError):  # of a folder that is not empty
                (folder / ".lock").unlink()
                for path in made:
                    path.rmdir()


def _locked(folder: Path) -> IO[bytes]:
    """The open file that has the lock."""
    path = folder / ".lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b", buffering=0)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = path.read_text() or "another process"
            otherwise = "wait for its end, or choose another --name"
            raise UserError(f"The run {folder} is being written by {owner}; {otherwise}.") from None
        except OSError as error:
            logging.warning(f"{folder} cannot be locked ({reason(error)}); see to it that no other run writes there.")
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            with suppress(OSError):  # of a full disk
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        file.close()  # its owner has just left, and deleted it


def find_resume(options: Any, folder: Path | None) -> str | None:
    """The checkpoint to continue from, or None to start anew."""
    if options.resume != "latest":
        if options.resume is not None and "://" not in options.resume and not Path(options.resume).is_file():
            raise UserError(f"There is no checkpoint at {options.resume}; check --resume.")
        return options.resume
    if folder is None:
        raise UserError("--resume latest looks in the run's folder, but --logs none keeps none; give --logs.")
    found = checkpoint.newest(folder / "checkpoints")
    for path in (folder / "checkpoints").glob("*.pt") if found is None else ():
        raise UserError(f"No checkpoint in {path.parent} can be continued; to start anew, move {path.name} away.")
    if found is None:
        logging.info(f"There is no checkpoint in {folder / 'checkpoints'} yet; training starts from the beginning.")
    return None if found is None else str(found)


def to_evaluate(options: Any) -> str:
    """The checkpoint that `--resume` means where nothing is trained, so that there is no folder of the run's own."""
    if options.resume != "latest":
        return options.resume
    folder = Path(options.logs) / (options.name or "") / "checkpoints"
    found = checkpoint.newest(folder) if options.name else None
    if found is None:
        raise UserError(f"There is no checkpoint in {folder}; give the --name of a run, or a file in --resume.")
    return str(found)


def check_unused(folder: Path | None, options: Any) -> None:
    """Raises UserError when the run exists already and is not to be continued: no figure or checkpoint is ever lost."""
    used = folder is not None and ((folder / "train.csv").exists() or any(folder.glob("checkpoints/*")))
    if used and options.resume != "latest":
        raise UserError(f"The run {folder} exists already; choose another --name, or continue it with --resume latest.")


def create(folder: Path, config: dict, copy_codebase: bool = False) -> None:
    """Makes the folder and writes config.yaml (which --config reads back) and params.txt (as OpenCLIP does).

    UserError: they cannot be written, and there are none yet.
    """
    params = "".join(f"{k}: {config[k]}\n" for k in sorted(config))
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for name, text in {"config.yaml": yaml.safe_dump(config, sort_keys=True), "params.txt": params}.items():
            path = folder / name  # which a run that goes on has already
            with expendable(path) if path.exists() else nullcontext(), written_whole(path) as file:
                file.write(text.encode())
    except OSError as error:
        raise _cannot_write(folder, error) from error
    for package in ("training", "open_clip_elip") if copy_codebase else ():
        source, target = Path(__file__).parents[1] / package, folder / "code" / package
        with expendable(target):
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(f"Cannot write to the folder {folder} ({error.strerror}); choose another --logs.")
