"""What docs/extending.md promises: a method, a task and a data set are each one piece that the rest takes as it is."""
from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from open_clip_elip.identity import Identity
from open_clip_elip.profile.command import main as profile
from training import linear_probe, zero_shot
from training.data import TrainData
from training.data.samples import Sample
from training.data.sets.labelled import ImageFiles, LabelledImages
from training.data.sets.registry import SETS, data_set
from training.data.sources import RowSource
from training.distributed import Ranks
from training.main import main as train
from training.options import TrainingOptions
from training.run import Parts, run
from training.tasks.base import Task

from .processes import spawn
from .training import runs
from .training.tiny import run_options

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------ a method


def test_a_method_is_one_class(half, tmp_path, capsys):
    """Nothing but the fixture knows of it."""
    runs.register_models(tmp_path)
    shards = runs.write_shards(tmp_path / "shards")
    words = runs.command(shards, tmp_path, "--epochs", "1", "--token-reduction", "half", "share=0.25")
    assert train(words) == 0
    with (tmp_path / "run" / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["rrt"]) == pytest.approx(1 - 5 / 17)
    assert float(rows[0]["gflops_per_sample"]) > 0

    file = tmp_path / "cost.json"
    assert profile(["Tiny", "Tiny:method=half,share=0.25", "--no-time", "--batch-size", "2", "--json", str(file)]) == 0
    plain, reduced = json.loads(file.read_text())["models"]
    assert reduced["tokens_per_layer"] == [5] * 6 and reduced["rrt"] == pytest.approx(1 - 5 / 17)
    assert reduced["flops"]["forward"] < plain["flops"]["forward"]


# -------------------------------------------------------------------------------------------------------------- a task


class Views:
    """Samples of two pictures and a shade, as rows."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, row: int) -> Sample:
        pixels = np.random.default_rng(int(row)).random((2, 12))
        return Sample(f"{row:02d}", (pixels[0], pixels[1]), {"shade": 0.5 + row / 32}, "memory", int(row))


class ViewEncoding:
    def encode(self, sample: Sample) -> tuple[Tensor, ...]:
        return *(torch.tensor(picture) for picture in sample.images), torch.tensor(sample.fields["shade"])

    def collate(self, encoded: list) -> dict[str, Tensor]:
        return dict(zip(("first", "second", "shade"), map(torch.stack, zip(*encoded, strict=True)), strict=True))


class TwoViews(Task):
    """Two passes of the model, two losses, and a queue of what was seen before."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.seen = ranks, []
        self.queue = F.normalize(torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))

    def losses(self, model, batch, progress):
        first, second = (F.normalize(model(batch[name]), dim=-1) for name in ("first", "second"))
        self.seen.append(second.detach())
        alike = ((1 - (first * second).sum(dim=-1)) * batch["shade"]).mean()
        apart = (first @ self.queue.T).logsumexp(dim=-1).mean()
        return {"alike": alike, "apart": apart, "loss": alike + apart}

    def after_step(self, model, applied):
        seen, self.seen = self.ranks.gather(torch.cat(self.seen)), []
        if applied():
            self.queue = torch.cat([self.queue, *seen])[-16:]

    def state_dict(self):
        return {"queue": self.queue}

    def load_state_dict(self, state):
        self.queue = state["queue"]


def train_views(folder: str, name: str, ranks: Ranks, **changes) -> None:
    settings = {"logs": folder, "name": name, "epochs": 2, "lr": 0.1, "warmup": 2, "skip_scheduler": False, "wd": 0.2}
    options = run_options(TrainingOptions, **(settings | {"device": "cpu"} | changes))

    def build(options, ranks, resume):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        batches = 32 // (options.batch_size * ranks.world_size)
        source = RowSource(Views(), options.seed, options.batch_size)
        data = TrainData(
            source, ViewEncoding(), options, rank=ranks.rank, world_size=ranks.world_size, num_batches=batches,
            identity={}, plan=["views"],
        )  # fmt: skip
        return Parts(Identity("views", "two layers", {}, {}), model, TwoViews(ranks), data)

    run(options, ranks, build)


