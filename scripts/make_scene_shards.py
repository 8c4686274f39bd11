"""Make webdataset shards of scenes: four OpenMoji pictures in one, in any order, and a caption that names them.

    python scripts/make_scene_shards.py --out data/openmoji-scenes-32 --size 32
    python scripts/make_scene_shards.py --out data/openmoji-scenes-32 --size 32 --preview preview.png

Pictures and names come from installed Python packages (`pip install '.[quickstart]'`); nothing is downloaded here.
The folder that is written:

    train/00000.tar ...     <number>.png, <number>.txt, such as "a telephone, a turtle, a pen and a lotus"
    train/sizes.json        pictures in each shard
    val/...                 the same
    dataset.json            settings and counts; written last, so its presence says that the folder is complete

The held-out part has the things of the training part, and no four of them together that training has. Of one thing a
feature of the picture as a whole says all; of several, who looks at the picture again for each word sees more.
"""
from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import emoji_data
from emoji_data import Emoji, Sample, UserError, write_shards
from make_emoji_shards import find_pictures, origin, render
from PIL import Image

RECIPE = 1  # part of the settings: a change rebuilds existing folders
THINGS = 4  # in a picture
GROUPS = {"Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects"}


def find_things(count: int, seed: int) -> list[tuple[Emoji, Path]]:
    """So many of the emoji that are things and have a name of one word, drawn."""
    found = [(one, svg) for one, svg in find_pictures() if one.group in GROUPS and one.name.isalpha()]
    found = [(one, svg) for one, svg in found if one.name.islower()]
    if not THINGS < count <= len(found):
        raise UserError(f"--limit must be between {THINGS + 1} and {len(found)}, as there are, not {count}")
    random.Random(seed).shuffle(found)
    return found[:count]


def compose(tiles: Sequence[Image.Image], size: int) -> Image.Image:
    """Four pictures in a square of `size` pixels."""
    scene, half = Image.new("RGB", (size, size), "white"), size // 2
    for tile, place in zip(tiles, itertools.product((0, half), repeat=2), strict=True):
        scene.paste(tile, place)
    return scene


def build(
    out: Path, size: int, shard_size: int, holdout: float, seed: int, limit: int, scenes: int,
    preview: Path | None = None,
) -> tuple[dict, bool]:  # fmt: skip
    """Make the folder `out`; see `emoji_data.make_folder`."""

    def make() -> tuple[list[Sample], int]:
        things = find_things(limit, seed)
        tiles, draw = [render(svg, size // 2) for _, svg in things], random.Random(seed)
        fours = list(itertools.combinations(range(limit), THINGS))
        if scenes > len(fours):
            raise UserError(f"--scenes must be at most {len(fours)}, the fours of {limit} things, not {scenes}")
        samples = []
        for number, four in enumerate(draw.sample(fours, scenes)):
            named, placed = (draw.sample(four, THINGS) for _ in range(2))
            *first, last = (things[i][0].phrase for i in named)
            texts = {"txt": f"{', '.join(first)} and {last}"}
            image = compose([tiles[i] for i in placed], size)
            samples.append(Sample(f"{number:06d}", things[named[0]][0], image, texts, ""))
        return samples, 0

    def fill(folder: Path, samples: list[Sample], dropped: int) -> dict:
        held = round(holdout * len(samples))
        if not 0 < held < len(samples):
            raise UserError(f"--holdout {holdout} leaves one part empty: take another, or more --scenes")
        parts = {"val": samples[:held], "train": samples[held:]}
        counts = {name: len(part) for name, part in parts.items()}
        for name, part in parts.items():
            counts[f"{name}_shards"] = write_shards(folder / name, part, shard_size, seed)
        return {"counts": counts, **origin()}

    settings = dict(recipe=RECIPE, size=size, shard_size=shard_size, holdout=holdout, seed=seed, limit=limit,
                    scenes=scenes)  # fmt: skip
    return emoji_data.make_folder(out, settings, preview, make, fill)


def told(dataset: dict) -> str:
    counts, size = dataset["counts"], dataset["settings"]["size"]
    return f"{counts['train']} training pictures, {counts['val']} held out, {size} px"


def main(argv: Sequence[str] | None = None) -> int:
    parser = emoji_data.parser_of(__doc__, holdout=0.333)
    parser.add_argument("--scenes", type=int, default=12000, help="pictures to make (default: %(default)s)")
    parser.set_defaults(limit=30)
    return emoji_data.run(parser, argv, build, told)


if __name__ == "__main__":
    sys.exit(main())
