"""Images per second and core: this loader against that of `open_clip_train`, on the same shards.

    python benchmarks/data_loading.py                      # 3 minutes or so
    python benchmarks/data_loading.py --quick              # half a minute, for a first look
    python benchmarks/data_loading.py --json FILE --markdown FILE

Both read webdataset shards of made-up photographs, decode, augment as OpenCLIP does by default (a random crop of 90 to
100 % of the area, bicubic to 224 px), tokenize the captions and make batches. One thread on one core does all of it, in
this process; counted is its processor time, which other programs on the machine disturb least. Loaders take turns, an
epoch each, after one epoch to warm up. The ratio is that of two epochs of one round, the figure the median over rounds.

`open_clip_train` gives normalised floats; this loader gives pixels that are normalised on the device, which on a GPU
takes next to no time. The row "fast + normalise" does that on the CPU too, and counts it; "fast (Pillow)" is without
simplejpeg, which is optional.

`open_clip_train` 3.3 raises KeyError 'fname' with webdataset 0.2.90 and later, whose tar reader puts an empty dict
behind each shard. Its own reader is used here, told not to; all else is its pipeline as it is.
"""
from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import open_clip
import open_clip_train.data as open_clip_data
import torch
from open_clip.transform import image_transform
from photographs import QUALITY, jpeg, photograph
from webdataset.tariterators import tar_file_expander

from open_clip_elip.profile.report import describe_machine, machine
from training.data import build_train_data, images
from training.data.pixels import FAST, PLAIN, REDUCED, to_device
from training.data.samples import PairEncoding
from training.data.transforms import with_decoding

CROP = 224
BATCH = 64
SHARDS = 4
DISTINCT = 64  # pictures that differ; shards repeat them
SCALES = {"default": (0.9, 1.0), "strong": (0.08, 1.0)}
THEIRS, PILLOW, NORMALISED = "open_clip_train", "fast (Pillow)", "fast + normalise"
IMAGES = {256: 384, 512: 256, 1024: 128}  # in an epoch
WORDS = "a an the small large red old dog street tree window boat two people standing on near with of in".split()
PACKAGES = ("torchvision", "webdataset", "pillow", "simplejpeg", "numpy")

