"""Pictures of the study: joined packages, split, captions, layout; from tiny archives in the real layout."""
from __future__ import annotations

import io
import json
from pathlib import Path

import make_study_data as study
import pytest
from PIL import Image

from ..study_packages import EACH, all_bytes, code, samples_of, write_packages

SETTINGS = dict(size=16, holdout=0.2, seed=0, shard_size=20)


def fields_of(folder: Path) -> list[dict]:
    return [json.loads(sample["json"]) for sample in samples_of(folder).values()]


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return write_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, packages):
    out = tmp_path_factory.mktemp("data") / "study"
    dataset, built = study.build(out, packages=packages, **SETTINGS)
    assert built
    return out, dataset


def test_one_form_of_codes():
    plain = {"23-fe0f-20e3": "0023-20E3", "1F3A1": "1F3A1", "1f3f4-e0067_e007f": "1F3F4-E0067-E007F"}
    assert {given: study.plain_code(given) for given in plain} == plain


def test_styles_and_stems_are_kept_apart(made):
    out, dataset = made
    train, seen, held_out = (fields_of(out / part) for part in ("train", "seen", "heldout"))
    assert {f["style"] for f in train} == {"noto", "fluent"}
    assert {f["style"] for f in (*seen, *held_out)} == {"twemoji"}
    trained, unseen = {f["stem"] for f in train}, {f["stem"] for f in held_out}
    assert unseen and not trained & unseen
    assert {f["stem"] for f in seen} <= trained
    assert all(f["base"] for f in (*train, *seen, *held_out))
    assert len(train) == 2 * (2 * EACH - len(unseen))
    assert len(seen) + len(held_out) == 2 * EACH - 1  # one Twemoji picture equals another
    counts = dataset["counts"]
    assert counts["duplicates_dropped"] == 1
    assert [counts[part] for part in ("train", "seen", "heldout")] == [len(train), len(seen), len(held_out)]
    sizes = json.loads((out / "train" / "sizes.json").read_text())
    assert sum(sizes.values()) == counts["train"] and max(sizes.values()) <= SETTINGS["shard_size"]


def test_labels_are_lines_of_classnames(made):
    out, _ = made
    for part in ("seen", "heldout", "categories/train", "categories/test"):
        of_categories = part.startswith("categories")
        folder = out / "categories" if of_categories else out / part
        names = (folder / "classnames.txt").read_text().splitlines()
        assert not of_categories or names == ["animal bird", "food fruit"]
        for sample in samples_of(out / part).values():
            fields = json.loads(sample["json"])
            name = fields["subgroup"].replace("-", " ") if of_categories else fields["name"]
            assert names[int(sample["cls"])] == name


def test_the_evaluators_read_the_folders(made):
    from training.data.sets.captioned import load_captions
    from training.data.sets.registry import load_data

    out, dataset = made
    assert len(load_data(f"webdataset={out / 'seen'}")) == dataset["counts"]["seen"]
    assert len(load_captions(str(out / "heldout")).captions) == dataset["counts"]["heldout"]
    for split in ("train", "test"):
        assert load_data(f"webdataset={out / 'categories'}", split=split).split == split


def test_pictures_are_on_white_and_of_the_asked_size_and_captions_name_them_and_vary(made):
    samples, wordings = samples_of(made[0] / "train"), set()
    assert f"fluent-{code(1, 3)}" in samples or f"noto-{code(1, 3)}" not in samples  # written with FE0F in Fluent
    for sample in samples.values():
        name, caption = json.loads(sample["json"])["name"], sample["txt"].decode()
        assert name in caption and " 3" not in caption
        wordings.add(caption.replace(name, ""))
        image = Image.open(io.BytesIO(sample["png"]))
        assert image.mode == "RGB" and image.size == (16, 16)
        assert image.getpixel((15, 15)) == (255, 255, 255)
    assert len(wordings) > 3


def test_same_settings_give_the_same_bytes_and_are_not_built_twice(made, tmp_path, packages):
    out, dataset = made
    sheet = tmp_path / "sheets" / "preview.png"
    study.build(tmp_path / "again", packages=packages, **SETTINGS, preview=sheet)
    assert Image.open(sheet).width > 300
    assert all_bytes(tmp_path / "again") == all_bytes(out)
    assert study.build(out, packages=tmp_path / "nowhere", **SETTINGS) == (dataset, False)


def test_skin_tones_follow_their_base(tmp_path, packages):
    out = tmp_path / "tones"
    study.build(out, packages=packages, **SETTINGS, skin_tones=True)
    tones = [f for f in fields_of(out / "train") if not f["base"]]
    base = "aaish bird"
    assert all(f["name"] == f"{base}: dark skin tone" and f["stem"] == base for f in tones)
    assert bool(tones) == any(f["name"] == base for f in fields_of(out / "train"))
    assert all(f["base"] for part in ("seen", "heldout", "categories/train") for f in fields_of(out / part))


def refused(capsys, *words: str) -> str:
    assert study.main(list(words)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_misuse_gives_one_sentence(made, tmp_path, capsys, packages, monkeypatch):
    out = ("--out", str(tmp_path / "new"))
    assert "--size must be at least 8" in refused(capsys, *out, "--size", "4")
    assert "--holdout must be between 0 and 1" in refused(capsys, *out, "--holdout", "1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    assert "was not made by this script" in refused(capsys, "--out", str(tmp_path / "mine"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install npm" in refused(capsys, *out, "--packages", str(tmp_path / "empty"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for archive in packages.glob("*.tgz"):
        (broken / archive.name).write_bytes(archive.read_bytes()[:2000] if "emojibase" in archive.name else b"")
    assert "not a readable archive" in refused(capsys, *out, "--packages", str(broken))
    assert not (tmp_path / "new").exists()
