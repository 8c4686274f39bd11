"""Pictures of the quick start: stems, split, shards, reuse. On a few pictures at 16 px, so that it takes seconds."""
from __future__ import annotations

import importlib.util
import io
import json
from collections import Counter

import emoji_data as data
import make_emoji_shards as shards
import pytest
from PIL import Image

from ..study_packages import all_bytes, read_shards, samples_of

missing = [name for name, module in shards.PACKAGES.items() if importlib.util.find_spec(module) is None]
needs_packages = pytest.mark.skipif(bool(missing), reason=f"pip install '.[quickstart]' for {', '.join(missing)}")

LIMIT = 240  # faces, hearts, hands: ten classes, and some gendered twins
SETTINGS = dict(size=16, shard_size=50, holdout=0.15, seed=0, limit=LIMIT)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    if missing:
        pytest.skip(f"pip install '.[quickstart]' for {', '.join(missing)}")
    out = tmp_path_factory.mktemp("data") / "emoji"
    dataset, built = shards.build(out, **SETTINGS)
    assert built
    return out, dataset


@pytest.mark.parametrize(
    "twins, stem",
    [
        (["person climbing", "man climbing", "woman climbing"], "climbing"),
        (["walking", "man walking", "person walking facing right", "woman walking: dark skin tone"], "walking"),
        (["waving hand", "waving hand: medium-light skin tone", "waving hand medium skin tone"], "waving hand"),
        (["man", "woman", "boy", "girl", "child", "older person", "old man", "woman red hair", "man bald"], "person"),
        (["people holding hands", "women holding hands", "woman and man holding hands"], "holding hands"),
        (["family man woman boy", "family woman girl girl", "family adult adult child"], "family"),
        (["men’s room", "women’s room"], "room"),
        (["prince", "princess"], "prince"),
        (["merman", "mermaid", "merperson"], "merperson"),
        (["ferris wheel"], "ferris wheel"),
        (["old key"], "old key"),
        (["woman’s hat"], "hat"),
        (["Germany"], "germany"),
        (["children crossing"], "children crossing"),
    ],
)
def test_twins_have_one_stem(twins, stem):
    assert [data.stem_of(name) for name in twins] == [stem] * len(twins)


def emoji(name, subgroup="animal-mammal", group="Animals & Nature", code=None):
    return data.Emoji(code or name.replace(" ", "-"), name, group, subgroup, data.stem_of(name))


def test_phrases():
    phrases = ["a ferris wheel", "an owl", "a bus", "scissors", "people hugging", "Tokyo tower"]
    names = [phrase.removeprefix("a ").removeprefix("an ") for phrase in phrases]
    assert [emoji(name).phrase for name in names] == phrases
    assert emoji("cooked rice", "food-asian", "Food & Drink").phrase == "cooked rice"
    assert emoji("France", "country-flag", "Flags").phrase == "the flag of France"
    assert emoji("pirate flag", "flag", "Flags").phrase == "a pirate flag"


def test_captions_have_the_name_and_the_class_and_vary():
    pictures = [emoji(f"animal number {n}x") for n in range(40)]
    captions = [shards.caption_of(p, seed=0) for p in pictures]
    assert all(p.name in caption and "animal mammal" in caption for p, caption in zip(pictures, captions, strict=True))
    wordings = Counter(caption.replace(p.name, "") for p, caption in zip(pictures, captions, strict=True))
    assert len(wordings) == len(shards.CAPTIONS)
    assert captions == [shards.caption_of(p, seed=0) for p in pictures]
    assert captions != [shards.caption_of(p, seed=1) for p in pictures]


def test_held_out_stems_follow_the_seed_and_the_share():
    pictures = [emoji(f"animal number {n}x") for n in range(2000)]
    stems = shards.held_out_stems(pictures, 0.15, seed=0)
    assert 0.12 < len(stems) / 2000 < 0.18
    assert stems == shards.held_out_stems(pictures[::-1], 0.15, seed=0)
    assert stems != shards.held_out_stems(pictures, 0.15, seed=1)
    # A larger share only adds stems, and a new picture moves no other one.
    assert stems < shards.held_out_stems(pictures, 0.3, seed=0)
    assert stems == shards.held_out_stems(pictures[:1999], 0.15, seed=0) | (stems & {pictures[1999].stem})


def test_small_classes_and_large_stems_stay_in_training():
    big = [emoji(f"animal number {n}x") for n in range(50)]
    small = [emoji(f"fish number {n}x", "animal-marine") for n in range(data.MIN_CLASS_SIZE - 1)]
    family = [emoji(f"family {'boy ' * n}girl", code=f"F{n}") for n in range(data.MAX_HELD_OUT_TWINS + 1)]
    assert {p.stem for p in family} == {"family"}
    stems = shards.held_out_stems([*big, *small, *family], 0.999999, seed=0)
    assert stems == {p.stem for p in big}
    with pytest.raises(data.UserError, match="no training picture of 'animal mammal'"):
        shards.classes_of([], big)
    with pytest.raises(data.UserError, match="nothing held out"):
        shards.classes_of(big, [])


@needs_packages
def test_found_pictures_are_base_pictures_with_names_and_render_on_white():
    pictures = shards.find_pictures()
    by_code = {found.code: (found, svg) for found, svg in pictures}
    assert len(pictures) == len(by_code) > 1800
    assert not any(shards.SKIN_TONES & set(code.split("-")) for code in by_code)
    wheel, (heart, svg) = by_code["1F3A1"][0], by_code["2764"]
    assert (wheel.name, wheel.group, wheel.subgroup) == ("ferris wheel", "Travel & Places", "place-other")
    assert heart.name == "red heart"  # its code has a presentation selector in some sources
    image = shards.render(svg, 32)
    assert image.mode == "RGB" and image.size == (32, 32) and image.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = image.getpixel((16, 14))
    assert red > 200 and green < 120 and blue < 120


