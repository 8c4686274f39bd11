"""What make_emoji_shards.py and make_study_data.py share: words for emoji, held-out stems, shards, whole folders."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import tarfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MIN_CLASS_SIZE = 8  # fewer pictures of a subgroup are too few to learn a class from and to measure it on
MAX_HELD_OUT_TWINS = 8  # a stem with more stays in training: 29 all but equal families would swamp the held-out part
MIN_SHARDS = 4  # enough for two processes with two loader workers each

_VARIANTS = re.compile(
    r"\b(?:(?:medium-light|medium-dark|medium|light|dark) skin tone|(?:red|curly|white|blond) hair|bald|beard"
    r"|facing right|old(?:er)? (?=man\b|woman\b|person\b|adult\b))\b"
)
_PEOPLE = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "adult", "child", "and"}
_TWIN_WORDS = {
    "princess": "prince", "mermaid": "merperson", "merman": "merperson", "mrs": "claus", "mx": "claus",
    "santa": "claus", "ewe": "ram", "breast-feeding": "feeding baby",
}  # fmt: skip


class UserError(Exception):
    """Something the person can put right; its text is the one sentence to show."""


@dataclass(frozen=True)
class Emoji:
    """What an emoji shows, whatever its style."""

    code: str  # as `plain_code` has it
    name: str  # such as "ferris wheel", "waving hand: light skin tone", and of flags the country
    group: str  # such as "Travel & Places"
    subgroup: str  # such as "place-other"
    stem: str  # what it shares with its twins; a skin tone has its base's
    tags: tuple[str, ...] = ()  # more words for it
    base: bool = True  # it has no skin tone

    @property
    def kind(self) -> str:
        """The subgroup in words; the class of zero-shot classification."""
        return self.subgroup.replace("-", " ")

    @property
    def phrase(self) -> str:
        """The name as it stands in a sentence: "a ferris wheel", "the flag of France", "cooked rice"."""
        name = self.name
        if self.subgroup in ("country-flag", "subdivision-flag"):
            return f"the flag of {name}"
        # Plurals, proper names and mass nouns take no article; those groups are full of them.
        plural = name.startswith("people ") or (name.endswith("s") and not name.endswith(("ss", "us")))
        bare = plural or not name[0].islower()
        if bare or self.group in ("Food & Drink", "Symbols") or self.subgroup.startswith("sky"):
            return name
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Sample:
    """A picture, RGB on white, as it goes into shards: `texts` by extension, "txt" being the caption."""

    key: str
    emoji: Emoji
    image: Image.Image
    texts: dict[str, str]
    label: str  # the name of its class


def stem_of(name: str) -> str:
    """What is left of a name without gender, age, skin tone, hair and direction; twins have the same stem.

    >>> stem_of("woman climbing"), stem_of("man with white cane facing right"), stem_of("man red hair")
    ('climbing', 'with white cane', 'person')
    """
    text = _VARIANTS.sub(" ", name.lower().replace("’", "'"))
    words = [re.sub(r"'s$|s'$|[.,:]+$", "", word) for word in text.split()]
    kept = [_TWIN_WORDS.get(word, word) for word in words if word not in _PEOPLE]
    return " ".join(dict.fromkeys(kept)) or "person"


def plain_code(code: str) -> str:
    """One form for all sources: capitals, at least four digits a code point, "-" between, no presentation selectors.

    >>> plain_code("23-fe0f-20e3"), plain_code("1f3f4-e0067_e007f")
    ('0023-20E3', '1F3F4-E0067-E007F')
    """
    return "-".join(part.zfill(4) for part in code.upper().replace("_", "-").split("-") if part != "FE0F")


def uniform(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on the arguments alone, on every machine."""
    digest = hashlib.sha256("\0".join((str(seed), *parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def held_out_stems(emoji: Iterable[Emoji], holdout: float, seed: int) -> set[str]:
    """A share `holdout` of the stems, chosen by a hash of (seed, stem); none with many twins (29 families)."""
    twins = Counter(one.stem for one in emoji if one.base)
    return {stem for stem, n in twins.items() if n <= MAX_HELD_OUT_TWINS and uniform(seed, "split", stem) < holdout}


def distinct(samples: Iterable[Sample]) -> list[Sample]:
    """Those whose pixels do not equal an earlier one's (Norway's flag is also Svalbard's)."""
    found: dict[bytes, Sample] = {}
    for sample in samples:
        found.setdefault(hashlib.sha256(sample.image.tobytes()).digest(), sample)
    return list(found.values())


# --------------------------------------------------------------------------------------------------------------- files


def write_shards(
    folder: Path, samples: Iterable[Sample], shard_size: int, seed: int, classes: Sequence[str] = ()
) -> int:
    """Write shards and `sizes.json`, in an order that depends on keys and `seed`; same input, same bytes.

    Where `classes` are given, each picture also gets a `.cls`, the place of its label in them. Returns the number of
    shards.
    """
    folder.mkdir(parents=True)
    samples = sorted(samples, key=lambda sample: uniform(seed, "order", sample.key))
    shards = max(math.ceil(len(samples) / shard_size), min(MIN_SHARDS, len(samples)))
    place, sizes = {name: i for i, name in enumerate(classes)}, {}
    for index in range(shards):
        # Equal to within one picture: the processes of a run get equal shares whatever the shards they read.
        shard = samples[index * len(samples) // shards : (index + 1) * len(samples) // shards]
        sizes[f"{index:05d}.tar"] = len(shard)
        with tarfile.open(folder / f"{index:05d}.tar", "w") as tar:
            for sample in shard:
                texts = sample.texts | ({"cls": str(place[sample.label])} if classes else {})
                contents = {extension: text.encode() for extension, text in texts.items()}
                for extension, content in ({"png": png(sample.image)} | contents).items():
                    member = tarfile.TarInfo(f"{sample.key}.{extension}")  # owner 0, time 0: nothing of this machine
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    write_json(folder / "sizes.json", sizes)
    return shards


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_prompts(folder: Path, classes: Iterable[str], templates: Iterable[str] = ()) -> None:
    """Beside labelled shards: `classnames.txt` and, unless there are none, `templates.txt`."""
    for name, lines in (("classnames", classes), ("templates", templates)):
        if lines:
            (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def read_finished(out: Path) -> dict | None:
    """What `dataset.json` of a finished folder says, None when there is none yet; UserError if it has other things."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        finished = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
        if isinstance(finished["settings"], dict) and isinstance(finished["counts"], dict):
            return finished
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{out} exists and was not made by this script: move it away or choose another --out")


def make_folder(
    out: Path, settings: dict, preview: Path | None, make: Callable[[], tuple[list[Sample], int]], fill: Callable
) -> tuple[dict, bool]:
    """Make the folder `out`, or leave it as it is when a finished one with the same settings is there.

    `make` gives all pictures, and how many were left out as equal to an earlier one; `fill` writes these into a folder
    and gives what `dataset.json` says beside the settings. Returns the content of `dataset.json`, and whether the
    folder was built by this call.

    Raises:
        UserError: a setting out of range, or something else already at `out`.
    """
    for name, least in (("size", 8), ("shard_size", 1), ("limit", 1)):
        if settings[name] is not None and settings[name] < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {settings[name]}")
    if not 0 < settings["holdout"] < 1:
        raise UserError(f"--holdout must be between 0 and 1, not {settings['holdout']}")
    finished = read_finished(out)
    reuse = finished is not None and finished["settings"] == settings
    if reuse and preview is None:
        return finished, False
    samples, dropped = make()
    if preview is not None:
        draw_preview(preview, samples)
    if reuse:
        return finished, False
    with replaced_folder(out) as partial:
        dataset = {"settings": settings, **fill(partial, samples, dropped)}
        write_json(partial / "dataset.json", dataset)
    return dataset, True


def draw_preview(path: Path, samples: Sequence[Sample], count: int = 48) -> None:
    """Write a contact sheet of `count` pictures, spread over all of them, each with its caption below."""
    columns, side = 8, 128
    chosen = [samples[index * len(samples) // count] for index in range(min(count, len(samples)))]
    width, height = side + 32, side + 64
    sheet = Image.new("RGB", (columns * width, math.ceil(len(chosen) / columns) * height), "#e8e8e8")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for index, sample in enumerate(chosen):
        left, top = index % columns * width, index // columns * height
        sheet.paste(sample.image.resize((side, side), Image.Resampling.NEAREST), (left + 16, top + 4))
        text = textwrap.fill(sample.texts["txt"], 26, max_lines=4)
        draw.multiline_text((left + 4, top + side + 8), text, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# ------------------------------------------------------------------------------------------------------------- command


def parser_of(doc: str, holdout: float) -> argparse.ArgumentParser:
    """The options that both scripts have."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to make")
    add("--size", type=int, default=64, help="pixels a side: the model's resolution (default: 64)")
    add("--holdout", type=float, default=holdout, help="share of stems held out (default: %(default)s)")
    add("--seed", type=int, default=0, help="of split, captions and order (default: 0)")
    add("--shard-size", type=int, default=500, help="most pictures in a shard (default: 500)")
    add("--limit", type=int, help="use only the first so many emoji, for a trial")
    add("--preview", type=Path, metavar="FILE.png", help="also draw a sheet of pictures and captions")
    return parser


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None, build: Callable, told: Callable) -> int:
    """`build` with the options; `told` puts `dataset.json` into words. Returns 0, or 2 after one sentence on stderr."""
    options = parser.parse_args(argv)
    try:
        dataset, built = build(**vars(options))
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{'wrote' if built else 'reusing'} {options.out}: {told(dataset)}")
    return 0