def state(folder: Path, name: str, file: str = "epoch_2.pt") -> dict:
    return torch.load(folder / name / "checkpoints" / file, weights_only=True)


def in_process(rank: int, folder: str) -> None:
    ranks = Ranks(CPU, rank, rank, 2)
    train_views(folder, "two", ranks, batch_size=4)
    train_views(folder, "two-accumulated", ranks, batch_size=2, accum_freq=2)


def tensors(folder: Path, name: str, file: str = "epoch_2.pt") -> dict[str, Tensor]:
    found = state(folder, name, file)
    # Processes and micro-batches fill the queue in another order.
    return {**found["state_dict"], "queue": found["task"]["queue"].sort(dim=0).values}


def test_a_task_trains_alike_in_processes_and_under_accumulation(tmp_path):
    train_views(str(tmp_path), "one", Ranks(CPU))
    train_views(str(tmp_path), "accumulated", Ranks(CPU), batch_size=4, accum_freq=2)
    spawn(in_process, str(tmp_path))
    expected = tensors(tmp_path, "one")
    assert not torch.equal(expected["0.weight"], tensors(tmp_path, "one", "epoch_1.pt")["0.weight"])
    for name in ("accumulated", "two", "two-accumulated"):
        for key, value in tensors(tmp_path, name).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-12, msg=f"{name}: {key}")
    with (tmp_path / "one" / "train.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["loss"]) == pytest.approx(float(row["alike"]) + float(row["apart"]), rel=1e-6)


def test_a_task_resumes_bit_for_bit(tmp_path):
    train_views(str(tmp_path), "whole", Ranks(CPU), save_every_n_steps=3)
    for step in (3, 6):  # in the middle of the first and of the second epoch
        start = tmp_path / "whole" / "checkpoints" / f"step_{step}.pt"
        train_views(str(tmp_path), f"from-{step}", Ranks(CPU), resume=str(start))
        whole, resumed = state(tmp_path, "whole"), state(tmp_path, f"from-{step}")
        runs.assert_equal_weights(whole["state_dict"], resumed["state_dict"])
        assert torch.equal(whole["task"]["queue"], resumed["task"]["queue"])


def test_a_task_state_with_a_nan_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(TwoViews, "state_dict", lambda self: {"queue": self.queue * torch.nan})
    train_views(str(tmp_path), "bad", Ranks(CPU), epochs=1)
    assert "epoch_1.pt was not written: task.queue is not finite" in (tmp_path / "bad" / "out.log").read_text()
    assert not list((tmp_path / "bad" / "checkpoints").glob("*.pt"))


# ---------------------------------------------------------------------------------------------------------- a data set


@pytest.fixture
def stripes():
    @data_set("stripes")
    def load_stripes(folder: Path, split: str) -> LabelledImages:
        paths = sorted(path.name for path in folder.glob(f"{split}-*.png"))
        labels = torch.tensor([int(path.split("-")[1]) for path in paths], dtype=torch.int64)
        return LabelledImages(ImageFiles(folder, paths), labels, ["across", "down"], split=split)

    yield
    del SETS["stripes"]


def test_a_data_set_is_one_reader(stripes, tmp_path):
    for number in range(24):
        across, split = number % 2, "train" if number < 16 else "test"
        pixels = np.zeros((32, 32), dtype=np.uint8)
        pixels[:: 2 + number % 3] = 255
        image = Image.fromarray(pixels.T if across else pixels)
        image.save(tmp_path / f"{split}-{across}-{number:02d}.png")
    model = tmp_path / "model"
    model.mkdir()
    runs.write_local_model(model)
    words = ["--model", f"local-dir:{model}", "--data", f"stripes={tmp_path}", "--device", "cpu", "--precision", "fp32"]
    words += ["--workers", "0", "--results", str(tmp_path / "results")]
    assert zero_shot.main(words) == 0
    assert linear_probe.main([*words, "--regularisation", "1"]) == 0
    records = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")]
    found = {record["command"]: record for record in records}
    assert found["zero_shot"]["data"] == "stripes" and found["zero_shot"]["metrics"]["num_samples"] == 8
    assert found["linear_probe"]["metrics"]["top1"] > 0.9
