"""Small runs of the trainer on files: a tiny model, shards of noise pictures, and the command line."""
from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import open_clip
import torch
from PIL import Image

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
    local = folder / "local"
    local.mkdir()
    (local / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    return local


def write_local_model(folder):
    """A folder for `local-dir:`: configuration and weights of a tiny ELIP model."""
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    torch.manual_seed(0)
    plain = {k: v for k, v in MODEL.items() if k != "token_reduction"}
    torch.save(open_clip.CLIP(**plain).state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def picture(index: int) -> bytes:
    pixels = np.random.default_rng(index).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((40, 40)).save(file, "PNG")
    return file.getvalue()


def write_shards(folder, shards=2, samples=16, broken=()):
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for shard in range(shards):
        name = f"{shard:05d}.tar"
        with tarfile.open(folder / name, "w") as tar:
            for i in range(samples):
                index = shard * samples + i
                image = b"no picture" if index in broken else picture(index)
                caption = f"a {WORDS[index % 8]} {WORDS[index // 8 % 8]} thing".encode()
                for extension, data in (("png", image), ("txt", caption)):
                    info = tarfile.TarInfo(f"{index:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        sizes[name] = samples
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def command(shards, logs, *more, name="run", model="Tiny-ELIP"):
    return [
        "--train-data", shards, "--dataset-type", "webdataset", "--batch-size", "8", "--workers", "1", "--warmup", "2",
        "--epochs", "2", "--model", model, "--precision", "fp32", "--device", "cpu", "--log-every-n-steps", "1",
        "--logs", str(logs), "--name", name, "--no-progress", *more,
    ]  # fmt: skip


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
