"""The names in open_clip's registry, and everything open_clip does with a name."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import open_clip_elip
from open_clip_elip import TextFirstCLIP, TextFirstCustomTextCLIP, without_token_reduction
from open_clip_elip.reduction import METHODS

from .tiny import REDUCTION, TEXT, VISION, assert_one_sentence, config, enliven, pairs

NAMES = [
    "ViT-S-16-ELIP", "ViT-B-16-ELIP", "ViT-B-32-ELIP", "ViT-L-14-ELIP", "ViT-Ti-8-64-ELIP", "ViT-Nano-8-64-ELIP",
    "ViT-Pico-8-64-ELIP",
]  # fmt: skip
RIVALS = [f"ViT-{size}-16-{suffix}" for size in "SB" for suffix in ("EViT", "ToMe", "Random")]
SMALL = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT}


def small(name="ViT-S-16-ELIP", **options):
    """A registered model shrunk to toy size through open_clip's own overrides."""
    options = {**SMALL, "token_reduction": REDUCTION, "output_dict": True, **options}
    return open_clip.create_model(name, **options)


def save_weights(model, path):
    state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


@pytest.mark.parametrize("name", [*NAMES, *RIVALS])
def test_a_registered_model_is_the_plain_one_plus_reduction(name):
    options, plain_name = open_clip.get_model_config(name)["token_reduction"], name.rpartition("-")[0]
    method = METHODS[options.pop("method")]
    assert name == plain_name + method.suffix
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta")
        known = plain_name in open_clip.list_models()
        plain = open_clip.create_model(plain_name if known else name, device="meta", token_reduction=None)
    assert type(model) is TextFirstCLIP and type(model.reduction) is method and type(plain) is open_clip.CLIP
    assert method.Config.from_dict(options) == method.Config()  # the defaults
    expected = {key: value.shape for key, value in plain.state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == expected
    assert repr(without_token_reduction(model)) == repr(plain)  # same activations, heads, normalisation
    tags = open_clip.list_pretrained_tags_by_model
    assert not known or tags(name) == tags(plain_name)
    assert model.tower.rrt() > 0.25
    assert open_clip.get_tokenizer(name)(["a photo of a cat"]).shape == (1, model.context_length)


def test_the_quick_starts_model_from_end_to_end():
    model, preprocess_train, preprocess = open_clip.create_model_and_transforms("ViT-Ti-8-64-ELIP")
    tokenizer = open_clip.get_tokenizer("ViT-Ti-8-64-ELIP")
    picture = Image.new("RGB", (80, 100), (200, 30, 30))
    image = torch.stack([preprocess(picture), preprocess_train(picture)])
    text = tokenizer(["a red square", "a blue square"])
    assert image.shape == (2, 3, 64, 64)
    assert text.shape == (2, model.context_length)
    assert model.tower.token_counts() == [65] + [1 + 57 + 1] + [1 + 41 + 1] * 3 + [1 + 25 + 1]
    image_features, text_features, _ = model(image, text)
    assert image_features.shape == text_features.shape
    assert image_features.isfinite().all()


@pytest.mark.parametrize(
    ("name", "token_reduction", "sentence"),
    [
        ("ViT-S-16-ELIP", {"method": "tomes"}, "tomes"),
        ("ViT-S-16-ELIP", {"method": "elip", "lamda": 0.5}, "lam"),
        ("ViT-S-16-ELIP", {"method": "elip", "lam": 3}, "lam"),
        ("RN50", {"method": "elip"}, "OpenCLIP"),
        ("coca_ViT-B-32", {"method": "elip"}, "CoCa"),
    ],
)
def test_what_cannot_be_created_is_one_sentence(name, token_reduction, sentence):
    with pytest.raises(ValueError, match=sentence) as error, torch.device("meta"):
        open_clip.create_model(name, device="meta", token_reduction=token_reduction)
    assert_one_sentence(error)


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_local_dir(tmp_path, weights, custom_text):
    model_cfg = config(token_reduction=REDUCTION, custom_text=custom_text)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    original = small(token_reduction=REDUCTION, force_custom_text=custom_text).eval()
    enliven(original)
    save_weights(original, tmp_path / weights)

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}", output_dict=True)
    assert type(model) is type(original) is (TextFirstCustomTextCLIP if custom_text else TextFirstCLIP)
    assert preprocess(Image.new("RGB", (50, 60))).shape == (3, 32, 32)
    assert open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["a cat"]).shape == (1, 12)
    image, text = pairs(dtype=torch.float32)
    torch.testing.assert_close(model.eval()(image, text), original(image, text), rtol=0, atol=0)
    torch.testing.assert_close(model.train()(image, text), original.train()(image, text), rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"epoch": 3, "state_dict": state}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_load_both_ways_by_path(tmp_path, prefix, wrap):
    plain = open_clip.create_model("ViT-S-16", **SMALL, output_dict=True).eval()
    enliven(plain)
    path = tmp_path / "epoch_3.pt"
    torch.save(wrap({prefix + name: value for name, value in plain.state_dict().items()}), path)
    image, text = pairs(dtype=torch.float32)

    model = small(pretrained=str(path)).eval()
    model.tower.shortcuts = False
    torch.testing.assert_close(model(image, text), plain(image, text), rtol=0, atol=0)

    torch.save(wrap({prefix + name: value for name, value in model.state_dict().items()}), path)
    again = open_clip.create_model("ViT-S-16", **SMALL, pretrained=str(path), output_dict=True).eval()
    assert type(again) is open_clip.CLIP
    torch.testing.assert_close(again(image, text), plain(image, text), rtol=0, atol=0)


