"""A run that is interrupted anywhere and resumed is, bit for bit, the run that was not."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from training import checkpoint
from training.control import EXIT_INTERRUPTED
from training.main import main
from training.trainer import Trainer

from ..processes import spawn
from .runs import assert_equal_weights, command, evaluations, interrupted, losses, rows, weights, write_shards

pytestmark = pytest.mark.usefixtures("local_model")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two sources of different sizes, with a broken picture in each."""
    folder = tmp_path_factory.mktemp("shards")
    first = write_shards(folder / "a", shards=2, samples=20, broken={7})
    second = write_shards(folder / "b", shards=2, samples=12, broken={13})
    return f"{first}::{second}"


def test_a_signal_in_the_first_step_is_answered_at_once(shards, tmp_path):
    with interrupted(1):
        assert main(command(shards, tmp_path)) == EXIT_INTERRUPTED
    log = (tmp_path / "run" / "out.log").read_text()
    assert "Reading the first batch, for the first step." in log
    assert "Stopped by signal 15 before the end of the first step." in log
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


SETTINGS = {
    "one worker": (["--workers", "1"], [3]),
    "in the main process": (["--workers", "0"], [11]),
    "three workers": (["--workers", "3"], [2, 10]),
    "last step of an epoch and of the run": (["--workers", "1"], [8, 16]),
    "accumulation": (["--workers", "2", "--batch-size", "4", "--accum-freq", "2"], [5]),
    "resampled": (["--workers", "2", "--dataset-resampled", "--train-data-upsampling-factors", "1::3"], [4, 13]),
    "averages, clipping, dropout, amp": (
        ["--ema-decay", "0.9", "--grad-clip-norm", "1", "--force-patch-dropout", "0.3", "--precision", "amp_bf16"],
        [6],
    ),
    "random dropping, all tokens at the end": (
        ["--token-reduction", "random", "--full-tokens-last", "5", "--accum-freq", "2", "--batch-size", "4"], [9, 13],
    ),
    "siglip, lamb": (["--siglip", "--opt", "timm/lamb", "--lr", "1e-3", "--layer-decay", "0.8"], [9]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_interrupted_equals_uninterrupted(name, shards, tmp_path):
    flags, stops = SETTINGS[name]
    flags = [*flags, "--val-data", shards.split("::")[0]]
    assert main(command(shards, tmp_path, *flags, name="straight")) == 0
    for stop in stops:
        with interrupted(stop):
            argv = command(shards, tmp_path, *flags, "--resume", "latest", name="stopped")
            assert main(argv) == EXIT_INTERRUPTED
        state = checkpoint.load(checkpoint.newest(tmp_path / "stopped" / "checkpoints"))
        assert state["step"] == stop
    assert main(command(shards, tmp_path, *flags, "--resume", "latest", name="stopped")) == 0

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    a, b = (torch.load(run / "checkpoints" / "epoch_2.pt", weights_only=True) for run in (straight, stopped))
    assert_equal_weights(a["state_dict"], b["state_dict"])
    if a["ema"]:
        assert_equal_weights(a["ema"], b["ema"])
    assert torch.equal(a["random"][0]["cpu"], b["random"][0]["cpu"])
    assert losses(straight) == losses(stopped)
    assert evaluations(straight) == evaluations(stopped) and len(evaluations(straight)) == 2
    skipped = [
        [line.split("WARNING")[1] for line in (run / "out.log").read_text().splitlines() if "unreadable image" in line]
        for run in (straight, stopped)
    ]
    assert skipped[0] == skipped[1] and len(skipped[0]) == 2


def test_the_last_part_of_a_run_uses_all_tokens(shards, tmp_path):
    flags = ["--token-reduction", "random", "keep_ratio=0.5", "--full-tokens-last", "25%"]
    assert main(command(shards, tmp_path, *flags)) == 0
    assert "as long as the run" not in (tmp_path / "run" / "out.log").read_text()
    assert main(command(shards, tmp_path, *flags[:-1], "16", name="all")) == 0
    assert "--full-tokens-last is as long as the run" in (tmp_path / "all" / "out.log").read_text()
    steps = rows(tmp_path / "run")
    ratios, operations = ([float(row[key]) for row in steps] for key in ("rrt", "gflops_per_sample"))
    assert len(steps) == 16
    assert ratios == pytest.approx([1 - 9 / 17] * 12 + [0.0] * 4, abs=1e-6)
    assert min(operations[12:]) > 1.3 * max(operations[:12])
    assert f"rrt {0.75 * (1 - 9 / 17):.4g}" in (tmp_path / "run" / "summary.txt").read_text()


def test_step_checkpoints_and_resume_from_any_of_them(shards, tmp_path):
    flags = ["--save-every-n-steps", "3", "--keep-last", "100"]
    assert main(command(shards, tmp_path, *flags, name="straight")) == 0
    folder = tmp_path / "straight" / "checkpoints"
    assert {p.name for p in folder.glob("*.pt")} == {f"step_{k}.pt" for k in (3, 6, 9, 12, 15)} | {
        "epoch_1.pt", "epoch_2.pt"
    }  # fmt: skip
    for k in (3, 9):
        assert main(command(shards, tmp_path, "--resume", str(folder / f"step_{k}.pt"), name=f"from-{k}")) == 0
        resumed = weights(tmp_path / f"from-{k}" / "checkpoints" / "epoch_2.pt")
        assert_equal_weights(resumed, weights(folder / "epoch_2.pt"))


def test_an_evaluation_that_was_missed_is_made_up_for(shards, tmp_path, monkeypatch):
    flags = ["--val-data", shards.split("::")[0]]
    assert main(command(shards, tmp_path, *flags, name="straight")) == 0

    def die(self):
        raise RuntimeError("killed")

    monkeypatch.setattr(Trainer, "evaluate", die)
    with pytest.raises(RuntimeError):
        main(command(shards, tmp_path, *flags, name="killed"))
    monkeypatch.undo()
    assert main(command(shards, tmp_path, *flags, "--resume", "latest", name="killed")) == 0
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert evaluations(straight) == evaluations(killed) and losses(straight) == losses(killed)
    assert_equal_weights(*(weights(run / "checkpoints" / "epoch_2.pt") for run in (straight, killed)))


def test_another_batch_size_is_refused_or_elastic(shards, tmp_path, capsys):
    with interrupted(4):
        assert main(command(shards, tmp_path)) == EXIT_INTERRUPTED
    smaller = ["--batch-size", "4", "--resume", "latest"]
    assert main(command(shards, tmp_path, *smaller)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "8 samples in a batch (now 4)" in error and "--allow-elastic" in error
    assert main(command(shards, tmp_path, *smaller, "--allow-elastic")) == 0
    state = torch.load(tmp_path / "run" / "checkpoints" / "epoch_2.pt", weights_only=True)
    assert state["samples"] == 2 * 64 and state["step"] == 4 + 2 * 16 - 8
    steps = losses(tmp_path / "run")
    assert float(steps[-1][2]) < float(steps[8][2])  # the cosine goes on to its end
    assert state["plan"]["reference_batch"] == 8
    assert "Elastic resume" in (tmp_path / "run" / "out.log").read_text()


def test_workers_may_change_at_the_end_of_an_epoch_and_the_log_says_so(shards, tmp_path):
    assert main(command(shards, tmp_path)) == 0
    (tmp_path / "run" / "checkpoints" / "epoch_2.pt").unlink()
    assert main(command(shards, tmp_path, "--workers", "2", "--resume", "latest")) == 0
    log = (tmp_path / "run" / "out.log").read_text()
    assert "The coming data are not those of the uninterrupted run: workers 2 (was 1)." in log
    (tmp_path / "run" / "checkpoints" / "epoch_2.pt").unlink()
    flags = ["--seed", "5", "--wd", "0", "--beta2", "0.5", "--resume", "latest"]
    assert main(command(shards, tmp_path, *flags, "--epochs", "3")) == 0
    log = (tmp_path / "run" / "out.log").read_text()
    assert "epochs 3 (was 2), beta2 0.5 (was 0.999), wd 0.0 (was 0.2)." in log
    assert "uninterrupted run: seed 5 (was 0)." in log
    assert "Nothing is left" not in log
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "epoch_3.pt")
    assert {(g["weight_decay"], tuple(g["betas"])) for g in state["optimizer"]["param_groups"]} == {(0.0, (0.9, 0.5))}
    assert "wd: 0.0" in (tmp_path / "run" / "config.yaml").read_text()
    assert main(command(shards, tmp_path, *flags, "--opt", "timm/sgd", "--lr", "1")) == 2
    assert main(command(shards, tmp_path, *flags, "--epochs", "1")) == 0
    assert "Nothing is left to train" in (tmp_path / "run" / "out.log").read_text()


def test_shards_that_changed_are_told_or_refused(shards, tmp_path, capsys):
    for step, name in ((4, "run"), (8, "ended")):  # in the middle of an epoch, and at its end
        with interrupted(step):
            assert main(command(shards, tmp_path, name=name)) == EXIT_INTERRUPTED
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    assert main(command(shards, tmp_path, "--resume", "latest", name="same")) == 0
    assert "have changed since" not in (tmp_path / "same" / "out.log").read_text()
    first = Path(shards.split("{")[0] + "00000.tar")
    os.utime(first, ns=(0, first.stat().st_mtime_ns + 1))
    assert main(command(shards, tmp_path, "--resume", "latest")) == 2
    assert f"error: {first} cannot be read as before the checkpoint, so the epoch would" in capsys.readouterr().err
    assert main(command(shards, tmp_path, "--resume", "latest", name="ended")) == 0
    log = (tmp_path / "ended" / "out.log").read_text()
    assert f"1 file(s) of the data have changed since {tmp_path}/ended/checkpoints/step_8.pt was" in log
    assert f"by size or date, the first of them {first};" in log


def test_checkpoints_that_cannot_be_read_are_not_started_over(shards, tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "epoch_1.pt").write_bytes(b"half of it")
    assert main(command(shards, tmp_path, "--resume", "latest")) == 2
    assert "can be continued; to start anew, move epoch_1.pt away." in capsys.readouterr().err


def test_two_processes_stop_together_and_resume_exactly(local_model, shards, tmp_path):
    def run(name, code=0):
        argv = command(shards, tmp_path, "--batch-size", "4", "--resume", "latest", name=name)
        argv[argv.index("--model") + 1] = f"local-dir:{local_model}"
        spawn(stop_one_rank, argv, code, group=False)

    run("straight")
    run("stopped", EXIT_INTERRUPTED)
    state = checkpoint.load(checkpoint.newest(tmp_path / "stopped" / "checkpoints"))
    assert state["step"] == 5 and len(state["data"]) == 2
    run("stopped")
    a, b = (weights(tmp_path / name / "checkpoints" / "epoch_2.pt") for name in ("straight", "stopped"))
    assert_equal_weights(a, b)
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")
    assert json.loads(json.dumps(state["plan"]))["world_size"] == 2


def stop_one_rank(rank, argv, code):
    """Only rank 1 gets the signal; both must stop after the same step."""
    with interrupted(5 if code and rank == 1 else 0):
        assert main(argv) == code
