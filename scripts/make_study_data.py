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

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

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

# Part of the settings: a change in captions, stems or split rebuilds existing folders.
RECIPE = 1

WORDS, WORDS_LICENCE = "emojibase-data@17.0.0", "MIT"


class Style(NamedTuple):
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


def caption_of(style: str, emoji: Emoji, seed: int) -> str:
    """The caption; its wording and its two tags are a function of (seed, code, style) alone."""
    wording = CAPTIONS[int(uniform(seed, "caption", emoji.code, style) * len(CAPTIONS))]
    order = sorted(emoji.tags, key=lambda tag: uniform(seed, "tag", emoji.code, style, tag))
    return wording.format(phrase=emoji.phrase, tags=" ".join(order[:2]) or emoji.kind, kind=emoji.kind)


def archive_of(package: str, folder: Path) -> Path:
    """The archive of NAME@VERSION in `folder`, put there by `npm pack` if it is not there; UserError if that fails."""
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

    UserError if the archive cannot be read or has no such file.
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


def read_emoji(archive: Path) -> dict[str, Emoji]:
    """All emoji with a group, skin tones included, by code, in Unicode's order; UserError if it is not emojibase's."""
    try:
        entries = json.loads(dict(read_members(archive, "en", "/data.json"))["en/data.json"])
        meta = json.loads(dict(read_members(archive, "meta", "/groups.json"))["meta/groups.json"])
        found = {}
        for entry in sorted((entry for entry in entries if "group" in entry), key=lambda entry: entry["order"]):
            group = " & ".join(word.title() for word in meta["groups"][str(entry["group"])].split("-"))
            subgroup = meta["subgroups"][str(entry["subgroup"])]
            words = set(entry["label"].lower().split())
            tags = tuple(tag for tag in entry.get("tags", ()) if tag.isalpha() and len(tag) > 2 and tag not in words)
            stem = stem_of(entry["label"])
            for variant in (entry, *entry.get("skins", ())):
                code, name = plain_code(variant["hexcode"]), variant["label"].removeprefix("flag: ")
                found[code] = Emoji(code, name, group, subgroup, stem, tags, variant is entry)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{archive} does not hold emojibase's data as expected ({error!r}): get {WORDS}") from None
    return found


def read_samples(style: str, archive: Path, emoji: dict[str, Emoji], size: int, seed: int) -> Iterator[Sample]:
    """The pictures of one style in the order of `emoji`; UserError if one cannot be decoded."""
    source, contents = STYLES[style], {}
    for path, content in read_members(archive, source.folder, source.suffix):
        contents.setdefault(plain_code(path.rpartition("/")[2].removesuffix(source.suffix)), content)
    for code, one in emoji.items():
        if code not in contents:
            continue
        try:
            image = on_white(Image.open(io.BytesIO(contents[code])), size)
        except OSError as error:
            raise UserError(f"{archive}: the picture {code} cannot be decoded ({error}): fetch it anew") from None
        fields = {key: getattr(one, key) for key in ("name", "group", "subgroup", "stem", "base")} | {"style": style}
        texts = {"txt": caption_of(style, one, seed), "json": json.dumps(fields, ensure_ascii=False)}
        is_flag = one.subgroup in ("country-flag", "subdivision-flag")
        yield Sample(f"{style}-{code}", one, image, texts, one.phrase if is_flag else one.name)


def on_white(image: Image.Image, size: int) -> Image.Image:
    """RGB, `size` x `size` pixels."""
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    rgb = ground.convert("RGB")
    return rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.BICUBIC)


def build(
    out: Path, size: int, packages: Path, holdout: float = 0.1, seed: int = 0, shard_size: int = 500,
    skin_tones: bool = False, limit: int | None = None, preview: Path | None = None,
) -> tuple[dict, bool]:  # fmt: skip
    """Make the folder `out`; see `emoji_data.make_folder`.

    With `skin_tones` they are trained on too: every second picture is then a near-copy of its base picture.
    """

    emoji: dict[str, Emoji] = {}

    def make() -> tuple[list[Sample], int]:
        known = read_emoji(archive_of(WORDS, packages)).items()
        emoji.update([(code, one) for code, one in known if one.base or skin_tones][:limit])
        samples, found = [], 0
        for style, source in STYLES.items():
            own = list(read_samples(style, archive_of(source.package, packages), emoji, size, seed))
            samples, found = samples + emoji_data.distinct(own), found + len(own)
        return samples, found - len(samples)

    def fill(folder: Path, samples: list[Sample], dropped: int) -> dict:
        stems = emoji_data.held_out_stems(emoji.values(), holdout, seed)
        tests = [s for s in samples if s.key.startswith(TEST_STYLE) and s.emoji.base]
        train = [s for s in samples if not s.key.startswith(TEST_STYLE) and s.emoji.stem not in stems]
        trained = {s.emoji.code for s in train}
        seen = [s for s in tests if s.emoji.code in trained]
        held_out = [s for s in tests if s.emoji.stem in stems]
        for part, content in (("train", train), ("seen", seen), ("heldout", held_out)):
            if not content:
                remedy = "choose another --holdout or --seed, or a larger --limit"
                raise UserError(f"the split leaves no picture for {part}/: {remedy}")
        write_shards(folder / "train", train, shard_size, seed)
        counts = {"train": len(train), "duplicates_dropped": dropped}
        for part, content in (("seen", seen), ("heldout", held_out)):
            names = sorted({s.label for s in content})
            write_shards(folder / part, content, shard_size, seed, names)
            write_prompts(folder / part, names, TEMPLATES)
            counts |= {part: len(content), f"{part}_classes": len(names)}
        sizes = Counter(s.emoji.kind for s in train if s.emoji.base and s.key.startswith(TRAINED_STYLES[0]))
        kinds = sorted(kind for kind, n in sizes.items() if n >= min(MIN_CLASS_SIZE, max(sizes.values())))
        for split, content in (("train", [s for s in train if s.emoji.base]), ("test", tests)):
            content = [replace(s, label=s.emoji.kind) for s in content if s.emoji.kind in kinds]
            write_shards(folder / "categories" / split, content, shard_size, seed, kinds)
            counts[f"categories_{split}"] = len(content)
        write_prompts(folder / "categories", kinds)
        return {
            "counts": counts | {"categories": len(kinds)},
            "sources": {style: source.package for style, source in STYLES.items()} | {"words": WORDS},
            "licences": {style: source.licence for style, source in STYLES.items()} | {"words": WORDS_LICENCE},
        }

    settings = dict(recipe=RECIPE, size=size, holdout=holdout, seed=seed, shard_size=shard_size, skin_tones=skin_tones)
    return emoji_data.make_folder(out, settings | {"limit": limit}, preview, make, fill)


def told(dataset: dict) -> str:
    counts = dataset["counts"]
    named = f"{counts['seen']} of trained names, {counts['heldout']} of held-out names"
    return f"{counts['train']} training pictures; to evaluate {named}, {counts['categories']} categories"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    parser = emoji_data.parser_of(__doc__, holdout=0.1)
    parser.add_argument("--packages", type=Path, default=Path("data/packages"), metavar="DIR",
        help="where the archives of the npm packages are, or are put (default: %(default)s)")  # fmt: skip
    parser.add_argument("--skin-tones", action="store_true", help="train on skin tones too: 6,386 pictures, not 3,371")
    return emoji_data.run(parser, argv, build, told)


if __name__ == "__main__":
    sys.exit(main())
