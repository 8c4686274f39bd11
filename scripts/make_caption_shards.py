"""Turn a retrieval set with several captions an image into pairs for training.main: a CSV table or webdataset shards.

    python scripts/make_caption_shards.py --data coco=data/coco --out data/coco/retrieval_train.csv
    python scripts/make_caption_shards.py --data coco=data/coco --split val --captions-per-image 1 \
        --out data/coco/retrieval_val.csv
    python scripts/make_caption_shards.py --data flickr30k=data/flickr30k --out data/flickr30k/shards --image-size 256

--data is what training.retrieval takes. Without --split it is the training split, with "restval" where there is one
(Karpathy's split of COCO). A table names the pictures where they are: nothing is copied, and nothing else is needed if
they are on a fast disk. Shards hold a copy of the picture for each of its captions, in an order that is shuffled over
the whole set, so that the captions of a picture are far apart; --image-size makes the pictures smaller first.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import os
import random
import shutil
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # for where the package is not installed

from training.data.images import load_rgb  # noqa: E402
from training.data.sets.captioned import CaptionedImages, CaptionOptions, NoSuchSplit, load_captions  # noqa: E402
from training.data.sets.labelled import ImageFiles, TarImages  # noqa: E402
from training.data.shards import IMAGE_KEYS  # noqa: E402
from training.errors import EXIT_USER_ERROR, UserError  # noqa: E402

JPEG_QUALITY = 95


def load_training_captions(spec: str, options: CaptionOptions) -> CaptionedImages:
    """The split asked for; without one, all that is there to train on, or the whole of data that is not divided."""
    if options.split is not None:
        return load_captions(spec, options)
    try:
        return load_captions(spec, replace(options, split="train+restval"))
    except NoSuchSplit as error:
        return load_captions(spec, replace(options, split="train") if error.there else options)


def write_table(out: Path, data: CaptionedImages) -> None:
    """One row a caption, tabs between `filepath` and `title`; pictures below the table's folder by relative path."""
    if not isinstance(data.images, ImageFiles):
        raise UserError("The pictures are in other files, which a table cannot name; give --out a folder for shards.")
    folder = os.path.abspath(out.parent)
    paths = [os.path.abspath(data.images.name(i)) for i in range(len(data))]
    paths = [os.path.relpath(path, folder) if path.startswith(folder + os.sep) else path for path in paths]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, delimiter="\t", lineterminator="\n")
            table.writerow(["filepath", "title"])
            for image, caption in zip(data.image_of.tolist(), data.captions, strict=True):
                table.writerow([paths[image], caption])
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)


def write_shards(
    out: Path, data: CaptionedImages, *, shard_size: int, image_size: int | None, seed: int, workers: int
) -> list[str]:
    """Shards of `shard_size` pairs and their sizes.json; the same input makes the same bytes.

    image_size: make the shorter side of larger pictures this many pixels; None copies them as they are.

    Returns: the pictures that cannot be read, whose captions are left out.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already: move it away or choose another --out.")
    order = list(range(len(data.captions)))
    random.Random(seed).shuffle(order)
    parts = [order[start : start + shard_size] for start in range(0, len(order), shard_size)]
    # Built beside its place, then renamed: an interrupted run leaves nothing that looks like a finished folder.
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir()
    names = [f"{number:05d}.tar" for number in range(len(parts))]
    sizes, broken = {}, set()
    write = functools.partial(_write_shard, data=data, image_size=image_size)
    pool = ProcessPoolExecutor(workers) if workers > 1 else None
    try:
        written = (pool.map if pool else map)(write, [partial / name for name in names], parts)
        bar = tqdm(written, total=len(names), desc="writing", unit="shard", disable=None)
        for name, (size, unreadable) in zip(names, bar, strict=True):
            sizes[name] = size
            broken.update(unreadable)
        (partial / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(broken)


def _write_shard(
    path: Path, captions: Sequence[int], data: CaptionedImages, image_size: int | None
) -> tuple[int, list[str]]:
    """The number of pairs written, and the pictures that cannot be read."""
    size, broken = 0, []
    with tarfile.open(path, "w") as tar:
        for caption in captions:
            image = int(data.image_of[caption])
            try:
                extension, content = _picture(data, image, image_size)
            except Exception:  # broken files make PIL raise almost anything, from OSError to SyntaxError
                broken.append(data.images.name(image))
                continue
            key = f"{caption:08d}"
            _add(tar, f"{key}.{extension}", content)
            _add(tar, f"{key}.txt", data.captions[caption].encode())
            size += 1
    return size, broken


def _picture(data: CaptionedImages, image: int, size: int | None) -> tuple[str, bytes]:
    """Kind and bytes of a picture, no larger than asked for."""
    if isinstance(data.images, TarImages):
        name = str(data.images.names[image])
        tar, offset, length = data.images.places[image].tolist()
        with data.images.tars[tar].open("rb") as file:
            file.seek(offset)
            content = file.read(length)
    else:
        name = data.images.name(image)
        content = Path(name).read_bytes()
    extension = name.rpartition(".")[2].lower()
    picture = load_rgb(content)  # also where it is only copied: a broken one is no training pair
    if size is not None and min(picture.size) > size:
        scale = size / min(picture.size)
        picture = picture.resize([max(size, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
    elif extension in IMAGE_KEYS:
        return extension, content
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return "jpg", file.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner 0 and time 0: nothing of this machine gets in
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="[NAME=]PATH", help="the set, as training.retrieval takes it")
    parser.add_argument("--out", type=Path, required=True, help="a table (.csv, .tsv), or a folder for shards")
    parser.add_argument("--split", help="instead of all for training: train, train+restval, val, ...")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the pictures, if not beside the captions")
    parser.add_argument("--captions-per-image", type=int, metavar="N", help="no more than the first N of each image")
    parser.add_argument("--txt-captions", choices=["lines", "whole"], help="what a .txt in shards is")
    parser.add_argument("--image-size", type=int, metavar="N", help="shards: pixels of the shorter side, at most")
    parser.add_argument("--shard-size", type=int, default=10_000, metavar="N", help="pairs in a shard")
    parser.add_argument("--seed", type=int, default=0, help="of the order in shards")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that write shards")
    args = parser.parse_args(argv)
    try:
        for flag in ("captions_per_image", "image_size", "shard_size", "workers"):
            if getattr(args, flag) is not None and getattr(args, flag) < 1:
                raise UserError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(args, flag)}.")
        options = CaptionOptions(
            split=args.split, images=args.images, per_image=args.captions_per_image, txt=args.txt_captions
        )
        data = load_training_captions(args.data, options)
        broken = []
        if args.out.suffix.lower() in (".csv", ".tsv"):
            write_table(args.out, data)
        else:
            broken = write_shards(
                args.out, data, shard_size=args.shard_size, image_size=args.image_size, seed=args.seed,
                workers=args.workers,
            )  # fmt: skip
    except UserError as error:
        print(f"make_caption_shards.py: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"wrote {args.out}: {len(data.captions):,} captions of {len(data):,} images ({data.name}, {data.split})")
    if broken:
        print(f"without those of {len(broken)} images that cannot be read, the first of them {broken[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
