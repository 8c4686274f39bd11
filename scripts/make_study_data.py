"""Make the pictures of the study (configs/study): emoji of two styles to train on, a third one to be evaluated on.

    python scripts/make_study_data.py --out data/study-64 --size 64
    python scripts/make_study_data.py --out data/study-64 --size 64 --packages DIR --preview preview.png

Pictures and words come from four npm packages of fixed versions. Their archives are taken from `--packages`, and what
is not there is put there by `npm pack`. The folder that is written:

    train/*.tar        Noto and Fluent: <style>-<code>.png, .txt (caption), .json (name, ...); skin tones only with
                       --skin-tones
    seen/*.tar         Twemoji, a style that is never trained on, of names that are: .cls is the line of the name in
                       seen/classnames.txt, templates.txt holds the prompts
    heldout/*.tar      Twemoji of names that no training picture has: the same, and with the captions for retrieval
    categories/train   Noto and Fluent pictures of the training part without skin tones, .cls is the line of the
                       subgroup in categories/classnames.txt (such as "animal mammal")
    categories/test    Twemoji of both parts, likewise
    */sizes.json       pictures in each shard
    dataset.json       settings, counts, sources and licences; written last: its presence says that all is there

The held-out names share no *stem* with the others ("man climbing" and "woman climbing" are both "climbing"), whatever
the style. Pictures whose pixels equal an earlier one's are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from make_emoji_shards import (
    EMOJI_PRESENTATION,
    MAX_HELD_OUT_TWINS,
    MIN_CLASS_SIZE,
    UserError,
    check_settings,
    phrase_of,
    read_finished,
    replaced_folder,
    stem_of,
    uniform,
    write_json,
    write_lines,
    write_samples,
)
from PIL import Image, ImageDraw, ImageFont

# Part of the settings: a change in captions, stems or split rebuilds existing folders.
RECIPE = 1

WORDS = "emojibase-data@17.0.0"
WORDS_LICENCE = "MIT"


@dataclass(frozen=True)
class Style:
    """Where the pictures of one style are. package: npm's NAME@VERSION. folder: in the package."""

    package: str
    folder: str
    suffix: str
    licence: str


STYLES = {
    "noto": Style("emoji-datasource-google@16.0.0", "img/google/64", ".png", "Apache-2.0 (Noto Emoji, Google)"),
    "fluent": Style("@lobehub/fluent-emoji-3d@1.1.0", "assets", ".webp", "MIT (Fluent Emoji, Microsoft)"),
    "twemoji": Style("emoji-datasource-twitter@16.0.0", "img/twitter/64", ".png", "CC-BY-4.0 (Twemoji, Twitter)"),
}
TRAINED_STYLES, TEST_STYLE = ("noto", "fluent"), "twemoji"

CAPTIONS = (
    "an emoji of {phrase}",
    "an emoji of {phrase}, {tags}",
    "a picture of {phrase}, {kind}",
    "{phrase}: {tags}",
    "{kind}: {phrase}, {tags}",
)
TEMPLATES = ("an emoji of {}", "a picture of {}")


@dataclass(frozen=True)
class Concept:
    """What an emoji shows, whatever its style.

    Attributes:
        code: code points in hexadecimal, joined by "-", without presentation selectors.
        name: such as "ferris wheel", "waving hand: light skin tone", and of flags the country.
        group, subgroup: such as "Travel & Places" and "place-other".
        tags: more words for it.
        stem: what it shares with its twins; a skin tone has its base's.
        base: it has no skin tone.
    """

    code: str
    name: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    stem: str
    base: bool

    @property
    def kind(self) -> str:
        return self.subgroup.replace("-", " ")

    @property
    def classname(self) -> str:
        return phrase_of(self) if self.subgroup in ("country-flag", "subdivision-flag") else self.name


@dataclass(frozen=True)
class Picture:
    style: str
    concept: Concept
    image: Image.Image  # RGB on white

    @property
    def key(self) -> str:
        return f"{self.style}-{self.concept.code}"


