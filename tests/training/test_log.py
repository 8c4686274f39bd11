"""Figures arrive where they were asked for, once each, also after a resume."""
import csv
import json
import logging
import time

from training.log import RunLog, setup_logging


def rows(folder):
    with (folder / "train.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_after_the_resumed_step_are_written_once(tmp_path):
    log = RunLog(tmp_path)
    for step in range(5):
        log.train({"step": step, "loss": 5.0 - step})
    log = RunLog(tmp_path, step=3)  # the checkpoint was written after steps 0, 1, 2
    log.train({"step": 3, "loss": 0.25})
    assert [(r["step"], float(r["loss"])) for r in rows(tmp_path)] == [("0", 5), ("1", 4), ("2", 3), ("3", 0.25)]


def test_tensorboard_and_results(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    log = RunLog(tmp_path, report_to=frozenset({"tensorboard"}))
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


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = RunLog(tmp_path, report_to=frozenset({"wandb"}), wandb_options={"project": "test", "id": "run"})
    log.train({"step": 0, "loss": 1.0})
    log.close()
    (record,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    until = time.monotonic() + 60
    while b"train/loss" not in record.read_bytes():  # wandb's own process writes it, and may be late
        assert time.monotonic() < until
        time.sleep(0.1)


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path, enabled=False, report_to=frozenset({"tensorboard", "wandb"}))
    log.train({"step": 0, "loss": 1.0})
    log.evaluation({"epoch": 1}, step=1)
    log.close()
    assert list(tmp_path.iterdir()) == []


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
    finally:
        for handler in list(root.handlers):
            root.removeHandler(handler)
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(level)
