"""The copy of a run's folder elsewhere: what is copied, when, under which name, what happens on failure; and back."""
import itertools
import logging
import os
import shutil
import time
import tracemalloc

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from training import checkpoint
from training.errors import UserError
from training.remote import RemoteSync, check_unused, fetch_newest


class FlakyFileSystem(MemoryFileSystem):
    """A file system in memory that renames, can be down, and remembers what was asked of it."""

    protocol = "flaky"
    store: dict = {}
    pseudo_dirs = [""]
    down = False
    calls: list = []
    before_put = None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _call(self, *call):
        self.calls.append(call)
        if FlakyFileSystem.down:
            raise TimeoutError("no answer\nfrom the store")

    def find(self, path, **kwargs):
        self._call("find", path)
        return super().find(path, **kwargs)

    def put_file(self, lpath, rpath, **kwargs):
        self._call("put", rpath)
        if FlakyFileSystem.before_put is not None:
            FlakyFileSystem.before_put(lpath, rpath)
        super().put_file(lpath, rpath, **kwargs)

    def mv(self, path1, path2, **kwargs):
        self._call("mv", path1, path2)
        self.store[self._strip_protocol(path2)] = self.store.pop(self._strip_protocol(path1))

    def rm_file(self, path):
        self._call("rm", path)
        super().rm_file(path)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
fsspec.register_implementation("absent", "no_such_package.FileSystem", errtxt="Install no_such_package to use absent")
_number = itertools.count()


@pytest.fixture
def flaky():
    """A URL on a `FlakyFileSystem` that works, for now."""
    FlakyFileSystem.down, FlakyFileSystem.before_put = False, None
    FlakyFileSystem.calls.clear()
    return f"flaky://bucket-{next(_number)}/run"


@pytest.fixture(params=["file", "path", "memory", "flaky"])
def target(request, tmp_path, flaky):
    return {
        "file": f"file://{tmp_path}/copies/run",
        "path": f"{tmp_path}/copies/run",
        "memory": f"memory://bucket-{next(_number)}/run",
        "flaky": flaky,
    }[request.param]


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
    moment = 1_700_000_000_000_000_000 + next(_number)
    os.utime(path, ns=(moment, moment))


def copies(target):
    """Everything below `target`, temporary files too: name -> text."""
    fs, root = fsspec.core.url_to_fs(target)
    find = MemoryFileSystem.find if isinstance(fs, FlakyFileSystem) else type(fs).find  # works while it is down
    return {path[len(root) + 1 :]: fs.cat_file(path).decode() for path in find(fs, root)}


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


# --- what is copied ---


def test_first_copy(run, target):
    write(run / "wandb" / "run-1" / "logs" / "debug.log", "deep")
    write(run / ".remote_sync_of_another.json", "hidden")
    write(run / "checkpoints" / ".epoch_2.pt.77.tmp", "half a checkpoint")
    write(run / "half.tmp", "half")
    write(run / ".git" / "HEAD", "in a hidden folder")
    RemoteSync(run, target, 1).check()
    assert copies(target) == {
        "config.yaml": "epochs: 2\n",
        "train.csv": "step,loss\n",
        "checkpoints/epoch_1.pt": "one",
        "wandb/run-1/logs/debug.log": "deep",
    }


def test_only_changes_are_copied(run, target):
    sync = RemoteSync(run, target, 1)
    assert sync.copy_changes() == ["checkpoints/epoch_1.pt", "config.yaml", "train.csv"]  # small ones first
    assert sync.copy_changes() == []
    write(run / "train.csv", "step,loss\n0,4.5\n")  # another size
    write(run / "checkpoints" / "epoch_1.pt", "two")  # the same size, another time
    write(run / "out.log", "new")
    assert sync.copy_changes() == ["checkpoints/epoch_1.pt", "out.log", "train.csv"]
    assert copies(target) == {
        "config.yaml": "epochs: 2\n",
        "train.csv": "step,loss\n0,4.5\n",
        "out.log": "new",
        "checkpoints/epoch_1.pt": "two",
    }


