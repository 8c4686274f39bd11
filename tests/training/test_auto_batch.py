"""`--batch-size auto` and `--lr-base-batch`: what is found, that it stays found, and what is refused."""
from __future__ import annotations

import math

import pytest
import torch
import yaml

from training import auto_batch, run
from training.auto_batch import FIRST, MARGIN, search
from training.control import EXIT_INTERRUPTED
from training.main import main

from .. import processes
from .fusion_runs import BLIP, write_fusion
from .runs import assert_equal_weights, command, interrupted, losses, weights, write_shards

MB = 1e6
pytestmark = pytest.mark.usefixtures("local_model", "uncounted")

@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), shards=2, samples=60)


@pytest.mark.parametrize(
    ("peak", "limit", "expected"),
    [
        (lambda n: 1000 + 10 * n, 2000, 100),
        (lambda n: max(5000, 10 * n), 9990, 999),  # small batches tell nothing but what the optimizer needs
        (lambda n: 1000 + 10 * n if n <= 60 else math.inf, 2000, 60),  # the device has less than it says
        (lambda n: 1000 + 10 * n + 0.05 * n * n, 2000, 73),
        (lambda n: 10 * n, 1e9, 1000),  # as many as there are
        (lambda n: 10 * n, FIRST * 10, FIRST),
        (lambda n: 10 * n, 39, 0),
    ],
)
def test_the_search(peak, limit, expected):
    tried = {}
    found = search(lambda n: MB * tried.setdefault(n, peak(n)), lambda: 10 * MB, limit * MB, most=1000)
    assert expected - expected // 32 - 1 <= found <= expected and (found in tried or not found)
    assert not found or tried[found] <= limit
    assert len(tried) <= 9 and max(tried) <= 1000


def test_a_run_and_its_continuation_have_the_found_number(shards, tmp_path, monkeypatch):
    flags = ["--batch-size", "auto", "--memory", "0.017", "--lr", "1e-3", "--lr-base-batch", "16"]
    assert main(command(shards, tmp_path, *flags, name="found")) == 0
    config, log = (tmp_path / "found" / name for name in ("config.yaml", "out.log"))
    config = yaml.safe_load(config.read_text())
    size = config["batch_size"]
    assert FIRST < size <= 60 and config["lr_base_batch"] is None
    assert config["lr"] == pytest.approx(1e-3 * size / 16)
    text = log.read_text()
    assert f"--batch-size auto: {size} for each of 1 process(es), {size} in a step" in text
    assert f"of {0.017 * (1 - MARGIN):.3g} GB, which leave a margin of 10%" in text
    assert f"--lr 0.001 is for 16 samples in a step; for {size} it is" in text

    # It is the run that the number makes; the config makes it too; and a continued one does not search again.
    monkeypatch.setattr(run, "find_batch_size", None)
    numbers = ["--batch-size", str(size), "--lr-base-batch", "16", "--lr", "1e-3"]
    assert main(command(shards, tmp_path, *numbers, name="given")) == 0
    again = ["--config", str(tmp_path / "found" / "config.yaml"), "--name", "again"]
    assert main(again) == 0
    with interrupted(2):
        assert main([*again[:-1], "stopped", "--resume", "latest"]) == EXIT_INTERRUPTED
    assert main(command(shards, tmp_path, *flags, "--resume", "latest", name="stopped")) == 0
    for name in ("given", "again", "stopped"):
        assert losses(tmp_path / name) == losses(tmp_path / "found")
        ends = (tmp_path / one / "checkpoints" / "epoch_2.pt" for one in (name, "found"))
        assert_equal_weights(*map(weights, ends))
    assert yaml.safe_load((tmp_path / "stopped" / "config.yaml").read_text())["batch_size"] == size
    assert f"--batch-size auto: {size}, as in the run that goes on." in (tmp_path / "stopped" / "out.log").read_text()


def test_more_memory_takes_more(shards, tmp_path):
    """Of a model with twin and queues, which count too."""
    model, found = write_fusion(tmp_path / "model", BLIP), []
    for memory in ("0.01", "0.016"):
        flags = ["--batch-size", "auto", "--memory", memory, "--accum-freq", "2", "--epochs", "1"]
        assert main(command(shards, tmp_path, *flags, "--queue-size", "128", name=memory, model=model)) == 0
        found.append(yaml.safe_load((tmp_path / memory / "config.yaml").read_text())["batch_size"])
    assert FIRST <= found[0] < found[1] <= 60


def _two(rank, argv):
    auto_batch.search = lambda peak, *args: (size := 12 - 2 * rank, peak(size))[0]
    assert main(argv) == 0


def test_all_ranks_take_the_smallest(shards, tmp_path, local_model):
    flags = ["--batch-size", "auto", "--memory", "1", "--epochs", "1"]
    argv = command(shards, tmp_path, *flags, model=f"local-dir:{local_model}")
    processes.spawn(_two, argv, group=False)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    state = torch.load(tmp_path / "run" / "checkpoints" / "epoch_1.pt", weights_only=True)
    assert state["plan"]["batch_size"] == config["batch_size"] == 10 and state["plan"]["world_size"] == 2
    assert "for each of 2 process(es)" in (tmp_path / "run" / "out.log").read_text()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "needs to know, on a CPU, how much memory there is: give --memory GB"),
        (["--memory", "1e-4"], "not even 4 samples fit into 9e-05 GB"),
        (["--memory", "1", "--accum-freq", "30"], "an epoch has data for batches of 4: give a number"),
        (["--memory", "1", "--fsdp"], "cannot try a sharded step: give a number"),
    ],
)
def test_what_is_refused(flags, sentence, shards, tmp_path, capsys):
    assert main(command(shards, tmp_path, "--batch-size", "auto", *flags)) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()
