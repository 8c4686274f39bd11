"""Pictures, pages and figures from files to files, and what is said of wrong input."""
from __future__ import annotations

import csv
import re

import open_clip
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from open_clip_elip import identity as identities
from open_clip_elip.visualize.command import main
from open_clip_elip.visualize.draw import panels
from open_clip_elip.visualize.statistics import by_depth, shared
from open_clip_elip.visualize.trace import Stage

from ...training import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, shards, and a folder of pictures of which one is broken."""
    folder = tmp_path_factory.mktemp("visualize")
    runs.register_models(folder)
    torch.manual_seed(0)
    identity = identities.describe("Tiny-ELIP")
    state = open_clip.CLIP(**{k: v for k, v in runs.MODEL.items() if k != "token_reduction"}).state_dict()
    torch.save({"model": identity.to_dict(), "state_dict": state}, folder / "tiny.pt")
    torch.save(state, folder / "bare.pt")
    runs.write_shards(folder / "shards", shards=2, samples=4, broken=(1,))
    (folder / "pictures").mkdir()
    Image.new("RGBA", (50, 30), (255, 0, 0, 128)).save(folder / "pictures" / "b.png")
    (folder / "pictures" / "b.txt").write_text("half <red> & clear\n")
    (folder / "pictures" / "a.jpg").write_bytes(b"no picture")
    (folder / "empty").mkdir()
    return folder


def visualize(folder, *more, image="pictures", pretrained="tiny.pt"):
    words = ["--pretrained", str(folder / pretrained), "--image", str(folder / image), "--device", "cpu"]
    return main([*words, "--out", str(folder / "out"), *more])


def test_a_folder_and_the_page(folder, capsys):
    assert visualize(folder) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder / "out" / f"kept.{end}") for end in ("png", "html")]
    page = (folder / "out" / "kept.html").read_text()
    assert "half &lt;red&gt; &amp; clear" in page and "a.jpg" not in page
    assert re.findall(r'max="(\d)"', page) == ["3"]
    assert re.findall(r'data-stage="(\d)"', page) == ["0", "1", "2", "3"]
    assert page.count("data:image/jpeg") == 1 + 2 * 3 and "http" not in page
    assert Image.open(folder / "out" / "kept.png").width > 600


@pytest.mark.parametrize("method", [["evit"], ["tome", "r=2"], ["random"], ["elip", "keep_ratio=1,.5,.5,.2"]])
def test_every_method_on_shards(folder, method):
    assert visualize(folder, "--token-reduction", *method, "--count", "3", image="shards/{00000..00001}.tar") == 0
    page = (folder / "out" / "kept.html").read_text()
    assert page.count("<figure>") == 3 and "000000.png" in page and "000001.png" not in page
    kept = re.findall(r"layer (\d): (\d+) kept", page)
    if method == ["random"]:
        assert kept == [("1", "8")] * 3
    if method[0] == "elip":
        assert kept[0] == ("2", "8") and [layer for layer, _ in kept[:3]] == ["2", "3", "6"]


def test_lora_is_merged(folder):
    state = torch.load(folder / "tiny.pt")
    state["model"] = identities.Identity.from_dict(state["model"]).with_adapter("lora", 2).to_dict()
    torch.save(state, folder / "lora.pt")
    assert visualize(folder, pretrained="lora.pt") == 0


def test_a_checkpoint_keeps_its_settings_beside_its_name(folder):
    state = torch.load(folder / "tiny.pt")
    state["model"]["config"]["token_reduction"]["lam"] = 0.25
    torch.save(state, folder / "lam.pt")
    assert visualize(folder, "--model", "Tiny-ELIP", pretrained="lam.pt") == 0
    assert "lam 0.25" in (folder / "out" / "kept.html").read_text()


def test_one_picture_under_several_captions(folder):
    assert visualize(folder, "--captions", "a red thing", "a blue thing", image="pictures/b.png") == 0
    page = (folder / "out" / "kept.html").read_text()
    assert re.findall("<figcaption>(.*?)<small>", page) == ["a red thing", "a blue thing"]


def test_statistics(folder):
    assert visualize(folder, "--statistics", image="shards/{00000..00001}.tar") == 0
    tables = {}
    for name in ("layers", "stages", "survival"):
        with (folder / "out" / f"{name}.csv").open() as file:
            tables[name] = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert [row["layer"] for row in tables["layers"]] == [1, 2, 3, 4, 5, 6]
    assert len(tables["survival"]) == 16 * len(tables["stages"]) == 48
    for row in tables["stages"]:
        share = sum(one["share"] for one in tables["survival"] if one["layer"] == row["layer"])
        assert share == pytest.approx(row["kept"], rel=1e-4)
        assert 0 < row["shared_with_other_caption"] <= 1 and 0 < row["shared_with_image_alone"] <= 1
        assert row["shared_by_chance"] == pytest.approx(row["kept"] / 16, rel=1e-4)
    assert Image.open(folder / "out" / "statistics.png").width > 600


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"image": "nothing.png"}, "There is no picture, folder or shard"),
        ({"image": "empty"}, "has no readable picture"),
        ({"image": "pictures/a.jpg"}, "has no readable picture"),
        ({"image": "shards/{00000..00009}.tar"}, "cannot be read"),
        ({"pretrained": "nothing.pt"}, "nothing.pt is not a file; correct the path"),
        ({"pretrained": "bare.pt"}, "--model is missing"),
        ({"pretrained": "pictures/b.png"}, "cannot be read as a checkpoint"),
        ({"words": ["--token-reduction", "none"]}, "has no token reduction; add one"),
        ({"words": ["--token-reduction", "evit", "keep_rate=2"]}, "keep_rate must be a number in (0, 1]"),
        ({"words": ["--token-reduction", "evit", "tome"]}, "--token-reduction takes one method"),
        ({"words": ["--token-reduction", "elip", "keep_count=16,16,16,16"]}, "removes no token"),
        ({"words": ["--token-reduction", "evit", "--captions", "a", "b"]}, "evit looks at no caption"),
        ({"words": ["--caption", " "]}, "A caption is empty"),
        ({"words": ["--count", "0"]}, "must be at least 1"),
        ({"words": ["--statistics"]}, "no other's caption to be compared under"),
        ({"words": ["--device", "tpu"]}, "There is no device 'tpu' here"),
    ],
)
def test_wrong_input_is_one_sentence(folder, capsys, more, sentence):
    more = dict(more)
    assert visualize(folder, *more.pop("words", ()), **more) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("error:") == 1 and "Traceback" not in error


def test_a_panel_shows_what_is_kept():
    """White with the right half kept, then merged by likeness with a black patch."""
    picture = torch.full((256, 256, 3), 255, dtype=torch.uint8)
    picture[:128, :128] = 0
    kept = torch.tensor([False, True, False, True])
    chosen = Stage(1, torch.tensor([2, 0, 2, 1]), kept, torch.tensor([0.1, 0.4, torch.nan, 0.3]))
    alike = Stage(2, torch.tensor([2, 0, 2, 1]), kept, None)
    whole, one, two = panels(picture.numpy(), [chosen, alike], (2, 2))
    corners = [(40, 216), (216, 216)]  # of a merged patch and of a kept one
    assert [one.kept.getpixel(at) for at in corners] == [(160, 160, 160), (255, 255, 255)]
    assert one.title == "layer 1: 2 kept + 1 merged" and two.attention is None
    merged, same = (two.kept.getpixel(at) for at in corners)
    assert same == (255, 255, 255) and merged == two.kept.getpixel((40, 40))
    blue = [0.4 * 255 * part for part in colormaps["tab10"](0)]
    assert merged == pytest.approx([0.6 * 127.5 + part for part in blue[:3]], abs=1)
    assert len(set(one.attention.getpixel((40, 216)))) == 1 and len(set(one.attention.getpixel((216, 40)))) > 1


def test_shares_and_depth():
    def stage(*kept):
        return Stage(1, None, torch.tensor([kept], dtype=torch.bool), None)

    assert shared(stage(1, 1, 0, 0), stage(1, 0, 1, 0)).item() == 0.5
    assert shared(stage(1, 1, 1, 0), stage(1, 0, 0, 0)).item() == 0.5

    identity = identities.describe("ViT-B-32", force_image_size=64)
    identity.config["vision_cfg"] |= {"layers": 2, "width": 64}
    model = identities.create(identity).eval()
    with torch.no_grad():
        found = by_depth(model, torch.randn(2, 3, 64, 64))
        states = model.visual.transformer.resblocks[0](model.visual._embeds(torch.zeros(1, 3, 64, 64)))[0, 1:]
        cosines = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=2)
        alike = by_depth(model, torch.zeros(1, 3, 64, 64))[0][1].item()
        model.visual.transformer.resblocks[1].attn.in_proj_weight.zero_()
        uniform = by_depth(model, torch.randn(2, 3, 64, 64))[1][0]
    assert len(found) == 2 and found[0].shape == (2, 2) and (found[0][0] > 0).all()
    assert alike == pytest.approx((cosines.sum().item() - 4) / 12, abs=1e-5)
    assert uniform.tolist() == pytest.approx([0, 0], abs=1e-6)