def test_restarted_run_copies_only_what_changed_or_got_lost(run, flaky):
    RemoteSync(run, flaky, 1).check()
    write(run / "config.yaml", "epochs: 3\n")
    fs, root = fsspec.core.url_to_fs(flaky)
    fs.rm_file(f"{root}/train.csv")
    FlakyFileSystem.calls.clear()
    RemoteSync(run, flaky, 1).check()
    arrived = [call[2] for call in FlakyFileSystem.calls if call[0] == "mv"]
    assert arrived == [f"{root}/config.yaml", f"{root}/train.csv"]
    assert copies(flaky)["config.yaml"] == "epochs: 3\n"


def test_another_target_gets_everything(run, tmp_path):
    RemoteSync(run, f"{tmp_path}/a", 1).check()
    RemoteSync(run, f"{tmp_path}/b", 1).check()
    assert copies(f"{tmp_path}/b") == copies(f"{tmp_path}/a") != {}


def test_damaged_state_only_costs_another_copy(run, target):
    RemoteSync(run, target, 1).check()
    write(run / ".remote_sync.json", "[1")
    RemoteSync(run, target, 1).check()
    assert len(copies(target)) == 3


def test_links(run, tmp_path):
    """Checkpoints may be kept elsewhere; other links to folders (wandb's latest-run) are not followed."""
    shutil.move(run / "checkpoints", tmp_path / "big-disk")
    (run / "checkpoints").symlink_to(tmp_path / "big-disk")
    write(run / "wandb" / "run-1" / "a.log", "a")
    (run / "wandb" / "latest-run").symlink_to("run-1")
    (run / "wandb" / "gone.log").symlink_to("nowhere")
    target = f"{tmp_path}/copy"
    RemoteSync(run, target, 1).check()
    assert set(copies(target)) == {"config.yaml", "train.csv", "checkpoints/epoch_1.pt", "wandb/run-1/a.log"}


def test_file_deleted_while_copying_is_passed_over(run, flaky):
    FlakyFileSystem.before_put = lambda local, remote: os.remove(local) if local.endswith("config.yaml") else None
    assert RemoteSync(run, flaky, 1).copy_changes() == ["checkpoints/epoch_1.pt", "train.csv"]


def test_file_that_fails_does_not_keep_the_others_from_being_copied(run, flaky):
    def refuse(local, remote):
        if local.endswith("epoch_1.pt"):  # the smallest, so the first
            raise PermissionError(13, "Permission denied", local)

    FlakyFileSystem.before_put = refuse
    sync = RemoteSync(run, flaky, 1)
    for _ in range(2):
        with pytest.raises(PermissionError):
            sync.copy_changes()
    assert set(copies(flaky)) == {"config.yaml", "train.csv"}
    FlakyFileSystem.before_put = None
    assert sync.copy_changes() == ["checkpoints/epoch_1.pt"]


def test_large_files_are_not_read_into_memory(run, tmp_path):
    size = 64 * 2**20
    with (run / "checkpoints" / "epoch_2.pt").open("wb") as file:
        file.truncate(size)  # takes no space on disk
    sync = RemoteSync(run, f"{tmp_path}/copy", 1)
    tracemalloc.start()
    try:
        sync.check()
        assert tracemalloc.get_traced_memory()[1] < size / 10
    finally:
        tracemalloc.stop()
    assert (tmp_path / "copy" / "checkpoints" / "epoch_2.pt").stat().st_size == size


# --- names appear when files are complete ---


def test_upload_under_a_temporary_name(run, flaky):
    RemoteSync(run, flaky, 1).check()
    _, root = fsspec.core.url_to_fs(flaky)
    for folder, name in (("/checkpoints", "epoch_1.pt"), ("", "config.yaml"), ("", "train.csv")):
        temporary, final = f"{root}{folder}/.{name}.tmp", f"{root}{folder}/{name}"
        put, mv = FlakyFileSystem.calls.index(("put", temporary)), FlakyFileSystem.calls.index(("mv", temporary, final))
        assert put < mv
        assert ("put", final) not in FlakyFileSystem.calls


def test_object_store_gets_the_final_name_at_once(run, monkeypatch):
    """It shows an object when its upload is complete, and cannot rename: no second copy there."""
    target = f"memory://bucket-{next(_number)}/run"
    put = []
    original = MemoryFileSystem.put_file
    monkeypatch.setattr(
        MemoryFileSystem, "put_file", lambda fs, a, b, **kw: (put.append(b), original(fs, a, b, **kw))[1]
    )
    RemoteSync(run, target, 1).check()
    _, root = fsspec.core.url_to_fs(target)
    assert put == [f"{root}/checkpoints/epoch_1.pt", f"{root}/config.yaml", f"{root}/train.csv"]


