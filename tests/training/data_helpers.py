"""Tiny shards and tables, and stand-ins for the transform and the tokenizer."""

import argparse
import json
import random
import tarfile
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from training.data import TrainData, ValData, build_train_data, build_val_data
from training.data.samples import PairEncoding

from .data.sets import layout_files

BROKEN_IMAGE = b"\xff\xd8 this was a picture once"


def encode(number: int, format: str = "jpeg") -> bytes:
    pixels = numpy.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=numpy.uint8)
    return layout_files.encode(Image.fromarray(pixels), format)


def sample(number: int) -> dict[str, bytes]:
    return {"jpg": encode(number), "txt": f"caption {number}".encode()}


def write_shard(path: Path, samples: dict[str, dict[str, bytes]] | list[tuple[str, dict[str, bytes]]]) -> Path:
    """samples: key -> extension -> content, or pairs of these, for a key that comes again"""
    pairs = samples.items() if isinstance(samples, dict) else samples
    members = [(f"{key}.{ending}", content) for key, files in pairs for ending, content in files.items()]
    return layout_files.write_shard(path, members)


def key_of(shard: int, number: int) -> str:
    return f"{shard:02d}-{number:02d}"


def write_shards(folder: Path, sizes: list[int], first: int = 0, info: bool = True) -> str:
    """Shards of `sizes` good samples, with a sizes.json unless `info` is off. Returns: their pattern."""
    for shard, size in enumerate(sizes, start=first):
        samples = {key_of(shard, n): sample(100 * shard + n) for n in range(size)}
        write_shard(folder / f"{shard:05d}.tar", samples)
    if info:
        table = {f"{shard:05d}.tar": size for shard, size in enumerate(sizes, start=first)}
        (folder / "sizes.json").write_text(json.dumps(table))
    return f"{folder}/{{{first:05d}..{first + len(sizes) - 1:05d}}}.tar"


# What there is to be skipped in the damaged shards.
DAMAGE = {"unreadable image": 2, "no caption": 1, "empty caption": 1, "no image": 1, "broken shard": 1}


def write_damaged_shards(folder: Path) -> str:
    """Six shards, in which everything that can be skipped occurs. The first one is as it should be."""
    write_shards(folder, [7] * 6)
    damage = {
        key_of(1, 2): {"jpg": BROKEN_IMAGE, "txt": b"broken"},
        key_of(1, 4): {"jpg": encode(1)},
        key_of(1, 5): {"jpg": encode(1), "txt": b" \n"},
        key_of(1, 6): {"json": b"{}", "txt": b"no picture"},
    }
    write_shard(folder / "00001.tar", {key_of(1, n): damage.get(key_of(1, n), sample(100 + n)) for n in range(7)})
    truncate(folder / "00003.tar", keep=4)
    write_shard(folder / "00004.tar", {key_of(4, 0): {"jpg": BROKEN_IMAGE, "txt": b"broken"}, key_of(4, 1): sample(1)})
    (folder / "sizes.json").write_text(json.dumps({f"{n:05d}.tar": 2 if n == 4 else 7 for n in range(6)}))
    return f"{folder}/{{00000..00005}}.tar"


def truncate(path: Path, keep: int, file_of_sample: str = "image", place: str = "data") -> None:
    """Break a shard off in the sample after the first `keep` ones: before, in the header, or in the data of a file."""
    with tarfile.open(path) as tar:
        member = tar.getmembers()[2 * keep + ["image", "caption"].index(file_of_sample)]
    with open(path, "r+b") as file:
        file.truncate({"before": member.offset, "header": member.offset + 100, "data": member.offset_data + 4}[place])


def write_csv(folder: Path, count: int, broken: tuple[int, ...] = ()) -> str:
    """A table of `count` pictures in `images/`, by paths relative to the table. Returns: its path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = ["filepath\ttitle"]
    for n in range(count):
        (folder / "images" / f"{n:03d}.png").write_bytes(BROKEN_IMAGE if n in broken else encode(n, "png"))
        lines.append(f"images/{n:03d}.png\tcaption {n}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return f"{folder}/table.csv"


class NoisyTransform:
    """To 4x4 pixels, plus noise from all three generators that real transforms draw from."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        assert image.mode == "RGB"
        pixels = torch.from_numpy(numpy.array(image.resize((4, 4)))).permute(2, 0, 1) / 255
        return pixels + torch.rand(3, 4, 4) + random.random() + float(numpy.random.rand())


class LetterTokenizer:
    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        return torch.tensor([list(text.encode()[:12].ljust(12)) for text in texts])


def data_args(**changes) -> argparse.Namespace:
    values = {
        "train_data": None, "val_data": None, "train_num_samples": None, "val_num_samples": None,
        "dataset_type": "auto", "dataset_resampled": False, "train_data_upsampling_factors": None,
        "shard_img_key": None, "shard_caption_key": "txt",
        "csv_separator": "\t", "csv_img_key": "filepath", "csv_caption_key": "title",
        "workers": 0, "batch_size": 4, "seed": 0, "stall_seconds": 60,
    }  # fmt: skip
    return argparse.Namespace(**(values | changes))


def train_data(train_data: str | None, rank: int = 0, world_size: int = 1, **flags) -> TrainData:
    args = data_args(train_data=train_data, **flags)
    return build_train_data(args, PairEncoding(NoisyTransform(), LetterTokenizer()), rank=rank, world_size=world_size)


def val_data(val_data: str, rank: int = 0, world_size: int = 1, **flags) -> ValData:
    args = data_args(val_data=val_data, **flags)
    return build_val_data(args, PairEncoding(NoisyTransform(), LetterTokenizer()), rank=rank, world_size=world_size)


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def assert_same_batches(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a["key"] == b["key"]
        assert torch.equal(a["text"], b["text"])
        assert torch.equal(a["image"].pixels, b["image"].pixels)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("It does not come to it.")
        time.sleep(0.002)
