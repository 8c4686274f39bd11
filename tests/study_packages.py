"""Tiny npm archives in the layout of those that scripts/make_study_data.py reads, for tests."""
from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw

SUBGROUPS = {"1": "animal-bird", "2": "food-fruit"}
GROUPS = {"1": "animals-nature", "2": "food-drink"}
EACH = 24  # concepts in a subgroup


def read_shards(folder: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """shard name -> key -> extension -> bytes."""
    content: dict = {}
    for shard in sorted(folder.glob("*.tar")):
        samples = content[shard.name] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return content


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    return {key: sample for shard in read_shards(folder).values() for key, sample in shard.items()}


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def code(group: int, number: int) -> str:
    return f"{0x1F400 + 256 * group + number:X}"


def concepts() -> list[dict]:
    entries = []
    for group, word in ((1, "bird"), (2, "fruit")):
        for number in range(EACH):
            name = f"{chr(97 + number)}{chr(97 + number)}ish {word}"
            entry = {"label": name, "hexcode": code(group, number), "tags": ["wild", "bright", "3", name.split()[0]]}
            entries.append(entry | {"order": 100 * group + number, "group": group, "subgroup": group})
    tone = {"label": f"{entries[0]['label']}: dark skin tone", "hexcode": f"{entries[0]['hexcode']}-1F3FF"}
    entries[0]["skins"] = [tone | {"order": 1, "group": 1, "subgroup": 1}]
    entries.append({"label": "regional indicator A", "hexcode": "1F1E6"})  # without a group: not an emoji by itself
    return entries


def picture(style: int, number: int, size: int, kind: str) -> bytes:
    """A coloured disc on a transparent ground; colour and place tell the concepts apart."""
    image = Image.new("RGBA", (size, size))
    colour = (40 * (number % 6) + 20, 255 - 40 * (number // 6 % 6), 70 * style + 20, 255)
    left = size * (number % 5) // 10
    ImageDraw.Draw(image).ellipse((left, 2, left + size // 2, size // 2 + 2 + number % 3), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def write_packages(folder: Path) -> Path:
    """The four archives; of Fluent, one code is written otherwise, and Twemoji's second bird equals its first."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = concepts()
    meta = {"groups": GROUPS, "subgroups": SUBGROUPS}
    _archive(folder / "emojibase-data-17.0.0.tgz", {
        "en/data.json": json.dumps(entries).encode(), "meta/groups.json": json.dumps(meta).encode(),
    })  # fmt: skip
    codes = [entry["hexcode"] for entry in entries if "group" in entry] + [entries[0]["skins"][0]["hexcode"]]
    for style, (name, inner, suffix, kind, size) in enumerate((
        ("emoji-datasource-google-16.0.0", "img/google/64/", ".png", "PNG", 64),
        ("lobehub-fluent-emoji-3d-1.1.0", "assets/", ".webp", "WEBP", 128),
        ("emoji-datasource-twitter-16.0.0", "img/twitter/64/", ".png", "PNG", 64),
    )):  # fmt: skip
        members = {"LICENSE": b"free", "img/google/sheets/64.png": b"not read"}
        for number, hexcode in enumerate(codes):
            shown = number - 1 if style == 2 and number == 1 else number
            file = f"{hexcode.lower()}-fe0f" if style == 1 and number == 3 else hexcode.lower()
            members[f"{inner}{file}{suffix}"] = picture(style, shown, size, kind)
        _archive(folder / f"{name}.tgz", members)
    return folder


def _archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
