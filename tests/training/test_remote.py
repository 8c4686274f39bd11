"""The copy of a run's folder elsewhere: what is copied, when, under which name, what happens on failure; and back."""
import itertools
import logging
import os
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from training import checkpoint
from training.errors import UserError
from training.remote import RemoteSync

from .data_helpers import wait_until


class FlakyFileSystem(MemoryFileSystem):
    """A file system in memory that renames, can be down, and remembers what was asked of it."""

    protocol = "flaky"
    store: dict = {}
    pseudo_dirs = [""]
    calls: list = []
    fails = None  # a text in the names of what fails

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _call(self, *call):
        self.calls.append(call)
        if FlakyFileSystem.fails is not None and FlakyFileSystem.fails in call[1]:
            raise TimeoutError("no answer\nfrom the store")

    def find(self, path, **kwargs):
        self._call("find", path)
        return super().find(path, **kwargs)

    def put_file(self, lpath, rpath, **kwargs):
        self._call("put", rpath)
        super().put_file(lpath, rpath, **kwargs)

    def mv(self, path1, path2, **kwargs):
        self._call("mv", path1, path2)
        self.store[self._strip_protocol(path2)] = self.store.pop(self._strip_protocol(path1))


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
fsspec.register_implementation("absent", "no_such_package.FileSystem", errtxt="Install no_such_package to use absent")
_number = itertools.count()


@pytest.fixture
def flaky(monkeypatch):
    """A URL on a `FlakyFileSystem` that works, for now."""
    monkeypatch.setattr(FlakyFileSystem, "fails", None)
    FlakyFileSystem.calls.clear()
    return f"flaky://bucket-{next(_number)}/run"


@pytest.fixture(params=["path", "memory", "flaky"])
def target(request, tmp_path, flaky):
    return {"path": f"{tmp_path}/copies/run", "memory": f"memory://{next(_number)}/run", "flaky": flaky}[request.param]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "logs" / "run"
    write(folder / "config.yaml", "epochs: 2\n")
    write(folder / "train.csv", "step,loss\n")
    write(folder / "checkpoints" / "epoch_1.pt", "one")
    return folder