Epoch = Callable[[int], int]  # number of the epoch -> how many images it had


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(IMAGES), metavar="PX", help="longer sides")
    parser.add_argument("--rounds", type=int, help="epochs of each loader (default: 7, quick: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    rounds = args.rounds or (3 if args.quick else 7)

    report = {"benchmark": "data_loading", "machine": machine(torch.device("cpu")), "versions": versions()}
    report |= {"settings": settings(rounds), "results": []}
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    with one_core(), tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            count = IMAGES.get(size, 256) // (4 if args.quick else 1) // BATCH * BATCH or BATCH
            pattern, mean_bytes = write_shards(Path(folder, str(size)), size, count)
            for name, scale in SCALES.items():
                if args.quick and name != "default":
                    continue
                result = compare(loaders(pattern, count, scale, tokenizer), rounds)
                result = {"long_side": size, "augmentation": name, "scale": scale, "images": count,
                          "mean_bytes": mean_bytes, **result}  # fmt: skip
                report["results"].append(result)
                print(table([result], headings=len(report["results"]) == 1), flush=True)
    print("\n" + footer(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(f"# Data loading\n\n{table(report['results'])}\n\n{footer(report)}\n")
    return 0


# ---------------------------------------------------------------------- data


def write_shards(folder: Path, long_side: int, count: int) -> tuple[str, int]:
    """Shards of `count` pairs in all. Returns: their pattern, and the mean size of a JPEG in bytes."""
    folder.mkdir()
    rng = random.Random(0)
    pictures = [jpeg(photograph(seed, long_side)) for seed in range(min(DISTINCT, count))]
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, count, SHARDS):
                caption = " ".join(rng.choices(WORDS, k=rng.randint(9, 15)))
                for extension, data in (("jpg", pictures[number % len(pictures)]), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return f"{folder}/{{{0:05d}..{SHARDS - 1:05d}}}.tar", round(statistics.mean(map(len, pictures)))


# ---------------------------------------------------------------------- loaders


def loaders(pattern: str, count: int, scale: tuple[float, float], tokenizer: Callable) -> dict[str, Epoch]:
    transform = image_transform(CROP, is_train=True, aug_cfg={"scale": scale})
    args = argparse.Namespace(
        train_data=pattern, train_num_samples=count, train_data_upsampling_factors=None, dataset_type="webdataset",
        dataset_resampled=False, batch_size=BATCH, workers=0, seed=0, world_size=1, stall_seconds=0,
        shard_img_key=None, shard_caption_key="txt",
    )  # fmt: skip
    made = {THEIRS: theirs(args, transform, tokenizer)}
    for decoding in (PLAIN, FAST, REDUCED):
        made[decoding] = ours(args, transform, tokenizer, decoding)
    if images.simplejpeg is not None:
        made[PILLOW] = with_pillow(made[FAST])
    made[NORMALISED] = ours(args, transform, tokenizer, FAST, normalise=True)
    return made


def with_pillow(epoch: Epoch) -> Epoch:
    def changed(number: int) -> int:
        kept, images.simplejpeg = images.simplejpeg, None
        try:
            return epoch(number)
        finally:
            images.simplejpeg = kept

    return changed


def ours(
    args: argparse.Namespace, transform: Callable, tokenizer: Callable, decoding: str, normalise: bool = False
) -> Epoch:
    args = argparse.Namespace(**vars(args), image_decode=decoding)
    data = build_train_data(args, PairEncoding(with_decoding(transform, decoding), tokenizer), rank=0, world_size=1)

    def epoch(number: int) -> int:
        count = 0
        for batch in data.epoch(number):
            count += len(batch["key"])
            if normalise:
                to_device(batch["image"], torch.device("cpu"))
        return count

    return epoch


def theirs(args: argparse.Namespace, transform: Callable, tokenizer: Callable) -> Epoch:
    open_clip_data.tar_file_expander = partial(tar_file_expander, eof_value=None)
    info = open_clip_data.get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer)

    def epoch(number: int) -> int:
        info.set_epoch(number)
        return sum(len(batch) for batch, _ in info.dataloader)

    return epoch


# ---------------------------------------------------------------------- measuring


@contextmanager
def one_core() -> Iterator[None]:
    """One thread on one core (where the system lets a process choose)."""
    threads, chooses = torch.get_num_threads(), hasattr(os, "sched_setaffinity")
    cores = os.sched_getaffinity(0) if chooses else set()
    torch.set_num_threads(1)
    if chooses:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if chooses:
            os.sched_setaffinity(0, cores)


def compare(epochs: dict[str, Epoch], rounds: int) -> dict:
    """Images per second of each loader, and their ratios to `THEIRS`: medians and all rounds."""
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    names = list(epochs)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin = time.process_time()
            count = epochs[name](number)
            if number:  # the first one warms up
                rates[name].append(count / (time.process_time() - begin))
    ratios = {
        name: [mine / other for mine, other in zip(values, rates[THEIRS], strict=True)]
        for name, values in rates.items()
        if name != THEIRS
    }
    return {"images_per_second": _summary(rates), "ratio": _summary(ratios)}


def _summary(rounds: dict[str, list[float]]) -> dict[str, dict]:
    return {
        name: {"median": round(statistics.median(values), 3), "rounds": [round(value, 3) for value in values]}
        for name, values in rounds.items()
    }


# ---------------------------------------------------------------------- telling


def versions() -> dict[str, str | None]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def settings(rounds: int) -> dict:
    return {
        "crop": CROP, "batch_size": BATCH, "workers": 0, "threads": 1, "rounds": rounds, "jpeg_quality": QUALITY,
        "clock": "processor time of the process",
    }  # fmt: skip


def table(results: list[dict], headings: bool = True) -> str:
    lines = []
    if headings:
        lines += [
            "| JPEG | crop | loader | images/s per core | ratio to open_clip_train (lowest to highest) |",
            "|---|---|---|--:|--:|",
        ]
    for result in results:
        kind = f"{result['long_side']} px, {result['mean_bytes'] / 1000:.0f} kB"
        crop = "{:g} to {:g}".format(*result["scale"])
        for name, rate in result["images_per_second"].items():
            shown, ratio = "1", result["ratio"].get(name)
            if ratio is not None:
                shown = f"{ratio['median']:.2f} ({min(ratio['rounds']):.2f} to {max(ratio['rounds']):.2f})"
            lines.append(f"| {kind} | {crop} | {name} | {rate['median']:,.0f} | {shown} |")
    return "\n".join(lines)


def footer(report: dict) -> str:
    chosen = report["settings"]
    packages = ", ".join(f"{name} {number or 'not installed'}" for name, number in report["versions"].items())
    return (
        f"One thread on one core of: {describe_machine(report['machine'])}.\n"
        f"Medians of {chosen['rounds']} rounds in which the loaders take turns, by processor time, in process.\n"
        f"Batches of {chosen['batch_size']}, crops of {chosen['crop']} px (\"crop\" is their share of the area), JPEG "
        f"quality {chosen['jpeg_quality']}, 0 workers.\n{packages}."
    )


if __name__ == "__main__":
    sys.exit(main())