def test_failed_upload_leaves_the_old_file_and_nothing_else(run, tmp_path, monkeypatch):
    target = f"file://{tmp_path}/copy"
    sync = RemoteSync(run, target, 1)
    sync.check()
    before = copies(target)

    def half(fs, local, remote, **kwargs):
        with open(remote, "w") as file:
            file.write("ha")
        assert copies(target)["checkpoints/epoch_1.pt"] == "one"  # while it is uploaded
        raise OSError(28, "No space left on device")

    write(run / "checkpoints" / "epoch_1.pt", "another")
    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", half)
        with pytest.raises(OSError, match="No space"):
            sync.copy_changes()
    assert copies(target) == before
    assert sync.copy_changes() == ["checkpoints/epoch_1.pt"]
    assert copies(target) == before | {"checkpoints/epoch_1.pt": "another"}


def test_target_that_does_not_rename_onto_a_file(run, flaky, monkeypatch):
    original = FlakyFileSystem.mv

    def mv(fs, path1, path2, **kwargs):
        if fs.exists(path2):
            raise FileExistsError(path2)
        original(fs, path1, path2)

    monkeypatch.setattr(FlakyFileSystem, "mv", mv)
    sync = RemoteSync(run, flaky, 1)
    sync.check()
    write(run / "train.csv", "changed")
    sync.copy_changes()
    assert copies(flaky) == {"config.yaml": "epochs: 2\n", "train.csv": "changed", "checkpoints/epoch_1.pt": "one"}


# --- rotation ---


def test_rotated_checkpoints_are_deleted(run, target, tmp_path):
    sync = RemoteSync(run, target, 1)
    sync.check()
    write(run / "checkpoints" / "epoch_2.pt", "two")
    write(run / "checkpoints" / "epoch_latest.pt", "two")
    os.rename(run / "checkpoints" / "epoch_1.pt", tmp_path / "aside")
    os.remove(run / "train.csv")  # no checkpoint: its copy stays
    sync.copy_changes()
    assert set(copies(target)) == {
        "config.yaml", "train.csv", "checkpoints/epoch_2.pt", "checkpoints/epoch_latest.pt",
    }  # fmt: skip
    sync.copy_changes()
    os.rename(tmp_path / "aside", run / "checkpoints" / "epoch_1.pt")
    assert sync.copy_changes() == ["checkpoints/epoch_1.pt"]


def test_nothing_is_deleted_before_the_newer_one_has_arrived(run, flaky):
    sync = RemoteSync(run, flaky, 1)
    sync.check()
    write(run / "checkpoints" / "epoch_2.pt", "two")
    os.remove(run / "checkpoints" / "epoch_1.pt")
    FlakyFileSystem.down = True
    with pytest.raises(TimeoutError):
        sync.copy_changes()
    FlakyFileSystem.down = False
    assert "checkpoints/epoch_1.pt" in copies(flaky)
    sync.copy_changes()
    assert set(copies(flaky)) == {"config.yaml", "train.csv", "checkpoints/epoch_2.pt"}


def test_checkpoints_that_were_never_here_or_are_all_gone_stay(run, target):
    sync = RemoteSync(run, target, 1)
    sync.check()
    shutil.rmtree(run / "checkpoints")
    sync.copy_changes()
    write(run / "checkpoints" / "epoch_2.pt", "two")
    restarted = RemoteSync(run, target, 1)
    restarted.check()
    restarted.copy_changes()
    assert {"checkpoints/epoch_1.pt", "checkpoints/epoch_2.pt"} <= set(copies(target))


# --- failure ---


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nosuchscheme://bucket/run", "nosuchscheme"),
        ("absent://bucket/run", "Install no_such_package"),
    ],
)
def test_unknown_kind_of_target(run, target, said):
    with pytest.raises(UserError, match=f"^--remote-sync {target} cannot be used .*{said}.*; install[^\n]*$"):
        RemoteSync(run, target, 1)


