"""A run that is interrupted anywhere and resumed is, bit for bit, the run that was not."""
import csv
import json
import os
import signal

import pytest
import torch

from training import checkpoint
from training.control import EXIT_INTERRUPTED
from training.main import main
from training.trainer import Trainer

from ..processes import torchrun
from .runs import assert_equal_weights, command, register_models, weights, write_shards


@pytest.fixture(scope="module", autouse=True)
def tiny_model(tmp_path_factory):
    return register_models(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two sources of different sizes, with a broken picture in each."""
    folder = tmp_path_factory.mktemp("shards")
    first = write_shards(folder / "a", shards=2, samples=20, broken={7})
    second = write_shards(folder / "b", shards=2, samples=12, broken={13})
    return f"{first}::{second}"


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(k)`: a SIGTERM arrives during optimizer step k (counted from 1)."""

    def at(step):
        original = Trainer.step

        def step_and_signal(self, window):
            if self.steps + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, window)

        monkeypatch.setattr(Trainer, "step", step_and_signal)

    yield at


def losses(run):
    with (run / "train.csv").open() as file:
        return [(r["step"], r["loss"], r["lr"]) for r in csv.DictReader(file)]


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
def test_interrupted_equals_uninterrupted(name, shards, tmp_path, interrupt, monkeypatch):
    flags, stops = SETTINGS[name]
    flags = [*flags, "--val-data", shards.split("::")[0]]
    assert main(command(shards, tmp_path, *flags, name="straight")) == 0
    for stop in stops:
        with monkeypatch.context():
            interrupt(stop)
            argv = command(shards, tmp_path, *flags, "--resume", "latest", name="stopped")
            assert main(argv) == EXIT_INTERRUPTED
        monkeypatch.undo()
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
    results = [(run / "checkpoints" / "results.jsonl").read_text() for run in (straight, stopped)]
    assert results[0] == results[1] and len(results[0].splitlines()) == 2
    skipped = [
        [line.split("WARNING")[1] for line in (run / "out.log").read_text().splitlines() if "unreadable image" in line]
        for run in (straight, stopped)
    ]
    assert skipped[0] == skipped[1] and len(skipped[0]) == 2


def test_the_last_part_of_a_run_uses_all_tokens(shards, tmp_path):
    flags = ["--token-reduction", "random", "keep_ratio=0.5", "--full-tokens-last", "25%"]
    assert main(command(shards, tmp_path, *flags)) == 0
    with (tmp_path / "run" / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    ratios, operations = ([float(row[key]) for row in rows] for key in ("rrt", "gflops_per_sample"))
    assert len(rows) == 16
    assert ratios == pytest.approx([1 - 9 / 17] * 12 + [0.0] * 4, abs=1e-6)
    assert min(operations[12:]) > 1.3 * max(operations[:12])
    assert f"rrt {0.75 * (1 - 9 / 17):.4g}" in (tmp_path / "run" / "summary.txt").read_text()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model", "Tiny", "--full-tokens-last", "10%"], "--full-tokens-last needs a model with token reduction"),
        (["--token-reduction", "none", "--full-tokens-last", "10%"], "--full-tokens-last needs a model with token"),
        (["--token-reduction", "tome", "lam=0.5"], "Unknown token_reduction option 'lam'"),
        (["--token-reduction", "evit", "keep_rate=0.5", "target_rrt=0.3"], "either keep_rate or target_rrt"),
        (["--token-reduction", "target_rrt=0.3"], "Unknown token_reduction option 'target_rrt'"),
    ],
)
def test_options_of_another_method_are_refused(flags, sentence, shards, tmp_path, capsys, caplog):
    assert main(command(shards, tmp_path, *flags)) == 2
    assert sentence in capsys.readouterr().err + caplog.text
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


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
    straight, killed = ((tmp_path / n / "checkpoints" / "results.jsonl").read_text() for n in ("straight", "killed"))
    assert straight == killed


def test_another_batch_size_is_refused_or_elastic(shards, tmp_path, interrupt, monkeypatch, capsys):
    interrupt(4)
    assert main(command(shards, tmp_path)) == EXIT_INTERRUPTED
    monkeypatch.undo()
    smaller = ["--batch-size", "4", "--resume", "latest"]
    assert main(command(shards, tmp_path, *smaller)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "8 samples in a batch (now 4)" in error and "--allow-elastic" in error
    assert main(command(shards, tmp_path, *smaller, "--allow-elastic")) == 0
    state = torch.load(tmp_path / "run" / "checkpoints" / "epoch_2.pt", weights_only=True)
    assert state["samples"] == 2 * 64 and state["step"] == 4 + 2 * 16 - 8
    rows = losses(tmp_path / "run")
    assert float(rows[-1][2]) < float(rows[8][2])  # the cosine goes on to its end
    assert state["plan"]["reference_batch"] == 8
    assert "Elastic resume" in (tmp_path / "run" / "out.log").read_text()


def test_workers_may_change_at_the_end_of_an_epoch_and_the_log_says_so(shards, tmp_path):
    assert main(command(shards, tmp_path)) == 0
    (tmp_path / "run" / "checkpoints" / "epoch_2.pt").unlink()
    assert main(command(shards, tmp_path, "--workers", "2", "--resume", "latest")) == 0
    assert "2 loader workers instead of 1" in (tmp_path / "run" / "out.log").read_text()


def test_two_processes_stop_together_and_resume_exactly(tiny_model, shards, tmp_path):
    def run(name, stop_at=None):
        argv = command(shards, tmp_path, "--batch-size", "4", "--resume", "latest", name=name)
        argv[argv.index("--model") + 1] = f"local-dir:{tiny_model}"
        entry = [str(tmp_path / "stop_one_rank.py"), str(stop_at or 0)]
        return torchrun("--", *entry, *argv)

    # Only rank 1 gets the signal; both must stop after the same step.
    (tmp_path / "stop_one_rank.py").write_text(
        "import os, signal, sys\n"
        "from training.distributed import end\n"
        "from training.main import main\n"
        "from training.trainer import Trainer\n"
        "stop, original = int(sys.argv[1]), Trainer.step\n"
        "def step(self, window):\n"
        "    if self.steps + 1 == stop and self.ranks.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return original(self, window)\n"
        "Trainer.step = step\n"
        "end(main(sys.argv[2:]))\n"
    )
    assert run("straight").returncode == 0
    stopped = run("stopped", stop_at=5)
    assert f"exitcode  : {EXIT_INTERRUPTED}" in stopped.stderr, stopped.stderr
    state = checkpoint.load(checkpoint.newest(tmp_path / "stopped" / "checkpoints"))
    assert state["step"] == 5 and len(state["data"]) == 2
    assert run("stopped").returncode == 0
    a, b = (weights(tmp_path / name / "checkpoints" / "epoch_2.pt") for name in ("straight", "stopped"))
    assert_equal_weights(a, b)
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")
    assert json.loads(json.dumps(state["plan"]))["world_size"] == 2
