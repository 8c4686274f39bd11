"""Opening shards wherever they are: files, commands, and all that curl, gsutil or fsspec can reach."""
from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from contextlib import AbstractContextManager, suppress
from typing import BinaryIO

from webdataset.gopen import Pipe, gopen, gopen_schemes, rewrite_url

# What webdataset calls for a scheme. Where it is not installed, fsspec has its turn.
CLIENTS = {scheme: "curl" for scheme in ("http", "https", "ftps", "sftp", "scp", "hf", "htgs")}
CLIENTS |= {"gs": "gsutil", "ais": "ais"}

_SECONDS_TO_END = 10
_running: set[subprocess.Popen] = set()
os.register_at_fork(after_in_child=_running.clear)  # they are the parent's


def local_path(url: str) -> str | None:
    """The path of a shard on this machine; None for other URLs and for `pipe:`."""
    path = re.sub(r"^file:(//)?", "", url)
    return path if path != url or _scheme(url) is None else None


def _scheme(url: str) -> str | None:
    match = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):", url)
    return match[1] if match else None


class Stream(AbstractContextManager):
    """The bytes of a shard, and what became of the command that makes them."""

    def __init__(self, file: BinaryIO, process: subprocess.Popen | None = None, owner: object = None):
        self.file, self.process = file, process
        self.owner = owner  # would close the file when it is collected
        self.ended = False
        if process is not None:
            _running.add(process)

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.ended = self.ended or size < 0 or len(data) < size
        return data

    def failure(self) -> OSError | None:
        """How the command failed, if there is one and its output has come to an end."""
        if self.process is None or not self.ended:
            return None
        with suppress(subprocess.TimeoutExpired):
            status = self.process.wait(_SECONDS_TO_END)
            if status:
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

    Raises: whatever the one who opens it raises, mostly OSError, ImportError or ValueError.
    """
    url = rewrite_url(url)
    path, scheme = local_path(url), _scheme(url)
    if path is not None:
        return Stream(open(path, "rb"))
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
            if os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)  # the shell and all that it has started
            else:
                process.kill()
        process.wait()