def write(path, text):
    """Writes a file whose time of change differs from that of any other call, as coarse as the clock may be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(moment := 1_700_000_000_000_000_000 + next(_number), moment))


def copies(target):
    """Everything below `target`, temporary files too: name -> text."""
    fs, root = fsspec.core.url_to_fs(target)
    find = MemoryFileSystem.find if isinstance(fs, FlakyFileSystem) else type(fs).find  # works while it is down
    return {path[len(root) + 1 :]: fs.cat_file(path).decode() for path in find(fs, root)}


FIRST = {"config.yaml": "epochs: 2\n", "train.csv": "step,loss\n", "checkpoints/epoch_1.pt": "one"}


def test_what_is_new_or_has_changed_is_copied(run, target):
    for name in (".lock", "checkpoints/.epoch_2.pt.77.tmp", ".git/HEAD"):
        write(run / name, "hidden")
    (run / "gone").symlink_to("nowhere")
    shutil.move(run / "checkpoints", run.parent / "big-disk")
    (run / "checkpoints").symlink_to(run.parent / "big-disk")
    sync = RemoteSync(run, target)
    sync.start()
    assert copies(target) == FIRST
    changes = {"train.csv": "step,loss\n0,4.5\n", "checkpoints/epoch_1.pt": "two", "wandb/a/b.log": "new"}
    for name, text in changes.items():
        write(run / name, text)
    sync.copy_changes()
    assert copies(target) == FIRST | changes
    write(run / "out.log", "the last line")
    sync.close()
    assert copies(target)["out.log"] == "the last line"


def test_a_restarted_run_copies_no_checkpoint_again(run, flaky):
    write(run / "checkpoints" / "epoch_2.pt", "two")
    for _ in range(2):
        RemoteSync(run, flaky).start()
        arrived = {call[2].partition("/run/")[2] for call in FlakyFileSystem.calls if call[0] == "mv"}
        FlakyFileSystem.calls.clear()
    assert arrived == {"config.yaml", "train.csv"}


def test_a_name_appears_when_its_file_is_complete(run, flaky, monkeypatch):
    RemoteSync(run, flaky).start()
    put = [call[1].rpartition("/")[2] for call in FlakyFileSystem.calls if call[0] == "put"]
    assert sorted(put) == [".config.yaml.tmp", ".epoch_1.pt.tmp", ".train.csv.tmp"]
    assert copies(flaky) == FIRST

    put, original = [], MemoryFileSystem.put_file  # an object store has no half files, and cannot rename
    counting = lambda fs, a, b, **kwargs: (put.append(b.rpartition("/")[2]), original(fs, a, b, **kwargs))  # noqa: E731
    monkeypatch.setattr(MemoryFileSystem, "put_file", counting)
    RemoteSync(run, f"memory://{next(_number)}/run").start()
    assert sorted(put) == ["config.yaml", "epoch_1.pt", "train.csv"]


def test_rotated_checkpoints_go_once_the_newer_ones_have_arrived(run, flaky):
    sync = RemoteSync(run, flaky)
    sync.start()
    write(run / "checkpoints" / "epoch_2.pt", "two")
    os.remove(run / "checkpoints" / "epoch_1.pt")
    os.remove(run / "train.csv")  # no checkpoint: its copy stays
    FlakyFileSystem.fails = "epoch_2"
    with pytest.raises(TimeoutError):
        sync.copy_changes()
    assert copies(flaky).keys() == FIRST.keys()
    FlakyFileSystem.fails = None
    sync.copy_changes()
    assert set(copies(flaky)) == {"config.yaml", "train.csv", "checkpoints/epoch_2.pt"}
    shutil.rmtree(run / "checkpoints")  # not by the run
    sync.copy_changes()
    assert "checkpoints/epoch_2.pt" in copies(flaky)


def test_one_file_that_fails_does_not_keep_the_others_back(run, flaky):
    FlakyFileSystem.fails = "epoch_1.pt"  # the smallest, so the first
    sync = RemoteSync(run, flaky)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            sync.copy_changes()
    assert set(copies(flaky)) == {"config.yaml", "train.csv"}


def test_a_failure_is_logged_and_tried_again(run, flaky, caplog):
    sync = RemoteSync(run, flaky, 0.01)
    sync.start()
    FlakyFileSystem.fails = ""
    write(run / "train.csv", "changed")
    wait_until(lambda: "(no answer); training goes on" in caplog.text)
    FlakyFileSystem.fails = None
    wait_until(lambda: copies(flaky).get("train.csv") == "changed")
    FlakyFileSystem.fails = ""
    write(run / "train.csv", "at the end")
    sync.close()
    assert caplog.records[-1].levelno == logging.WARNING and f"copy {run} by hand." in caplog.text


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nosuchscheme://bucket/run", "--remote-sync nosuchscheme.* cannot be used .*nosuchscheme"),
        ("absent://bucket/run", "--remote-sync absent.* cannot be used .*Install no_such_package"),
        ("{run}", "into itself"),
        ("{run}/checkpoints/../copy", "into itself"),
        ("{run}/train.csv/run", "into itself"),
        ("{run}/../../file/run", r"--remote-sync .*/file/run cannot be used \(.*; check its name, the package"),
        ("{flaky}", r"--remote-sync flaky.* cannot be used \(no answer\); check its name, the package"),
    ],
)
def test_a_target_that_cannot_be_used_is_told_in_a_sentence(target, said, run, flaky, tmp_path):
    write(tmp_path / "file", "not a folder")
    FlakyFileSystem.fails = ""
    with pytest.raises(UserError, match=f"^[^\n]*{said}[^\n]*\\.$"):
        RemoteSync(run, target.format(run=run, flaky=flaky)).start()


# ---------------------------------------------------------------------- and back


def save(folder, name, epoch):
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoint.save({"epoch": epoch, "state_dict": {"x": torch.tensor([epoch])}}, folder / "checkpoints" / name)


@pytest.fixture
def copy(tmp_path, target):
    """A run of ten epochs that lies at `target` only."""
    folder = tmp_path / "other-machine" / "run"
    for name, epoch in {"epoch_2": 2, "epoch_9": 9, "epoch_10": 10, "best": 2, "step_90": 3, "step_100": 4}.items():
        save(folder, f"{name}.pt", epoch)
    for name in ("train.csv", "out.log", "checkpoints/results.jsonl", "tensorboard/events"):
        write(folder / name, name)
    RemoteSync(folder, target).start()
    return target


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


NOT_FETCHED = ("epoch_2", "epoch_9", "best", "step_90")
BESIDE = {"train.csv", "out.log", "checkpoints/results.jsonl"}


def test_fetch_the_newest_and_go_on(copy, tmp_path):
    folder = tmp_path / "fresh"
    RemoteSync(folder, copy).fetch_newest()
    assert files(folder) == {"checkpoints/epoch_10.pt", "checkpoints/step_100.pt", *BESIDE}
    assert checkpoint.newest(folder / "checkpoints").name == "epoch_10.pt"
    os.remove(folder / "out.log")
    RemoteSync(folder, copy).fetch_newest()  # does nothing: there is a checkpoint here
    assert not (folder / "out.log").exists()

    sync = RemoteSync(folder, copy)
    sync.start()
    save(folder, "epoch_11.pt", 11)
    os.remove(folder / "checkpoints" / "epoch_10.pt")
    sync.copy_changes()
    fs, root = fsspec.core.url_to_fs(copy)
    there = {path.rpartition("/")[2] for path in fs.find(f"{root}/checkpoints")}
    assert there == {"epoch_11.pt", "results.jsonl", *map("{}.pt".format, NOT_FETCHED), "step_100.pt"}


def test_fetch_passes_over_what_is_unreadable_and_replaces_nothing_else(copy, tmp_path, caplog):
    fs, root = fsspec.core.url_to_fs(copy)
    fs.pipe_file(f"{root}/checkpoints/epoch_10.pt", fs.cat_file(f"{root}/checkpoints/epoch_10.pt")[:-100])
    fs.pipe_file(f"{root}/checkpoints/.epoch_11.pt.tmp", b"half")
    write(tmp_path / "here" / "checkpoints" / "epoch_9.pt", "broken")
    write(tmp_path / "here" / "out.log", "mine")
    RemoteSync(tmp_path / "here", copy).fetch_newest()
    assert files(tmp_path / "here") == {"checkpoints/epoch_9.pt", "checkpoints/step_100.pt", *BESIDE}
    assert checkpoint.newest(tmp_path / "here" / "checkpoints").name == "epoch_9.pt"
    assert (tmp_path / "here" / "out.log").read_text() == "mine"
    assert "checkpoints/epoch_10.pt of the run's copy is passed over" in caplog.text


def test_what_cannot_be_fetched_does_not_pass_for_nothing(flaky, tmp_path):
    RemoteSync(tmp_path / "fresh", flaky).fetch_newest()  # there is nothing
    assert not (tmp_path / "fresh").exists()
    write(tmp_path / "a" / "checkpoints" / "epoch_1.pt", "broken")
    save(tmp_path / "a", "another.pt", 1)  # readable, but not one to continue from
    with pytest.raises(UserError, match=r"^None of the 2 checkpoint\(s\) at .*/a can be continued from; [^\n]*\.$"):
        RemoteSync(tmp_path / "fresh", f"{tmp_path}/a").fetch_newest()
    FlakyFileSystem.fails = ""
    sync = RemoteSync(tmp_path / "fresh", flaky)
    for ask in (sync.fetch_newest, sync.check_unused):
        with pytest.raises(UserError, match=rf"^--remote-sync {flaky} cannot be used \(no answer\); check[^\n]*\.$"):
            ask()


@pytest.mark.parametrize("left", ["config.yaml", "checkpoints/epoch_1.pt"])
def test_a_run_that_exists_there_is_not_overwritten(left, run, target):
    RemoteSync(Path("new"), target).check_unused()
    for name in FIRST.keys() - {left}:
        os.remove(run / name)
    RemoteSync(run, target).start()
    with pytest.raises(UserError, match="^There is a run at .* already; choose another --name[^\n]*$"):
        RemoteSync(Path("new"), target).check_unused()
