"""Models written for other programs: read there, they give the same features, and what has no place there is told."""
from __future__ import annotations

import re
from dataclasses import replace

import open_clip
import pytest
import timm
import torch
from PIL import Image

from open_clip_elip import loading
from open_clip_elip.clip import TextFirst
from open_clip_elip.export import graphs
from open_clip_elip.export import write as writing
from open_clip_elip.export.command import main
from open_clip_elip.identity import Identity, create, describe, tokenizer, transform
from open_clip_elip.loading import load
from open_clip_elip.weights import read

from .tiny import REDUCTION, config, enliven

CAPTIONS = ["a photo of a cat", "Two DOGS,  12 it's!", "Ünïcödé 猫 🎉 3.14 #tag @me", "word " * 50, ""]
PREPROCESS = {"size": [32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}


def identity(**changes) -> Identity:
    """Of toy size, with CLIP's words."""
    text = {"vocab_size": 49408} | changes.pop("text", {})
    return Identity("clip", "ViT-Toy", config(**{"token_reduction": REDUCTION, "text": text} | changes), seen())


def seen(**changes) -> dict:
    return describe("ViT-B-32").preprocess | PREPROCESS | changes


def write(path, identity: Identity, **more):
    """A checkpoint as this trainer writes it; returns the model."""
    torch.manual_seed(0)
    model = create(identity).eval()
    enliven(model)
    torch.save({"model": identity.to_dict(), "state_dict": model.state_dict(), **more}, path)
    return model


@pytest.fixture
def run(tmp_path, capsys):
    """Exports the checkpoint w.pt; what was printed, after an exit code of 0, or of 2 with nothing written."""

    def run(format: str, *flags: str, code: int = 0, out: str = "out") -> str:
        before = sorted(tmp_path.iterdir())
        assert main([format, str(tmp_path / out), "--pretrained", str(tmp_path / "w.pt"), *flags]) == code
        printed = capsys.readouterr()
        if code:
            *_, error = printed.err.splitlines()  # timm's log may stand before it
            assert sorted(tmp_path.iterdir()) == before and error.startswith("error: "), printed.err
        return printed.err if code else printed.out

    return run


def inputs(count: int = 3):
    return torch.randn(count, 3, 32, 32), tokenizer(identity())(CAPTIONS[:count])


def difference(own: dict, found: dict) -> float:
    return max(float((own[key] - found[key]).abs().max().detach()) for key in found)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("changes", [{}, {"custom_text": True}, {"quick_gelu": True, "init_logit_bias": -5.0}])
def test_open_clip(changes, plain, run, tmp_path):
    model = write(tmp_path / "w.pt", identity(**changes))
    assert "features differ from the model's by at most" in run("open_clip", *["--plain"] * plain)
    name = f"local-dir:{tmp_path / 'out'}"
    again, _, pictures = open_clip.create_model_and_transforms(name, output_dict=True)
    assert isinstance(again, TextFirst) == (not plain)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    batch = inputs()
    assert difference(model(*batch), again.eval()(*batch)) < 1e-6
    found = describe(name)
    assert found.preprocess == seen()
    reduction = found.token_reduction
    assert reduction is None if plain else reduction["keep_ratio"] == REDUCTION["keep_ratio"]
    lists = str.maketrans("[]", "()")
    assert repr(pictures).translate(lists) == repr(transform(identity())).translate(lists)


@pytest.mark.parametrize("changes", [{}, {"custom_text": True, "quick_gelu": True, "vision": {"mlp_ratio": 2.0}}])
def test_transformers_and_back(changes, run, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = write(tmp_path / "w.pt", identity(**changes))
    run("transformers")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    picture = Image.linear_gradient("L").convert("RGB").resize((50, 70))
    batch = processor(text=CAPTIONS, images=picture, padding="max_length", truncation=True, return_tensors="pt")
    ids = tokenizer(identity())(CAPTIONS)
    for row, other in zip(ids, batch.input_ids, strict=True):
        length = int(row.argmax()) + 1
        assert row[:length].equal(other[:length]) and (other[length:] == row.max()).all()
    assert (batch.pixel_values[0] - transform(identity())(picture)).abs().max() < 2 / 255 / 0.2  # rounded elsewhere
    found = theirs(input_ids=batch.input_ids, pixel_values=batch.pixel_values)
    own = model(batch.pixel_values, ids)
    assert difference(own, {"image_features": found.image_embeds, "text_features": found.text_embeds}) < 1e-6
    assert theirs.logit_scale == model.logit_scale

    assert main(["open_clip", str(tmp_path / "back"), "--pretrained", str(tmp_path / "out")]) == 0
    back = describe(f"local-dir:{tmp_path / 'back'}")
    again = create(back)
    assert not load(again, read(tmp_path / "back")).sentences()
    assert back.preprocess == seen()
    own, found = ({k.removeprefix("text."): v for k, v in of.state_dict().items()} for of in (model, again))
    assert own.keys() == found.keys() and all(torch.equal(own[key], found[key]) for key in own)
    assert difference(model(*(one := inputs())), again.eval()(*one)) < 1e-6


@pytest.mark.parametrize(("quick_gelu", "size"), [(False, [32, 32]), (True, [32, 48])])
def test_timm(quick_gelu, size, run, tmp_path):
    of = identity(quick_gelu=quick_gelu, vision={"image_size": size})
    model = write(tmp_path / "w.pt", replace(of, preprocess=seen(size=size)))
    run("timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    image = torch.randn(2, 3, *size)
    assert torch.allclose(theirs(image), model.encode_image(image), rtol=0, atol=1e-5)
    kind = timm.data.resolve_data_config(model=theirs)
    assert [list(kind[key]) for key in ("mean", "std")] == [PREPROCESS["mean"], PREPROCESS["std"]]
    if size != [32, 32]:
        assert "pictures are square" in run("transformers", out="other", code=2)


SHALLOW = {
    "token_reduction": {"method": "elip", "depths": [1, 1], "keep_ratio": [0.6, 0.3]}, "init_logit_bias": -5.0,
    "vision": {"layers": 2}, "text": {"layers": 1},
}  # fmt: skip
GRAPHS = [("image", True), ("text", False), ("both", False)]


@pytest.mark.parametrize(("part", "reduced"), GRAPHS)
@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_graphs(format, part, reduced, run, tmp_path):
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    model = write(tmp_path / "w.pt", identity(**SHALLOW))
    run(format, "--part", part, *["--vision-guided-reduction"] * reduced, out="out.pt2")
    model.tower.vision_guided = reduced
    names = graphs.PARTS[part]
    for images, texts in ((1, 5), (4, 1)):
        given = {"image": torch.randn(images, 3, 32, 32), "text": tokenizer(identity())(CAPTIONS[:texts])}
        own = model(**{name: given[name] for name in names})
        own = {key: value for key, value in own.items() if len(names) == 2 or key == f"{part}_features"}
        if format == "torch":
            found = torch.export.load(tmp_path / "out.pt2").module()(*(given[name] for name in names))
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(tmp_path / "out.pt2")
            assert [one.name for one in session.get_outputs()] == list(own)
            found = map(torch.from_numpy, session.run(None, {name: given[name].numpy() for name in names}))
        assert difference(own, dict(zip(own, found, strict=True))) < 1e-6
    if reduced and part == "image":
        model.tower.vision_guided = False
        assert difference(own, {"image_features": model.encode_image(given["image"], normalize=True)}) > 1e-3


def test_a_graph_of_tome(run, tmp_path):
    write(tmp_path / "w.pt", identity(**SHALLOW | {"token_reduction": {"method": "tome"}}))
    run("torch", "--part", "image", "--vision-guided-reduction")


def test_averages(run, tmp_path):
    averages = write(tmp_path / "w.pt", identity()).state_dict()
    averages["visual.proj"] = averages["visual.proj"] + 1
    model = write(tmp_path / "w.pt", identity(), ema=averages)
    run("open_clip", "--ema")
    found = read(tmp_path / "out")["state_dict"]["visual.proj"]
    assert torch.equal(found, averages["visual.proj"]) and not torch.equal(found, model.visual.proj)


def test_lora_is_merged_and_a_bottleneck_has_no_place(run, tmp_path):
    plain = write(tmp_path / "w.pt", identity()).state_dict()
    place = "visual.transformer.resblocks.0.attn"
    down, up = torch.randn(2, 32), torch.randn(96, 2)
    lora = {f"{place}.lora_A.default.weight": down, f"{place}.lora_B.default.weight": up}
    state = {"state_dict": plain | lora, "model": identity().with_adapter("lora", 2).to_dict()}
    torch.save(state, tmp_path / "w.pt")
    run("open_clip")
    found = read(tmp_path / "out")["state_dict"]
    assert found.keys() == plain.keys()
    weight = f"{place}.in_proj_weight"
    torch.testing.assert_close(found[weight], plain[weight] + up @ down)
    write(tmp_path / "w.pt", identity().with_adapter("bottleneck", 2))
    assert "bottleneck adapters, for which timm has no place" in run("timm", out="again", code=2)


def test_no_number_is_no_small_difference(run, tmp_path, monkeypatch):
    model = write(tmp_path / "w.pt", identity())
    state = model.state_dict() | {"visual.proj": torch.full_like(model.visual.proj, torch.nan)}
    torch.save({"state_dict": state, "model": identity().to_dict()}, tmp_path / "w.pt")
    assert "not finite (the first is visual.proj)" in run("open_clip", code=2)
    monkeypatch.setattr(loading, "check_finite", lambda *given: None)
    assert "other features there (by nan)" in run("open_clip", code=2)


LAYER_SCALE = {"vision": {"ls_init_value": 0.5}}
ANOTHER_TEXT = {"text": {"no_causal_mask": True, "pool_type": "last"}}
SIGLIP = {"custom_text": True, "text": {"proj_bias": True}}


@pytest.mark.parametrize(
    ("changes", "flags", "sentence"),
    [
        (LAYER_SCALE, ["transformers"], "CLIPModel has no vision_model.encoder.layers.0.ls_1"),
        (ANOTHER_TEXT, ["transformers"], "other features there"),
        (SIGLIP, ["transformers"], "no place for text_projection"),
        ({"init_logit_bias": -5.0}, ["transformers"], "no place for logit_bias"),
        ({"vision": {"no_ln_pre": True}}, ["timm"], "timm's ViT has"),
        ({"vision": {"pool_type": "avg"}}, ["timm"], "other features there"),
        ({}, ["open_clip", "--ema"], "no averaged weights; leave out --ema"),
        ({}, ["open_clip", "--part", "image"], "--part does nothing for open_clip"),
        ({}, ["timm", "--plain"], "--plain does nothing for timm"),
        ({"token_reduction": {"method": "none"}}, ["torch", "--vision-guided-reduction"], "has no token reduction"),
        ({"token_reduction": {"method": "random"}}, ["torch", "--vision-guided-reduction"], "in training only"),
        ({}, ["torch", "--vision-guided-reduction", "--part", "text"], "--part text has none"),
        ({}, ["released", "--ema"], "--ema does nothing for released"),
        ({}, ["released"], "not of the pre-training of ALBEF, BLIP or METER"),
        ({}, ["timm", "--model", "ViT-Nowhere"], "no model named"),
        ({}, ["timm", "--model", "ViT-B-32"], "does not fit ViT-B-32"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(changes, flags, sentence, run, tmp_path):
    write(tmp_path / "w.pt", identity(**changes))
    assert re.search(sentence, run(*flags, code=2))


def test_the_place_and_the_source(run, tmp_path, monkeypatch, capsys):
    model = write(tmp_path / "w.pt", identity())
    assert "exists already" in run("timm", out="w.pt", code=2)
    monkeypatch.setattr(writing, "TOLERANCE", -1)
    assert "other features" in run("open_clip", code=2)
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    assert "pip install 'open_clip_elip[export]'" in run("onnx", code=2)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert "--model is missing" in run("timm", code=2)
    assert main(["timm", str(tmp_path / "out"), "--pretrained", "nothing.pt"]) == 2
    assert "--pretrained nothing.pt is not a file" in capsys.readouterr().err
    assert main(["timm", str(tmp_path / "out"), "--model", "ViT-B-32"]) == 2
    assert "brings no weights along" in capsys.readouterr().err