def test_a_checkpoint_of_another_resolution_is_interpolated(tmp_path):
    path = tmp_path / "plain.pt"
    torch.save(open_clip.create_model("ViT-S-16", **SMALL).state_dict(), path)
    larger = small(vision_cfg={**VISION, "image_size": 48}, pretrained=str(path))
    assert larger.visual.positional_embedding.shape[0] == 1 + 36
    larger(*pairs(2, 48, torch.float32))["image_features"].sum().backward()


BEFORE_AND_AFTER = f"""
import torch, open_clip
SMALL = {SMALL!r}

def build(name, **options):
    torch.manual_seed(3)
    model = open_clip.create_model(name, **SMALL, **options).eval()
    torch.manual_seed(4)
    image, text = torch.randn(2, 3, 32, 32), torch.randint(1, 64, (2, 12))
    return model, model(image, text)

cases = [("ViT-B-16", {{}}), ("ViT-B-16", {{"force_custom_text": True}})]
before = [build(name, **options) for name, options in cases]
known = set(open_clip.list_models())
import open_clip_elip
for (name, options), (model, output) in zip(cases, before):
    other, other_output = build(name, **options)
    assert type(other) is type(model), (type(other), type(model))
    assert type(other) is (open_clip.model.CustomTextCLIP if options else open_clip.model.CLIP)
    assert isinstance(other, open_clip.CustomTextCLIP if options else open_clip.CLIP)
    assert all(torch.equal(a, b) for a, b in zip(output, other_output))
added = set(open_clip.list_models()) - known
open_clip_elip.registry.register()
assert known | added == set(open_clip.list_models())
print(sorted(added))
"""


def test_plain_models_are_the_same_before_and_after_the_import():
    source = str(Path(open_clip_elip.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {source!r})\n" + BEFORE_AND_AFTER
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    own = {"ALBEF": ("B-16",), "BLIP": ("B-16", "L-16"), "METER": ("B-16", "B-32")}
    sizes = [f"{family}-{size}" for family, found in own.items() for size in (*found, "Nano-8-64")]
    fusion = [f"{size}{elip}" for size in sizes for elip in ("", "-ELIP")]
    assert done.stdout.strip() == str(sorted([*NAMES, *RIVALS, *fusion]))
