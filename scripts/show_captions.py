"""Prints written captions beside people's, of pictures in shards.

    python scripts/show_captions.py logs/quickstart_blip/captions.csv 'data/openmoji-64/val/{00000..00003}.tar'
"""
from __future__ import annotations

import argparse
import csv


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("captions", help="CSV file of training.caption")
    parser.add_argument("shards", help="braces allowed")
    parser.add_argument("--count", type=int, default=10, help="default: %(default)s")
    args = parser.parse_args(argv)
    from training.data.sets.captioned import load_captions  # and torch

    with open(args.captions, encoding="utf-8", newline="") as file:
        written = {row["image"]: row["caption"] for row in csv.DictReader(file)}
    data = load_captions(args.shards)
    step = max(1, len(data.captions) // args.count)
    for image, truth in list(zip(data.image_of.tolist(), data.captions, strict=True))[::step][: args.count]:
        print(f"{written.get(data.images.name(image), '(not written)')}\n    people: {truth}")


if __name__ == "__main__":
    main()
