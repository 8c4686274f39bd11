"""CLIP of transformers: from its folders into OpenCLIP's models, and what has no place there."""
from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from open_clip_elip.hugging_face import from_transformers, to_transformers
from open_clip_elip.identity import Identity, ModelError, create, describe
from open_clip_elip.loading import load
from open_clip_elip.weights import find, read

from .tiny import enliven, pairs, plain_model

transformers = pytest.importorskip("transformers")
TOWER = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip_model(act: str = "quick_gelu", eos: int = 63, **text) -> nn.Module:
    text = TOWER | {"hidden_size": 24, "vocab_size": 64, "max_position_embeddings": 12, "hidden_act": act} | text
    ends = {"pad_token_id": 0, "bos_token_id": 62, "eos_token_id": eos}
    vision = TOWER | {"hidden_size": 32, "image_size": 32, "patch_size": 8, "hidden_act": act}
    config = transformers.CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=20)
    model = transformers.CLIPModel(config).eval()
    enliven(model)
    return model


@torch.no_grad()
def difference(theirs: nn.Module, own: nn.Module) -> float:
    image, text = pairs(dtype=torch.float32)
    expected, found = theirs(pixel_values=image, input_ids=text), own.eval()(image, text)
    features = (expected.image_embeds, "image_features"), (expected.text_embeds, "text_features")
    return max(float((of - found[name]).abs().max()) for of, name in features)


@pytest.mark.parametrize(("act", "eos"), [("quick_gelu", 63), ("gelu", 2), ("gelu", 61)])
def test_a_folder_is_a_model_and_weights_of_one(act, eos, tmp_path, monkeypatch):
    theirs = clip_model(act, eos)
    theirs.save_pretrained(tmp_path)
    pictures = transformers.CLIPImageProcessor(image_mean=[0.5] * 3, resample=2, size={"height": 32, "width": 32})
    pictures.save_pretrained(tmp_path)
    identity = describe(f"local-dir:{tmp_path}")
    assert identity.config["quick_gelu"] == (act == "quick_gelu")
    assert [identity.preprocess[key] for key in ("mean", "interpolation", "resize_mode", "size")] == [
        [0.5] * 3, "bilinear", "squash", [32, 32],
    ]  # fmt: skip
    content = read(find("ViT-B-32", str(tmp_path)))
    assert Identity.from_dict(content["model"]) == identity
    for source in (content, read(find(identity.name, None))):
        own = create(identity)
        assert not load(own, source, name=identity.name).sentences()
        if eos == 61:  # of two tokens, this one
            monkeypatch.setattr(f"{__name__}.pairs", lambda dtype: (torch.randn(1, 3, 32, 32), text_with(61)))
        assert difference(theirs, own) < 1e-6


def text_with(eos: int) -> torch.Tensor:
    return torch.tensor([[62, 5, eos, 63, 0, 0, 0, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("custom_text", [False, True])
def test_names_there_and_back(custom_text):
    own = plain_model(custom_text=custom_text).float()
    state = {name.removeprefix("text."): value for name, value in own.state_dict().items()}
    there = to_transformers(state)
    back = from_transformers(there | {"text_model.embeddings.position_ids": torch.zeros(1, 12)})
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    target = plain_model(custom_text=custom_text, quick_gelu=True).float()
    assert len(load(target, {"state_dict": {f"module.{name}": value for name, value in there.items()}}).loaded) > 9
    assert all(torch.equal(one, other) for one, other in zip(target.parameters(), own.parameters(), strict=True))
    with pytest.raises(ValueError, match="no place for logit_bias"):
        to_transformers(state | {"logit_bias": torch.zeros(1)})


def test_an_image_tower_alone():
    state = to_transformers(plain_model().float().state_dict())
    tower = {name: value for name, value in state.items() if name.startswith("vis")}
    report = load(target := plain_model().float(), tower, image_tower=True)
    assert torch.equal(target.visual.proj.t(), state["visual_projection.weight"]) and "text_projection" in report.new
    with pytest.raises(ModelError, match="holds an image tower without a text tower"):
        load(target, tower)


def test_weights_in_several_files(tmp_path):
    theirs = clip_model()
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert len(parts) > 2
    for source in (tmp_path, parts[1]):
        report = load(own := create(describe(f"local-dir:{tmp_path}")), read(source))
        assert difference(theirs, own) < 1e-6
        assert ("stands in the config.json" in " ".join(report.notes)) == (source != tmp_path)
    parts[0].unlink()
    with pytest.raises(ModelError, match=rf"is one of {len(parts)} files, of which {len(parts) - 1} are there"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "siglip"}, "it is a 'siglip' of transformers, where only 'clip'"),
        ({"model_type": None}, "its config.json is not of transformers"),
        ({"architecture": "vit_base_patch16_224"}, "it is timm's vit_base_patch16_224, an image tower without"),
        ({"text_config": {"hidden_act": "gelu"}}, "its towers differ in hidden_act"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, "its towers differ in layer_norm_eps"),
        ("{", "cannot be created"),
    ],
)
def test_other_models_are_one_sentence(changes, sentence, tmp_path):
    clip_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    found = json.loads(file.read_text())
    if isinstance(changes, dict):
        for key, value in changes.items():
            found[key] = found[key] | value if isinstance(value, dict) else value
    file.write_text(changes if isinstance(changes, str) else json.dumps(found))
    for use in (lambda: read(tmp_path), lambda: describe(f"local-dir:{tmp_path}")):
        with pytest.raises(ModelError, match=sentence) as error:
            use()
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_weights(tmp_path):
    clip_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        read(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="is missing"):
        load(plain_model(), read(tmp_path))