def test_folder_layout_and_sizes(made):
    out, dataset = made
    for part in ("train", "val"):
        content = read_shards(out / part)
        sizes = json.loads((out / part / "sizes.json").read_text())
        assert sizes == {shard: len(samples) for shard, samples in content.items()}
        assert sum(sizes.values()) == dataset["counts"][part]
        assert list(sizes) == [f"{index:05d}.tar" for index in range(len(sizes))]
        assert data.MIN_SHARDS <= len(sizes) == dataset["counts"][f"{part}_shards"]
        assert max(sizes.values()) <= SETTINGS["shard_size"] and max(sizes.values()) - min(sizes.values()) <= 1
    assert dataset == json.loads((out / "dataset.json").read_text())
    total = sum(dataset["counts"][part] for part in ("train", "val"))
    assert total + dataset["counts"]["duplicates_dropped"] == LIMIT


def test_samples_are_whole_and_no_stem_is_on_both_sides(made):
    out, dataset = made
    names = (out / "val" / "classnames.txt").read_text(encoding="utf-8").splitlines()
    assert names == sorted(set(names)) and len(names) == dataset["counts"]["classes"] >= 5
    stems, kinds, keys = {"train": set(), "val": set()}, {"train": set(), "val": set()}, []
    for part in stems:
        samples = samples_of(out / part)
        keys += samples
        for sample in samples.values():
            assert set(sample) == {"png", "txt", "json"} | ({"cls"} if part == "val" else set())
            image = Image.open(io.BytesIO(sample["png"]))
            assert image.mode == "RGB" and image.size == (16, 16)
            fields = json.loads(sample["json"])
            assert set(fields) == {"name", "group", "subgroup", "kind", "stem"}
            assert fields["name"] in sample["txt"].decode() and fields["kind"] in sample["txt"].decode()
            assert part == "train" or names[int(sample["cls"])] == fields["kind"]
            stems[part].add(fields["stem"])
            kinds[part].add(fields["kind"])
    assert len(set(keys)) == len(keys)
    assert stems["val"] and not stems["train"] & stems["val"]
    assert set(names) <= kinds["train"]
    templates = (out / "val" / "templates.txt").read_text(encoding="utf-8").splitlines()
    assert len(templates) == len(set(templates)) > 1 and all(template.count("{}") == 1 for template in templates)


def test_same_settings_give_the_same_bytes(made, tmp_path):
    shards.build(tmp_path / "deeper" / "again", **SETTINGS)
    assert all_bytes(tmp_path / "deeper" / "again") == all_bytes(made[0])
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["again"]  # nothing temporary is left


@needs_packages
def test_other_settings_rebuild_and_an_interrupted_build_leaves_the_old_folder(tmp_path, monkeypatch):
    out, few = tmp_path / "emoji", SETTINGS | {"limit": 120}
    shards.build(out, **few)
    dataset, built = shards.build(out, **few | {"size": 8})
    assert built and dataset["settings"]["size"] == 8
    sample = next(iter(samples_of(out / "train").values()))
    assert Image.open(io.BytesIO(sample["png"])).size == (8, 8)
    before = all_bytes(out)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "png", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shards.build(out, **few | {"seed": 1})
    assert all_bytes(out) == before
    assert list(tmp_path.iterdir()) == [out]


@needs_packages
def test_with_skin_tones_words_of_the_held_out_part_are_known_but_not_together(tmp_path):
    assert shards.build(tmp_path / "tones", **SETTINGS | {"limit": 700}, skin_tones=True)[1]
    train, val = (samples_of(tmp_path / "tones" / part) for part in ("train", "val"))
    assert 0 < len(val) < len(train) and all(shards.SKIN_TONES & set(code.split("-")) for code in val)
    names = {part: {json.loads(one["json"])["name"] for one in samples.values()} for part, samples in
             (("train", train), ("val", val))}  # fmt: skip
    assert not names["val"] & names["train"]
    assert {word for name in names["val"] for word in name.split()} <= {
        word for name in names["train"] for word in name.split()
    }


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_a_foreign_folder_is_left_alone(tmp_path, capsys, content):
    (tmp_path / "mine.txt").write_text("precious")
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    assert shards.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "was not made by this script" in error and error.count("\n") == 1
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_misuse_gives_one_sentence(tmp_path, capsys, monkeypatch):
    out = tmp_path / "emoji"
    for flag, value in (("size", 4), ("holdout", 1), ("holdout", 0), ("shard-size", 0), ("limit", 0)):
        assert shards.main([f"--out={out}", f"--{flag}={value}"]) == 2
        assert f"--{flag} must be" in capsys.readouterr().err
    monkeypatch.setattr(shards, "PACKAGES", {"no-such-package": "no_such_package"})
    assert shards.main([f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert "missing no-such-package" in error and "pip install" in error and not out.exists()


def test_a_finished_folder_is_reused_and_previewed(made, tmp_path, capsys, monkeypatch):
    out, dataset = made
    with monkeypatch.context() as patched:
        patched.setattr(shards, "find_pictures", lambda *_: pytest.fail("built again"))
        assert shards.build(out, **SETTINGS) == (dataset, False)
    sheet = tmp_path / "sheets" / "preview.png"
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    assert shards.main([f"--out={out}", *flags, f"--preview={sheet}"]) == 0
    assert capsys.readouterr().out.startswith("reusing ")
    image = Image.open(sheet)
    assert image.width > 300 and image.height > 300
    assert len(image.getcolors(1 << 20)) > 20  # pictures, not an empty sheet