def caption_of(style: str, concept: Concept, seed: int) -> str:
    """The caption; its wording and its two tags are a function of (seed, code, style) alone."""
    wording = CAPTIONS[int(uniform(seed, "caption", concept.code, style) * len(CAPTIONS))]
    order = sorted(concept.tags, key=lambda tag: uniform(seed, "tag", concept.code, style, tag))
    tags = " ".join(order[:2]) or concept.kind
    return wording.format(phrase=phrase_of(concept), tags=tags, kind=concept.kind)


# ------------------------------------------------------------------------------------------------------------- packages


def archive_of(package: str, folder: Path) -> Path:
    """The archive of NAME@VERSION in `folder`, put there by `npm pack` if it is not there yet.

    Raises:
        UserError: it is not there, and npm is missing or fails.
    """
    name, _, version = package.rpartition("@")
    path = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", package, "--pack-destination", str(folder), "--silent"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError(f"{path} is not there: put it there, or install npm, which fetches it") from None
        if done.returncode or not path.is_file():
            reason = (done.stderr.strip().splitlines() or ["no archive was made"])[-1]
            raise UserError(f"npm pack {package} failed ({reason}): put the archive into {folder} by hand")
    return path


def read_members(archive: Path, folder: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(path in the package, content) of the files directly in `folder` that end with `suffix`, in the archive's order.

    Raises:
        UserError: the archive cannot be read, or has no such file.
    """
    count = 0
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                path = member.name.removeprefix("package/")
                if member.isfile() and path.rpartition("/")[0] == folder and path.endswith(suffix):
                    count += 1
                    yield path, tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive} is not a readable archive ({error}): delete it and run this again") from None
    if not count:
        raise UserError(f"{archive} has no {suffix} file in {folder}: it is not the package that it is called after")


def plain_code(code: str) -> str:
    """One form for all packages: capitals, at least four digits a code point, "-" between, no presentation selectors.

    >>> plain_code("23-fe0f-20e3"), plain_code("1f3f4-e0067_e007f")
    ('0023-20E3', '1F3F4-E0067-E007F')
    """
    parts = (part.zfill(4) for part in code.upper().replace("_", "-").split("-"))
    return "-".join(part for part in parts if part != EMOJI_PRESENTATION)


def read_concepts(archive: Path) -> dict[str, Concept]:
    """All emoji with a group, skin tones included, by code, in Unicode's order.

    Raises:
        UserError: the archive is not emojibase's.
    """
    try:
        emoji = json.loads(dict(read_members(archive, "en", "/data.json"))["en/data.json"])
        meta = json.loads(dict(read_members(archive, "meta", "/groups.json"))["meta/groups.json"])
        concepts = {}
        for entry in sorted((entry for entry in emoji if "group" in entry), key=lambda entry: entry["order"]):
            group = " & ".join(word.title() for word in meta["groups"][str(entry["group"])].split("-"))
            subgroup = meta["subgroups"][str(entry["subgroup"])]
            words = set(entry["label"].lower().split())
            tags = tuple(tag for tag in entry.get("tags", ()) if tag.isalpha() and len(tag) > 2 and tag not in words)
            stem = stem_of(entry["label"])
            for variant in (entry, *entry.get("skins", ())):
                code, name = plain_code(variant["hexcode"]), variant["label"].removeprefix("flag: ")
                concepts[code] = Concept(code, name, group, subgroup, tags, stem, variant is entry)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{archive} does not hold emojibase's data as expected ({error!r}): get {WORDS}") from None
    return concepts


def read_pictures(style: str, archive: Path, concepts: dict[str, Concept], size: int) -> tuple[list[Picture], int]:
    """The pictures of one style in the order of `concepts`, and how many were left out as equal to an earlier one.

    Raises:
        UserError: a picture cannot be decoded.
    """
    source = STYLES[style]
    contents: dict[str, bytes] = {}
    for path, content in read_members(archive, source.folder, source.suffix):
        contents.setdefault(plain_code(path.rpartition("/")[2].removesuffix(source.suffix)), content)
    pictures, seen, found = [], set(), 0
    for code, concept in concepts.items():
        if code not in contents:
            continue
        try:
            image = on_white(Image.open(io.BytesIO(contents[code])), size)
        except OSError as error:
            raise UserError(f"{archive}: the picture {code} cannot be decoded ({error}): fetch it anew") from None
        found += 1
        pixels = hashlib.sha256(image.tobytes()).digest()
        if pixels not in seen:
            seen.add(pixels)
            pictures.append(Picture(style, concept, image))
    return pictures, found - len(pictures)


def on_white(image: Image.Image, size: int) -> Image.Image:
    """RGB, `size` x `size` pixels."""
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    rgb = ground.convert("RGB")
    return rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------- split


def held_out_stems(concepts: Iterable[Concept], holdout: float, seed: int) -> set[str]:
    """A share `holdout` of the stems, chosen by a hash of (seed, stem); none with many twins (29 families)."""
    twins = Counter(concept.stem for concept in concepts if concept.base)
    return {
        stem for stem, n in twins.items() if n <= MAX_HELD_OUT_TWINS and uniform(seed, "split", stem) < holdout
    }


def build(
    out: Path,
    size: int,
    packages: Path,
    holdout: float = 0.1,
    seed: int = 0,
    shard_size: int = 500,
    skin_tones: bool = False,
    limit: int | None = None,
    preview: Path | None = None,
) -> tuple[dict, bool]:
    """Make the folder `out`, or leave it as it is when a finished one with the same settings is there.

    Args:
        skin_tones: train on skin tones too: every second picture is then a near-copy of its base picture.
        limit: use only the first so many concepts.

    Returns:
        The content of `dataset.json`, and whether the folder was built by this call.

    Raises:
        UserError: a setting out of range, a package that cannot be had or read, or something else already at `out`.
    """
    check_settings(size, shard_size, holdout, limit)
    settings = {
        "recipe": RECIPE,
        "size": size,
        "holdout": holdout,
        "seed": seed,
        "shard_size": shard_size,
        "skin_tones": skin_tones,
        "limit": limit,
    }
    finished = read_finished(out)
    reuse = finished is not None and finished["settings"] == settings
    if reuse and preview is None:
        return finished, False

    concepts = read_concepts(archive_of(WORDS, packages))
    concepts = {code: concept for code, concept in concepts.items() if concept.base or skin_tones}
    concepts = dict(list(concepts.items())[:limit])
    pictures, duplicates = {}, 0
    for style, source in STYLES.items():
        pictures[style], dropped = read_pictures(style, archive_of(source.package, packages), concepts, size)
        duplicates += dropped
    if preview is not None:
        draw_preview(preview, pictures, seed)
    if reuse:
        return finished, False

    stems = held_out_stems(concepts.values(), holdout, seed)
    train = [p for style in TRAINED_STYLES for p in pictures[style] if p.concept.stem not in stems]
    trained = {p.concept.code for p in train}
    base = [p for p in pictures[TEST_STYLE] if p.concept.base]
    seen = [p for p in base if p.concept.code in trained]
    held_out = [p for p in base if p.concept.stem in stems]
    # A subgroup with fewer pictures is too few to learn a class from and to measure it on.
    sizes = Counter(p.concept.kind for p in train if p.concept.base and p.style == TRAINED_STYLES[0])
    kinds = sorted(kind for kind, n in sizes.items() if n >= min(MIN_CLASS_SIZE, max(sizes.values())))
    for part, content in (("train", train), ("seen", seen), ("heldout", held_out)):
        if not content:
            remedy = "choose another --holdout or --seed, or a larger --limit"
            raise UserError(f"the split leaves no picture for {part}/: {remedy}")

    with replaced_folder(out) as partial:
        counts = {"train": len(train), "duplicates_dropped": duplicates}

        def write(folder: str, chosen: Sequence[Picture], names: Sequence[str] | None = None, by: str = "") -> None:
            rows, line = [], {name: i for i, name in enumerate(names or ())}
            for p in chosen:
                fields = {key: getattr(p.concept, key) for key in ("name", "group", "subgroup", "stem", "base")}
                fields |= {"style": p.style}
                parts = {"txt": caption_of(p.style, p.concept, seed), "json": json.dumps(fields, ensure_ascii=False)}
                if names is not None:
                    parts["cls"] = str(line[getattr(p.concept, by)])
                rows.append((p.key, p.image, parts))
            write_samples(partial / folder, rows, shard_size, seed)

        write("train", train)
        for folder, chosen in (("seen", seen), ("heldout", held_out)):
            names = sorted({p.concept.classname for p in chosen})
            write(folder, chosen, names, "classname")
            write_lines(partial / folder / "classnames.txt", names)
            write_lines(partial / folder / "templates.txt", TEMPLATES)
            counts |= {folder: len(chosen), f"{folder}_classes": len(names)}
        for split, chosen in (("train", [p for p in train if p.concept.base]), ("test", base)):
            chosen = [p for p in chosen if p.concept.kind in set(kinds)]
            write(f"categories/{split}", chosen, kinds, "kind")
            counts[f"categories_{split}"] = len(chosen)
        write_lines(partial / "categories" / "classnames.txt", kinds)
        counts["categories"] = len(kinds)
        dataset = {
            "settings": settings,
            "counts": counts,
            "sources": {style: source.package for style, source in STYLES.items()} | {"words": WORDS},
            "licences": {style: source.licence for style, source in STYLES.items()} | {"words": WORDS_LICENCE},
        }
        write_json(partial / "dataset.json", dataset)
    return dataset, True


def draw_preview(path: Path, pictures: dict[str, list[Picture]], seed: int, rows: int = 12) -> None:
    """Write a sheet of `rows` concepts that all styles have, with the caption of each picture beside it."""
    by_code = {style: {p.concept.code: p for p in chosen} for style, chosen in pictures.items()}
    common = [code for code in next(iter(by_code.values())) if all(code in found for found in by_code.values())]
    chosen = [common[i * len(common) // rows] for i in range(min(rows, len(common)))]
    font, side, width = ImageFont.load_default(), 64, 400
    sheet = Image.new("RGB", (width * len(by_code), (side + 8) * max(len(chosen), 1)), "#e8e8e8")
    draw = ImageDraw.Draw(sheet)
    for column, (style, found) in enumerate(by_code.items()):
        for row, code in enumerate(chosen):
            left, top = column * width + 4, row * (side + 8) + 4
            sheet.paste(found[code].image.resize((side, side)), (left, top))
            text = caption_of(style, found[code].concept, seed)
            lines = [text[i : i + 52] for i in range(0, len(text), 52)]
            draw.multiline_text((left + side + 6, top + 16), "\n".join(lines), fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to make")
    add("--size", type=int, default=64, help="pixels a side: the model's resolution (default: 64)")
    add("--packages", type=Path, default=Path("data/packages"), metavar="DIR",
        help="where the archives of the npm packages are, or are put (default: data/packages)")  # fmt: skip
    add("--holdout", type=float, default=0.1, help="share of stems held out (default: 0.1)")
    add("--seed", type=int, default=0, help="of split, captions and order (default: 0)")
    add("--shard-size", type=int, default=500, help="most pictures in a shard (default: 500)")
    add("--skin-tones", action="store_true", help="train on skin tones too: 6,386 pictures instead of 3,371")
    add("--limit", type=int, help="use only the first so many emoji, for a trial")
    add("--preview", type=Path, metavar="FILE.png", help="also draw a sheet of pictures and captions")
    options = parser.parse_args(argv)
    try:
        dataset, built = build(**vars(options))
    except UserError as error:
        print(f"make_study_data.py: {error}", file=sys.stderr)
        return 2
    counts = dataset["counts"]
    print(
        f"{'wrote' if built else 'reusing'} {options.out}: {counts['train']} training pictures; to evaluate "
        f"{counts['seen']} of trained names, {counts['heldout']} of held-out names, {counts['categories']} categories"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
