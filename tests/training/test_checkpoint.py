"""A checkpoint is whole or absent, loads without running code, and the newest one is found."""
import os

import pytest
import torch

from training import checkpoint
from training.errors import UserError

from .tiny import tiny_clip


def test_a_failed_save_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "epoch_1.pt"
    checkpoint.save({"epoch": 1}, path)

    def half_written(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError):
        checkpoint.save({"epoch": 2}, path)
    assert os.listdir(tmp_path) == ["epoch_1.pt"]
    assert checkpoint.load(path)["epoch"] == 1


def test_newest_looks_at_this_folder_and_at_numbers(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    neighbour = tmp_path / "run" / "checkpoints-old"
    folder.mkdir(parents=True)
    neighbour.mkdir()
    assert checkpoint.newest(folder) is None
    for epoch in (2, 10, 9):
        checkpoint.save({"epoch": epoch}, folder / f"epoch_{epoch}.pt")
    checkpoint.save({"epoch": 99}, neighbour / "epoch_99.pt")
    (folder / ".epoch_11.pt.123.tmp").write_bytes(b"left over")
    (folder / "tmp.pt").write_bytes(b"left over")
    whole = (folder / "epoch_10.pt").read_bytes()
    (folder / "epoch_12.pt").write_bytes(whole[: len(whole) // 2])  # damaged
    assert checkpoint.newest(folder).name == "epoch_10.pt"
    for epoch, name in ((9, "epoch_10.pt"), (11, checkpoint.LATEST)):  # which counts by its content
        checkpoint.save({"epoch": epoch}, folder / checkpoint.LATEST)
        assert checkpoint.newest(folder).name == name


@pytest.mark.parametrize(
    "content, words",
    [(None, "There is no checkpoint"), (b"not a checkpoint", "cannot be read"), ("list", "holds a list")],
)
def test_unusable_files_are_told_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "epoch_1.pt"
    if content == "list":
        torch.save([1, 2], path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"visual.proj": torch.zeros(3, 3)}, "is 3x3 there"),
        ({"visual.proj": None}, "is missing"),
        ({"visual.extra": torch.zeros(1)}, "is unknown"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(change, words):
    model = tiny_clip()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()} | change
    state = {k: v for k, v in state.items() if v is not None}
    with pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$"):
        checkpoint.restore(model, state, "x.pt")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_weights_alone_cannot_be_gone_on_from():
    model = tiny_clip()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(UserError, match="x.pt has no optimizer state to go on with.*--pretrained x.pt"):
        checkpoint.restore(model, {"epoch": 1, "state_dict": model.state_dict()}, "x.pt", optimizer)


# ---------------------------------------------------------------------- what is kept


def save_all(saver, names):
    for name in names:
        kind, number = name.removesuffix(".pt").split("_")
        epoch, steps = (int(number), 0) if kind == "epoch" else divmod(int(number), 10)
        saver.save({"epoch": epoch, "epoch_steps": steps, "state_dict": {}}, name)


def names(folder):
    return {p.name for p in folder.glob("*.pt")}


ALL = ["step_3.pt", "step_6.pt", "step_9.pt", "epoch_1.pt", "step_13.pt", "epoch_2.pt"]


@pytest.mark.parametrize(
    "keep_last, kept",
    [
        (None, {"step_9.pt", "step_13.pt", "epoch_1.pt", "epoch_2.pt"}),
        (1, {"epoch_2.pt"}),
        (2, {"epoch_2.pt", "step_13.pt"}),
    ],
)
def test_the_newest_are_kept(tmp_path, keep_last, kept):
    save_all(checkpoint.Saver(tmp_path, keep_last), ALL)
    assert names(tmp_path) == kept
    assert checkpoint.newest(tmp_path).name == "epoch_2.pt"


def test_what_an_earlier_process_left_counts_too(tmp_path):
    save_all(checkpoint.Saver(tmp_path, 2), ALL[:3])
    (tmp_path / ".step_9.pt.1234.tmp").write_bytes(b"killed while saving")
    save_all(checkpoint.Saver(tmp_path, 2), ALL[3:4])
    assert {p.name for p in tmp_path.iterdir()} == {"step_9.pt", "epoch_1.pt"}


def test_the_best_is_kept_beside_the_newest(tmp_path):
    saver, scores = checkpoint.Saver(tmp_path, keep_last=1), {}
    for epoch, score in ((1, float("nan")), (2, 0.5), (3, 0.4)):
        save_all(saver, [f"epoch_{epoch}.pt"])
        saver.keep_best(epoch, scores := scores | {epoch: score})
        assert (tmp_path / "best.pt").exists() == (epoch > 1)
        assert epoch != 2 or (tmp_path / "best.pt").samefile(tmp_path / "epoch_2.pt")  # written once
    assert names(tmp_path) == {"epoch_3.pt", "best.pt"}
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == 2
    again = checkpoint.Saver(tmp_path, keep_last=1)  # the best so far is remembered
    save_all(again, ["epoch_4.pt"])
    again.keep_best(4, scores | {4: 0.45})
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == 2
    again.keep_best(4, {4: 0.45})  # of which the score is lost
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == 4
    assert checkpoint.newest(tmp_path).name == "epoch_4.pt"


def test_the_clock_asks_for_a_checkpoint(tmp_path):
    assert not checkpoint.Saver(tmp_path, every_minutes=None).due()
    saver = checkpoint.Saver(tmp_path, every_minutes=5)
    assert not saver.due()
    saver.saved_at -= 5 * 60
    assert saver.due()
    save_all(saver, ["step_3.pt"])
    assert not saver.due()
    elsewhere = checkpoint.Saver(None, every_minutes=5)  # another rank: only the main one looks at the clock
    elsewhere.saved_at -= 5 * 60
    assert not elsewhere.due()


def test_the_one_before_is_deleted_after_a_newer_one_is_written(tmp_path, monkeypatch, caplog):
    save_all(checkpoint.Saver(tmp_path), ["epoch_1.pt", "epoch_2.pt", "step_25.pt"])
    saver = checkpoint.Saver(tmp_path, delete_previous=True)  # of an earlier run too, but no more than one
    with monkeypatch.context() as full:
        full.setattr(checkpoint, "save", lambda state, path: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert not saver.save({"epoch": 4, "state_dict": {}}, "epoch_4.pt")
    assert names(tmp_path) == {"epoch_1.pt", "epoch_2.pt", "step_25.pt"}
    save_all(saver, ["epoch_4.pt"])  # nothing was saved after epoch 3
    assert names(tmp_path) == {"epoch_1.pt", "step_25.pt", "epoch_4.pt"}
    save_all(saver, ["step_45.pt"])
    assert "epoch_4.pt" in names(tmp_path)
    (tmp_path / "epoch_4.pt").unlink()
    (tmp_path / "epoch_4.pt").mkdir()  # what cannot be deleted is one line of the log
    save_all(saver, ["epoch_5.pt"])
    assert caplog.text.count("epoch_4.pt could not be updated (Is a directory)") == 1


BAD = torch.tensor([0.0, float("nan")])


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"state_dict": {"w": BAD}}, "w"),
        ({"state_dict": {}, "ema": {"w": torch.ones(2), "v": BAD}}, "ema.v"),
        ({"state_dict": {}, "task": {"queues": [torch.ones(2, dtype=torch.long), (BAD,)]}}, "task.queues.1.0"),
        ({"state_dict": {"w": torch.ones(2)}, "ema": {}, "task": {"epoch": 3}, "optimizer": {"m": BAD}}, None),
    ],
)
def test_what_is_not_finite_is_never_written(state, named, tmp_path, caplog):
    assert checkpoint.Saver(tmp_path).save({"epoch": 2, **state}, "epoch_2.pt") == (named is None)
    assert names(tmp_path) == (set() if named else {"epoch_2.pt"})
    assert named is None or f"epoch_2.pt was not written: {named} is not finite." in caplog.text
