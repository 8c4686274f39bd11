"""What is said while data are waited for, and signals that must not disturb the loader."""

import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from training.data import loader, pixels
from training.data.loader import Board, held_back, outlive_signals, watched
from training.data.streams import open_stream

from ..data_helpers import assert_same_batches, keys, train_data, val_data, wait_until, write_csv, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Gate:
    """A source stands still until a file is there: it is put there once a warning tells of `cue`."""

    def __init__(self, folder: Path):
        self.file = folder / "gate"
        self.file.touch()
        self.cue, self.heard = str(self.file), None

    def close(self) -> None:
        self.heard = None
        self.file.unlink()

    def command(self, shard: Path | str) -> str:
        return f"pipe:while [ ! -e {self.file} ]; do sleep 0.02; done; cat {shard}"

    def hear(self, record: logging.LogRecord) -> bool:
        if self.heard is None and self.cue in record.getMessage():  # a busy machine may have had other warnings before
            self.heard = record.getMessage()
            self.file.touch()
        return True


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path)
    loader.log.addFilter(gate.hear)
    yield gate
    loader.log.removeFilter(gate.hear)
    gate.file.touch()


FLAGS = {"dataset_type": "webdataset", "train_num_samples": 16, "stall_seconds": 0.1}
SECONDS = r"\d+ s"


@pytest.mark.parametrize("build", [train_data, val_data])
def test_the_worker_that_is_due_and_its_shard_are_named(build, gate, tmp_path):
    write_shards(tmp_path, [8, 8])
    slow = gate.command(f"{tmp_path}/00001.tar")
    data = build(f"pipe:cat {tmp_path}/00000.tar::{slow}", workers=2, **FLAGS)
    epoch = (lambda: data.epoch(0)) if build is train_data else (lambda: iter(data))
    undisturbed = list(epoch())
    (worker,) = {i % 2 for i, batch in enumerate(undisturbed) if batch["key"][0].startswith("01")}
    gate.close()

    assert_same_batches(list(epoch()), undisturbed)
    who = f"worker {worker} has been on {re.escape(slow)}"
    assert re.fullmatch(f"Rank 0 has been waiting for data for {SECONDS}: {who} for {SECONDS}.", gate.heard)


def test_a_resume_says_that_it_passes_over_what_was_used(gate, tmp_path):
    write_shards(tmp_path, [16])
    data, resumed = (train_data(gate.command(f"{tmp_path}/00000.tar"), workers=1, **FLAGS) for _ in range(2))
    list(islice(data.epoch(0), 2))
    gate.close()
    resumed.load_state_dict(data.state_dict())
    list(resumed.epoch(0))
    assert gate.heard.endswith(" s, on its way past the samples that were used before.")


def test_a_slow_picture_of_a_table_is_named(gate, tmp_path, monkeypatch):
    load_rgb = pixels.load_rgb

    def waiting(image):
        while not gate.file.exists():
            threading.Event().wait(0.02)
        return load_rgb(image)

    monkeypatch.setattr(pixels, "load_rgb", waiting)
    data = train_data(write_csv(tmp_path, 4), stall_seconds=0.1)
    gate.cue = "images/"
    gate.close()
    first = next(data.epoch(0))["key"][0]
    assert re.search(f": worker 0 has been on {first} for {SECONDS}.$", gate.heard)


def test_warnings_come_each_time_the_wait_has_doubled(caplog):
    def items():
        for seconds in (0, 1, 0.6):
            threading.Event().wait(seconds)
            yield seconds

    waits = []
    for _ in watched(items(), 0.1, 3, lambda: "worker 2 is due"):
        assert all(message.endswith("s: worker 2 is due.") for message in caplog.messages)
        waits.append([record.args[1] for record in caplog.records])
        caplog.clear()
        threading.Event().wait(0.2)  # the one who uses the data may take its time
    _, long, other = waits
    assert long[0] >= 0.1 and 2 <= len(long) <= 4 and caplog.messages == []
    assert all(second >= 2 * first for first, second in zip(long, long[1:], strict=False))
    assert 0.1 <= other[0] < long[-1]


def test_the_board(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(loader, "time", SimpleNamespace(monotonic=lambda: clock.now))
    board = Board(3)
    assert board.describe(2) == "worker 2 has not begun to read"
    board.turns_to(0, "a.tar")
    clock.now += 75
    board.turns_to(2, "pipe:" + "é" * 5000 + "/last.tar")
    assert board.describe(2).endswith("éé/last.tar for 0 s") and len(board.describe(2)) < 1200
    assert board.describe(0) == "worker 0 has been on a.tar for 75 s"


# Signals


PROGRAM = """
import os, signal, sys
from tests.training.data_helpers import keys, train_data

seen = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
data = train_data(sys.argv[1], dataset_type="webdataset", train_num_samples=80, workers=2)
os.environ["EPOCH"] = "0"  # until here the commands were only tried
print(*keys(data.epoch(0)), *sorted(set(seen)))
"""

needs_senders = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="signals do not tell who sent them")


def pid_in(file: Path) -> int | None:
    text = file.read_text() if file.exists() else ""
    return int(text) if text.endswith("\n") else None


def is_running(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # of a zombie nothing is left
    return False


@needs_senders
def test_signals_for_everybody_leave_the_workers_and_their_commands_at_work(tmp_path):
    """A terminal and torchrun signal the process group, SLURM all the processes there are."""
    write_shards(tmp_path, [40, 40], info=False)
    shards = [tmp_path / "00000.tar", tmp_path / "00001.tar"]
    flags = {"dataset_type": "webdataset", "train_num_samples": 80, "workers": 2}
    undisturbed = keys(train_data("::".join(f"pipe:cat {shard}" for shard in shards), **flags).epoch(0))

    begun, gate = [shard.with_suffix(".begun") for shard in shards], tmp_path / "gate"
    sources = "::".join(
        f"pipe:head -c 20000 {shard}; [ -z $EPOCH ] || echo $$ > {file}; while [ ! -e {gate} ]; do sleep 0.02; done; "
        f"tail -c +20001 {shard}"
        for shard, file in zip(shards, begun, strict=True)
    )
    root = Path(__file__).parents[3]
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, sources],
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(lambda: all(map(pid_in, begun)))
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(program.pid, number)
            for file in begun:
                os.kill(pid_in(file), number)
        gate.touch()
        assert program.communicate(timeout=60)[0].split() == [*undisturbed, "SIGINT", "SIGTERM"]
        assert program.returncode == 0
    finally:
        gate.touch()
        program.kill()


def send(name: str, pid: int) -> None:
    """From a process that is not its parent."""
    subprocess.run(["sh", "-c", f"kill -{name} {pid}"], check=True)


@needs_senders
@pytest.mark.parametrize("context, status", [(held_back, 0), (nullcontext, -signal.SIGTERM)])
def test_who_may_end_a_worker(context, status, tmp_path):
    """One that was started while signals are held back, its parent alone, and its command with it; others, all."""

    def work():
        outlive_signals()
        open_stream(f"pipe:echo $$ > {tmp_path}/command; sleep 60 & wait").read()

    worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    with context():
        worker.start()
    wait_until(lambda: pid_in(tmp_path / "command"))
    command = pid_in(tmp_path / "command")
    send("INT", worker.pid)
    if status == 0:
        send("TERM", worker.pid)
    worker.join(0.3)
    assert worker.exitcode is None
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == status
    if status == 0:
        wait_until(lambda: not is_running(command))
    else:
        os.killpg(command, signal.SIGKILL)
