"""A data set that a tiny model learns in seconds: noise in three colours, in class folders."""
from __future__ import annotations

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 50, 40)}


def write_colours(folder, train=24, test=9, broken=()):
    """`folder`/train and /test with a folder a colour and classnames.txt; `broken`: numbers of training files."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            name, colour = list(COLOURS.items())[i % 3]
            path = folder / split / name / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.array(colour) + generator.normal(0, 60, (40, 36, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
            if split == "train" and i in broken:
                path.write_bytes(b"no picture")
    (folder / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
    return folder


def finetune_command(data, logs, pretrained, *more, name="run", model="Tiny-ELIP"):
    return [
        "--data", str(data), "--model", model, "--pretrained", str(pretrained), "--batch-size", "6", "--workers", "0",
        "--epochs", "2", "--warmup", "1", "--lr", "3e-3", "--precision", "fp32", "--device", "cpu",
        "--log-every-n-steps", "1", "--logs", str(logs), "--results", str(logs / "results"), "--name", name,
        "--no-progress", *more,
    ]  # fmt: skip
