"""Figures arrive where they were asked for, once each, also after a resume."""
import json
import logging
import sys
import time
from pathlib import Path

import pytest

from training.errors import UserError
from training.log import RunLog, setup_logging

from .runs import rows


def test_rows_after_the_resumed_step_are_written_once(tmp_path):
    log = RunLog(tmp_path)
    for step in range(5):
        log.train({"step": step, "loss": 5.0 - step})
    log = RunLog(tmp_path, step=3)  # the checkpoint was written after steps 0, 1, 2
    log.train({"step": 3, "loss": 0.25})
    assert [(r["step"], float(r["loss"])) for r in rows(tmp_path)] == [("0", 5), ("1", 4), ("2", 3), ("3", 0.25)]


def test_tensorboard_and_results(tmp_path, caplog):
    RunLog(None, "tensorboard").close()
    assert caplog.messages == ["TensorBoard's files belong into the run folder: with --logs none there are none."]
    (tmp_path / "checkpoints").mkdir()
    log = RunLog(tmp_path, "tensorboard")
    log.train({"step": 0, "loss": 1.0})
    log.evaluation({"epoch": 1, "image_to_text_R@1": 0.5}, step=1)
    log.close()
    written = (tmp_path / "checkpoints" / "results.jsonl").read_text()
    assert json.loads(written) == {"epoch": 1, "image_to_text_R@1": 0.5}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {"train/loss", "val/image_to_text_R@1"}
    assert events.Scalars("train/loss")[0].value == 1.0


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.parametrize("name", ["run", "lr:1e-3", "a/b #1?"])
def test_wandb(offline, name, tmp_path):
    log = RunLog(tmp_path, "wandb", wandb_options={"project": "test", "name": name})
    assert (log.writers["wandb"].id == name) == (name == "run") and log.writers["wandb"].name == name
    log.train({"step": 0, "loss": 1.0})
    log.close()
    (record,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    until = time.monotonic() + 60
    while b"train/loss" not in record.read_bytes():  # wandb's own process writes it, and may be late
        assert time.monotonic() < until
        time.sleep(0.1)


def test_what_cannot_be_reported_to_is_told_in_a_sentence(offline, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^--report-to wandb cannot be used \(.*project.*\); install or set up[^\n]*$"):
        RunLog(tmp_path, "wandb", wandb_options={"project": "a/b"})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="^--report-to tensorboard cannot be used"):
        RunLog(tmp_path, "tensorboard")


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path, "tensorboard,wandb", enabled=False)
    log.train({"step": 0, "loss": 1.0})
    log.evaluation({"epoch": 1}, step=1)
    log.close()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- damage


RESULTS = [{"epoch": 1, "step": 4, "top1": 0.25}, {"epoch": 2, "step": 8, "top1": 0.5}]
TEXT = "".join(json.dumps(result) + "\n" for result in RESULTS)


@pytest.mark.parametrize(
    ("text", "left"),
    [(TEXT, [1, 2]), (TEXT[:-1], [1]), (TEXT[:-9], [1]), ("\0\0" + TEXT, [2]), ("[1]\n" + TEXT, [1, 2]), ("", []),
     ('{"step": "4"}\n' + TEXT, [1, 2]), ('{"epoch": 1, "top1": null}\n' + TEXT, [1, 2])],
)
def test_results_with_damaged_lines(text, left, tmp_path, caplog):
    path = tmp_path / "checkpoints" / "results.jsonl"
    path.parent.mkdir()
    path.write_text(text)
    log = RunLog(tmp_path, step=8)
    assert [result["epoch"] for result in log.results] == left
    assert caplog.text.count("1 line(s) of") == (text not in ("", TEXT))
    log.evaluation({"epoch": 3, "step": 12}, step=12)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [*left, 3]


@pytest.mark.parametrize(
    ("text", "left", "damaged"),
    [
        ("step,loss\r\n0,5.5\r\n1,4.5\r\n", ["0", "1"], 0),
        ("step,loss\r\n0,5.5\r\n1,4.5", ["0"], 1),  # it may have been 4.51
        ("step,loss\r\n0,5.5\r\n1", ["0"], 1),
        ("step,loss\r\n\0\0\0\r\n1,4.5\r\nx,y\r\n", ["1"], 2),
        ("step,lo", [], 1),
        ("", [], 0),
    ],
)
def test_train_csv_with_damaged_lines(text, left, damaged, tmp_path, caplog):
    (tmp_path / "train.csv").write_bytes(text.encode())
    log = RunLog(tmp_path, step=2)
    assert caplog.text.count(f"{damaged} line(s) of") == (damaged > 0)
    log.train({"step": 2, "loss": 0.25})
    log.train({"step": 3, "loss": 0.125})
    lines = (tmp_path / "train.csv").read_text().splitlines()
    kept = [line for line in text.split() if line[0] in left]
    assert lines[lines.index("step,loss") + 1 :] == [*kept, "2,0.25", "3,0.125"]


def test_figures_that_cannot_be_written_are_one_line_of_the_log(tmp_path, caplog):
    (tmp_path / "checkpoints").mkdir()
    for name in ("train.csv", "checkpoints/results.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    log = RunLog(tmp_path, "tensorboard")
    log.writers["tensorboard"] = None  # as good as a full disk
    for step in range(3):
        log.train({"step": step, "loss": 1.0})
        log.evaluation({"epoch": step}, step)
    assert log.results[-1] == {"epoch": 2}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3 and all("the run goes on" in message for message in messages)
    (tmp_path / "train.csv").unlink()  # room again
    log.train({"step": 3, "loss": 1.0})
    assert (tmp_path / "train.csv").read_text() == "step,loss\n3,1\n"
    (tmp_path / "train.csv").unlink()
    (tmp_path / "train.csv").symlink_to("/dev/full")
    log.train({"step": 4, "loss": 1.0})
    assert len(caplog.records) == 4


def test_logging_goes_to_file_and_console(tmp_path, capsys):
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        setup_logging(logging.INFO, tmp_path / "out.log", console=True)
        setup_logging(logging.INFO, tmp_path / "out.log", console=True)  # twice is as once
        logging.info("hello")
        assert capsys.readouterr().err.count("hello") == 1
        assert (tmp_path / "out.log").read_text().count("hello") == 1
        setup_logging(logging.INFO, None, console=False)  # another rank than the main one
        logging.warning("said once, by the main rank")
        logging.getLogger("training.data.stalls").info("nothing to worry about")
        logging.getLogger("training.data.stalls").warning("rank 3 waits")
        shown = capsys.readouterr().err
        assert "rank 3 waits" in shown and "said once" not in shown and "nothing to worry" not in shown
        setup_logging(logging.INFO, Path("/dev/full"), console=True)
        for _ in range(3):
            logging.info("not in the file")
        shown = capsys.readouterr().err
        assert shown.count("not in the file") == 3 and shown.count("/dev/full cannot be written (No space left") == 1
        setup_logging(logging.INFO, tmp_path / "no folder" / "out.log", console=True)
        assert "out.log could not be updated" in capsys.readouterr().err
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
