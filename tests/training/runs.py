"""Small runs of the trainer on files: a tiny model, shards of noise pictures, and the command line."""
from __future__ import annotations

import csv
import json
import os
import signal
from contextlib import contextmanager

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from training.trainer import Trainer

from .data.sets import layout_files

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 6, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    "token_reduction": {"method": "elip"},
}
WORDS = "red green blue gray dark light round square".split()


def register_models(folder):
    """Makes `Tiny-ELIP` and `Tiny` known to open_clip; returns a folder for `local-dir:`, for other processes."""
    (folder / "Tiny-ELIP.json").write_text(json.dumps(MODEL))
    (folder / "Tiny.json").write_text(json.dumps({k: v for k, v in MODEL.items() if k != "token_reduction"}))
    open_clip.add_model_config(folder)
    return write_model(folder / "local", MODEL)


def write_model(folder, config, weights=None):
    """A folder for `local-dir:`."""
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    if weights is not None:
        torch.save(weights, folder / "open_clip_pytorch_model.bin")
    return folder


def write_local_model(folder):
    """Configuration and weights of a tiny ELIP model."""
    torch.manual_seed(0)
    plain = {k: v for k, v in MODEL.items() if k != "token_reduction"}
    return write_model(folder, MODEL, open_clip.CLIP(**plain).state_dict())


def picture(index: int) -> bytes:
    pixels = np.random.default_rng(index).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return layout_files.encode(Image.fromarray(pixels).resize((40, 40)), "PNG")


def write_shards(folder, shards=2, samples=16, broken=()):
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for shard in range(shards):
        members = {}
        for index in range(shard * samples, (shard + 1) * samples):
            members[f"{index:06d}.png"] = b"no picture" if index in broken else picture(index)
            members[f"{index:06d}.txt"] = f"a {WORDS[index % 8]} {WORDS[index // 8 % 8]} thing"
        path = layout_files.write_shard(folder / f"{shard:05d}.tar", members)
        sizes[path.name] = samples
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def command(shards, logs, *more, name="run", model="Tiny-ELIP"):
    return [
        "--train-data", shards, "--dataset-type", "webdataset", "--batch-size", "8", "--workers", "1", "--warmup", "2",
        "--epochs", "2", "--model", model, "--precision", "fp32", "--device", "cpu", "--log-every-n-steps", "1",
        "--logs", str(logs), "--name", name, "--no-progress", *more,
    ]  # fmt: skip


@contextmanager
def interrupted(step):
    """A SIGTERM arrives during optimizer step `step`, counted from 1."""
    original = Trainer.step

    def step_and_signal(self, window):
        if self.steps + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step_and_signal)
        yield


def rows(run):
    with (run / "train.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run):
    return [(row["step"], row["loss"], row["lr"]) for row in rows(run)]


def evaluations(run):
    return [json.loads(line) for line in (run / "checkpoints" / "results.jsonl").read_text().splitlines()]


def records(folder):
    """The results of a command that evaluates."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def assert_equal_weights(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)
