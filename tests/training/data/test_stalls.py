"""What is said while data are waited for, and signals that must not disturb the loader."""

import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from training.data import pixels, stalls
from training.data.signals import held_back, outlive_signals
from training.data.stalls import Board, StallWatch
from training.data.streams import open_stream

from ..data_helpers import assert_same_batches, keys, train_data, val_data, write_csv, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Gate:
    """A source stands still until a file is there: it is put there once a warning tells of `cue`."""

    def __init__(self, folder: Path):
        self.file = folder / "gate"
        self.cue = str(self.file)
        self.messages: list[str] = []
        self.open()

    def open(self) -> None:
        self.file.touch()

    def close(self) -> None:
        self.messages.clear()
        self.file.unlink()

    def command(self, shard: Path | str) -> str:
        return f"pipe:while [ ! -e {self.file} ]; do sleep 0.02; done; cat {shard}"

    def hear(self, record: logging.LogRecord) -> bool:
        self.messages.append(record.getMessage())
        if self.heard():
            self.open()
        return True

    def heard(self) -> str | None:
        """The warning; a busy machine may have had others before."""
        return next((message for message in self.messages if self.cue in message), None)


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path)
    stalls.log.addFilter(gate.hear)
    yield gate
    stalls.log.removeFilter(gate.hear)
    gate.open()


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
    expected = (
        f"Rank 0 has been waiting for data for {SECONDS}: worker {worker} is due, which has been on "
        f"{re.escape(slow)} for {SECONDS}."
    )
    assert re.fullmatch(expected, gate.heard())


def test_a_resume_says_that_it_passes_over_what_was_used(gate, tmp_path):
    write_shards(tmp_path, [16])
    data, resumed = (train_data(gate.command(f"{tmp_path}/00000.tar"), workers=1, **FLAGS) for _ in range(2))
    list(islice(data.epoch(0), 2))
    gate.close()
    resumed.load_state_dict(data.state_dict())
    list(resumed.epoch(0))
    assert gate.heard().endswith(" s, on its way past the samples that were used before.")


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
    assert re.search(f": this process reads them itself and has been on {first} for {SECONDS}.$", gate.heard())


def test_warnings_come_at_doubling_intervals(monkeypatch, caplog):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(stalls, "time", SimpleNamespace(monotonic=lambda: clock.now))
    watch = StallWatch(3, 60, lambda: "worker 2 is due")

    def items():
        for waits in [(59,), (30, 59, 61, 90, 119, 120, 239, 500, 959, 960, 1000), (10, 59), (70,)]:
            begun = clock.now
            for waited in waits:
                clock.now = begun + waited
                watch.look()
            yield len(waits)

    for _ in watch.watch(items()):
        clock.now += 5000  # the one who uses the data may take its time
        watch.look()
    assert caplog.messages == [
        f"Rank 3 has been waiting for data for {seconds} s: worker 2 is due." for seconds in (61, 120, 500, 960, 70)
    ]


def test_the_board(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(stalls, "time", SimpleNamespace(monotonic=lambda: clock.now))
    board = Board(3)
    assert board.describe(2) == "has not begun to read"
    board.turns_to(2, "b.tar")
    board.turns_to(0, "a.tar")
    clock.now += 75
    assert board.describe(0) == "has been on a.tar for 75 s"
    board.turns_to(2, "pipe:" + "é" * 5000 + "/last.tar")
    assert board.describe(2).endswith("éé/last.tar for 0 s") and len(board.describe(2)) < 1200
    assert board.describe(0) == "has been on a.tar for 75 s"


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


def wait_until(condition) -> None:
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.02)
    pytest.fail("It does not come to it.")


def pid_in(file: Path) -> int | None:
    text = file.read_text() if file.exists() else ""
    return int(text) if text.endswith("\n") else None


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # of a zombie nothing is left
    except (FileNotFoundError, ProcessLookupError):
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


@pytest.fixture
def worker(tmp_path):
    """Starts a process that stands still reading from a command."""

    def work():
        outlive_signals()
        open_stream(f"pipe:echo $$ > {tmp_path}/command; sleep 60 & wait").read()

    def start(context) -> multiprocessing.Process:
        worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
        with context:
            worker.start()
        wait_until(lambda: pid_in(tmp_path / "command"))
        return worker

    return start


def send(name: str, pid: int) -> None:
    """From a process that is not its parent."""
    subprocess.run(["sh", "-c", f"kill -{name} {pid}"], check=True)


@needs_senders
def test_a_worker_ends_with_its_command_when_its_parent_says_so_and_only_then(worker, tmp_path):
    worker = worker(held_back())
    send("TERM", worker.pid)
    send("INT", worker.pid)
    worker.join(0.3)
    assert worker.exitcode is None
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0
    wait_until(lambda: not is_running(pid_in(tmp_path / "command")))


def test_a_worker_that_was_started_without_care_can_be_ended_by_all(worker, tmp_path):
    worker = worker(nullcontext())
    send("INT", worker.pid)
    worker.join(0.3)
    assert worker.exitcode is None
    send("TERM", worker.pid)
    worker.join(30)
    assert worker.exitcode == -signal.SIGTERM
    os.killpg(pid_in(tmp_path / "command"), signal.SIGKILL)