@pytest.mark.parametrize("place", ["", "copy", "checkpoints/../copy"])
def test_target_in_the_run(run, place):
    with pytest.raises(UserError, match="into itself"):
        RemoteSync(run, f"{run}/{place}", 1)


def test_target_that_cannot_be_written(run, tmp_path):
    write(tmp_path / "file", "not a folder")
    with pytest.raises(UserError, match=r"cannot be copied to .*/file/run \([^\n]+\); check --remote-sync[^\n]*\.$"):
        RemoteSync(run, f"{tmp_path}/file/run", 1).check()


def test_target_that_is_down(run, flaky):
    FlakyFileSystem.down = True
    with pytest.raises(UserError, match=rf"cannot be copied to {flaky} \(no answer\); check[^\n]*\.$"):
        RemoteSync(run, flaky, 1).check()


def test_background_copies_fail_once_a_streak_and_are_tried_again(run, flaky, caplog):
    caplog.set_level(logging.INFO)
    sync = RemoteSync(run, flaky, 0.01)
    sync.check()
    sync.start()
    try:
        for streak in (1, 2):
            FlakyFileSystem.down = True
            FlakyFileSystem.calls.clear()
            write(run / "train.csv", f"streak {streak}")
            wait_until(lambda: len(FlakyFileSystem.calls) > 10)  # several attempts
            warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
            assert len(warnings) == streak
            assert "(no answer); training goes on" in warnings[-1]
            FlakyFileSystem.down = False
            wait_until(lambda: copies(flaky).get("train.csv") == f"streak {streak}")  # noqa: B023
            wait_until(lambda: caplog.text.count("again.") == streak)  # noqa: B023
    finally:
        sync.close()


def test_close_makes_the_last_copy(run, target):
    sync = RemoteSync(run, target, 3600)
    sync.check()
    sync.start()
    write(run / "out.log", "the last line")
    sync.close()
    assert copies(target)["out.log"] == "the last line"
    assert not sync._thread.is_alive()


def test_close_never_raises(run, flaky, caplog):
    sync = RemoteSync(run, flaky, 3600)
    sync.check()
    write(run / "out.log", "the last line")
    FlakyFileSystem.down = True
    sync.close()
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert errors == [f"The last copy of the run's folder to {flaky} failed (no answer); copy {run} by hand."]


# --- and back ---


def save(folder, name, epoch):
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoint.save({"epoch": epoch, "state_dict": {"x": torch.tensor([epoch])}}, folder / "checkpoints" / name)


@pytest.fixture
def copy(tmp_path, target):
    """A run of ten epochs that lies at `target` only."""
    folder = tmp_path / "other-machine" / "run"
    for epoch in (2, 9, 10):
        save(folder, f"epoch_{epoch}.pt", epoch)
    write(folder / "train.csv", "step,loss\n")
    write(folder / "out.log", "a line")
    write(folder / "checkpoints" / "results.jsonl", "{}\n")
    write(folder / "tensorboard" / "events", "events")
    RemoteSync(folder, target, 1).check()
    return target


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {".remote_sync.json"}


BESIDE = {"train.csv", "out.log", "checkpoints/results.jsonl"}


def test_fetch_the_newest(copy, tmp_path):
    folder = tmp_path / "fresh"
    assert fetch_newest(copy, folder)
    assert files(folder) == {"checkpoints/epoch_10.pt", *BESIDE}
    assert checkpoint.load(checkpoint.newest(folder / "checkpoints"))["epoch"] == 10
    assert (folder / "train.csv").read_text() == "step,loss\n"

    sync = RemoteSync(folder, copy, 1)  # goes on from here, and uploads nothing again
    write(folder / "out.log", "a line\nanother")
    sync.check()
    fs, root = fsspec.core.url_to_fs(copy)
    assert fs.cat_file(f"{root}/out.log") == b"a line\nanother"
    save(folder, "epoch_11.pt", 11)
    os.remove(folder / "checkpoints" / "epoch_10.pt")
    assert sync.copy_changes() == ["checkpoints/epoch_11.pt"]
    assert {path.rpartition("/")[2] for path in fs.find(f"{root}/checkpoints")} == {
        "epoch_2.pt", "epoch_9.pt", "epoch_11.pt", "results.jsonl",
    }  # fmt: skip


