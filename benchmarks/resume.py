"""Seconds and bytes until a resumed run has its next batch, at 0, 50 and 90 % of an epoch.

    python benchmarks/resume.py                       # 1,000,000 samples in 100 shards: 2.6 GB, half an hour or so
    python benchmarks/resume.py --samples 50000 --folder /data/scratch

The shards hold tiny pictures, so that the number of samples counts and not their size; the page cache is warm. One
reader (`--workers 0`) has the whole epoch, which is the longest way. Counted is what this process waits from the saved
position to its next batch, of it the processor's time, which other programs disturb least, and all that it reads
meanwhile; "by reading on" is the same without the saved place, as checkpoints of old go on. Both must give the batch
that the undisturbed run has there.
"""
from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import image_transform
from photographs import jpeg, photograph

from open_clip_elip.profile.report import Rows, machine, markdown_table, save, text_table
from training.data import TrainData, build_train_data
from training.data.samples import PairEncoding

SIDE, DISTINCT, SHARES = 24, 64, (0.0, 0.5, 0.9)


class Nothing:
    """An encoding that leaves the pictures alone: for the way to the position."""

    def encode(self, sample: Any) -> None:
        return None

    def collate(self, encoded: list[None]) -> dict[str, Any]:
        return {}


def write_shards(folder: Path, samples: int, shards: int) -> str:
    pictures = [jpeg(photograph(number, SIDE)) for number in range(DISTINCT)]
    sizes = {f"{shard:05d}.tar": len(range(shard, samples, shards)) for shard in range(shards)}
    for name, count in sizes.items():
        with open(folder / name, "wb") as file:
            for number in range(count):
                key = f"{name[:5]}{number:06d}"
                for ending, content in (("jpg", pictures[number % DISTINCT]), ("txt", f"picture {key}".encode())):
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(content)
                    file.write(info.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE))
            file.write(bytes(2 * tarfile.BLOCKSIZE))
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def build(pattern: str, batch_size: int, encoding: Any) -> TrainData:
    options = Namespace(
        train_data=pattern, dataset_type="webdataset", train_num_samples=None, dataset_resampled=False,
        train_data_upsampling_factors=None, shard_img_key=None, shard_caption_key="txt", workers=0,
        batch_size=batch_size, seed=0, stall_seconds=0, image_decode="fast",
    )  # fmt: skip
    return build_train_data(options, encoding, rank=0, world_size=1)


def bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def resume(pattern: str, batch_size: int, state: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Cells of the table, and keys of the next batch."""
    transform = image_transform(224, is_train=True, mean=None, std=None)
    data = build(pattern, batch_size, PairEncoding(transform, open_clip.get_tokenizer("ViT-B-32")))
    begun, busy, before = time.perf_counter(), time.process_time(), bytes_read()
    data.load_state_dict(state)
    batch = next(data.epoch(0))
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    return [f"{seconds:.1f}", f"{busy:.1f}", f"{(bytes_read() - before) / 1e6:,.0f}"], batch["key"]


def size(state: dict[str, Any]) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()


def measure(pattern: str, batch_size: int, reading_on: bool) -> tuple[Rows, int]:
    data = build(pattern, batch_size, Nothing())
    states, following = {round(share * data.num_batches): None for share in SHARES}, {}
    for number, batch in enumerate(data.epoch(0), start=1):  # `data` stands behind this batch
        if number - 1 in states:
            following[number - 1] = batch["key"]
        if number in states:
            states[number] = data.state_dict()
        if number > max(states):
            break
    states[0] = build(pattern, batch_size, Nothing()).state_dict()
    columns = ("seconds", "of the processor", "MB read")
    rows: Rows = [("passed", *columns, *(f"{column}, by reading on" for column in columns))]
    for share, (number, state) in zip(SHARES, states.items(), strict=True):
        cells = []
        for old in (False, True)[: 1 + reading_on]:
            found, keys = resume(pattern, batch_size, state | {"places": []} if old else state)
            if keys != following[number]:
                raise SystemExit(f"The batch after {number} is not the one that the undisturbed run has there.")
            cells += found
        rows.append((f"{share:.0%}", *cells, *["not measured"] * (6 - len(cells))))
    last = list(states.values())[-1]
    return rows, size(last) - size(last | {"places": []})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--shards", type=int, default=100, metavar="N")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N")
    parser.add_argument("--no-reading-on", action="store_true", help="leave out what takes most of the time")
    parser.add_argument("--folder", type=Path, help="for the shards (default: that of temporary files)")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        pattern = write_shards(Path(folder), args.samples, args.shards)
        total = sum(path.stat().st_size for path in Path(folder).glob("*.tar"))
        rows, growth = measure(pattern, args.batch_size, not args.no_reading_on)
    text = (
        f"{args.samples:,} samples in {args.shards:,} shards of {total / args.shards / 1e6:,.1f} MB, one reader, "
        f"batches of {args.batch_size:,}, to the first batch after a resume.\n"
        f"A checkpoint grows by {growth / 1e3:,.0f} kB a worker.\n{machine(torch.device('cpu'))['device']}."
    )
    print(f"{text}\n\n{text_table(rows)}")
    if args.markdown is not None:
        paragraph = text.replace("\n", "  \n")
        save(args.markdown, f"# Resume\n\n{paragraph}\n\n{markdown_table(rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
