"""Scenes of the quick start: what is seen is what is named, and no four of the held-out part are trained on."""
from __future__ import annotations

import io

import make_scene_shards as scenes
import pytest
from make_emoji_shards import render
from PIL import Image

from ..study_packages import all_bytes, samples_of
from .test_make_emoji_shards import needs_packages

SETTINGS = dict(size=16, shard_size=50, holdout=0.2, seed=0, limit=8, scenes=70)  # all fours of eight things


def tiles_of(png: bytes) -> set[bytes]:
    picture = Image.open(io.BytesIO(png))
    return {picture.crop((x, y, x + 8, y + 8)).tobytes() for x in (0, 8) for y in (0, 8)}


@needs_packages
def test_each_picture_shows_what_its_caption_names_and_held_out_fours_are_new(tmp_path):
    out = tmp_path / "scenes"
    dataset, built = scenes.build(out, **SETTINGS)
    assert built and dataset["counts"] == {"val": 14, "train": 56, "val_shards": 4, "train_shards": 4}
    looks = {one.phrase: render(svg, 8).tobytes() for one, svg in scenes.find_things(8, seed=0)}
    fours = {}
    for part in ("train", "val"):
        for sample in samples_of(out / part).values():
            named = sample["txt"].decode().replace(" and ", ", ").split(", ")
            assert len({*named}) == 4 and tiles_of(sample["png"]) == {looks[name] for name in named}
            fours.setdefault(part, set()).add(frozenset(named))
    assert not fours["train"] & fours["val"] and len(fours["train"] | fours["val"]) == 70
    before = all_bytes(out)
    assert not scenes.build(out, **SETTINGS)[1] and all_bytes(out) == before
    scenes.build(tmp_path / "again", **SETTINGS)
    assert all_bytes(tmp_path / "again") == before


@needs_packages
@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--limit", "4"], "--limit must be between 5 and "),
        (["--limit", "8", "--scenes", "71"], "--scenes must be at most 70, the fours of 8 things, not 71"),
        (["--holdout", "1"], "--holdout must be between 0 and 1"),
        (["--holdout", "0.01", "--scenes", "9"], "--holdout 0.01 leaves one part empty: take another"),
    ],
)
def test_settings_that_cannot_be(words, sentence, tmp_path, capsys):
    assert scenes.main(["--out", str(tmp_path / "scenes"), *words]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "scenes").exists()