def test_fetched_files_are_not_copied_back(flaky, tmp_path):
    save(tmp_path / "a", "epoch_1.pt", 1)
    write(tmp_path / "a" / "config.yaml", "epochs: 2\n")
    RemoteSync(tmp_path / "a", flaky, 1).check()
    fetch_newest(flaky, tmp_path / "b")
    FlakyFileSystem.calls.clear()
    RemoteSync(tmp_path / "b", flaky, 1).check()
    assert [call[0] for call in FlakyFileSystem.calls] == ["find"]


def test_fetch_passes_over_unreadable_checkpoints(copy, tmp_path, caplog):
    fs, root = fsspec.core.url_to_fs(copy)
    fs.pipe_file(f"{root}/checkpoints/epoch_10.pt", fs.cat_file(f"{root}/checkpoints/epoch_10.pt")[:-100])
    fs.pipe_file(f"{root}/checkpoints/.epoch_11.pt.tmp", b"half")
    assert fetch_newest(copy, tmp_path / "fresh")
    assert files(tmp_path / "fresh") == {"checkpoints/epoch_9.pt", *BESIDE}
    assert "checkpoints/epoch_10.pt of the run's copy is passed over" in caplog.text


def test_fetch_takes_the_newest_of_each_kind(tmp_path):
    save(tmp_path / "a", "epoch_1.pt", 1)
    save(tmp_path / "a", "epoch_3.pt", 3)
    save(tmp_path / "a", "epoch_latest.pt", 4)
    assert fetch_newest(str(tmp_path / "a"), tmp_path / "b")
    assert files(tmp_path / "b") == {"checkpoints/epoch_3.pt", "checkpoints/epoch_latest.pt"}
    assert checkpoint.newest(tmp_path / "b" / "checkpoints").name == "epoch_latest.pt"


def test_fetch_leaves_a_run_with_a_checkpoint_alone(copy, tmp_path):
    save(tmp_path / "here", "epoch_1.pt", 1)
    assert not fetch_newest(copy, tmp_path / "here")
    assert files(tmp_path / "here") == {"checkpoints/epoch_1.pt"}


def test_fetch_replaces_an_unreadable_checkpoint_and_no_other_file(copy, tmp_path):
    write(tmp_path / "here" / "checkpoints" / "epoch_10.pt", "broken")
    write(tmp_path / "here" / "out.log", "mine")
    assert fetch_newest(copy, tmp_path / "here")
    assert files(tmp_path / "here") == {"checkpoints/epoch_10.pt", *BESIDE}
    assert checkpoint.newest(tmp_path / "here" / "checkpoints").name == "epoch_10.pt"
    assert (tmp_path / "here" / "out.log").read_text() == "mine"


def test_nothing_to_fetch(target, tmp_path):
    assert not fetch_newest(target, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_no_readable_checkpoint_to_fetch(flaky, tmp_path):
    write(tmp_path / "a" / "checkpoints" / "epoch_1.pt", "broken")
    save(tmp_path / "a", "another.pt", 1)  # readable, but not one to continue from
    RemoteSync(tmp_path / "a", flaky, 1).check()
    with pytest.raises(UserError, match=rf"^None of the 2 checkpoint\(s\) at {flaky} can be continued from; [^\n]*\.$"):
        fetch_newest(flaky, tmp_path / "fresh")


def test_copy_that_cannot_be_reached(flaky, tmp_path):
    """It must not pass for a run without checkpoints: that would start anew."""
    FlakyFileSystem.down = True
    with pytest.raises(UserError, match=rf"^The run at {flaky} cannot be fetched \(no answer\); check[^\n]*\.$"):
        fetch_newest(flaky, tmp_path / "fresh")
    with pytest.raises(UserError, match=rf"^Whether there is a run at {flaky} .* \(no answer\); check[^\n]*\.$"):
        check_unused(flaky)


def test_check_unused(copy, tmp_path):
    check_unused(f"{tmp_path}/nothing-there")
    with pytest.raises(UserError, match="^There is a run at .* already; choose another --name[^\n]*$"):
        check_unused(copy)


def test_check_unused_before_the_first_checkpoint(run, flaky):
    os.remove(run / "checkpoints" / "epoch_1.pt")
    RemoteSync(run, flaky, 1).check()
    with pytest.raises(UserError, match="already"):
        check_unused(flaky)
