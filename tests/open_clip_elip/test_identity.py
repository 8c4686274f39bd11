"""What a model is: from names and changes to a description, and from that alone back to the same model."""
from __future__ import annotations

import json
import logging
import shutil

import open_clip
import pytest
import torch
from PIL import Image

from open_clip_elip import TextFirstCLIP
from open_clip_elip.identity import Identity, ModelError, create, describe, differences, sibling, tokenizer, transform

from .tiny import REDUCTION, config

TINY = "ViT-Pico-8-64-ELIP"
CHANGES = [
    (TINY, {}),
    (TINY, {"token_reduction": {"method": "tome", "r": 2}, "force_custom_text": True, "force_patch_dropout": 0.5}),
    (TINY, {"force_image_size": [48], "force_context_length": 12, "force_quick_gelu": True, "image_mean": [0.5] * 3}),
    (TINY, {"init_logit_scale": 2.0, "init_logit_bias": -10.0, "image_std": [0.25] * 3}),
    ("ViT-S-16", {"force_image_size": (32, 48), "image_resize_mode": "longest", "image_interpolation": "bilinear"}),
    ("Tiny-RN", {"image_resize_mode": "squash"}),
    ("Tiny-CoCa", {}),
]


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    """Kinds of models that this package does not touch."""
    folder = tmp_path_factory.mktemp("models")
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
    coca = config(vision={"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True})
    coca["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    fusing = {"context_length": 12, "vocab_size": 64, "width": 24, "heads": 2, "layers": 1}
    coca |= {"multimodal_cfg": fusing, "custom_text": True}
    for name, content in (("Tiny-RN", config(vision=resnet)), ("Tiny-CoCa", coca)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    open_clip.add_model_config(folder)


@pytest.mark.parametrize(("name", "changes"), CHANGES)
def test_the_model_is_bit_for_bit_open_clips_own(name, changes):
    theirs = {k: v[0] if v == [48] else v for k, v in changes.items()}
    torch.manual_seed(1)
    expected, train, val = open_clip.create_model_and_transforms(name, output_dict=True, **theirs)
    drawn = torch.get_rng_state()
    identity = describe(name, **changes)
    torch.manual_seed(1)
    model = create(identity)
    assert torch.equal(torch.get_rng_state(), drawn)
    own, weights = model.state_dict(), expected.state_dict()
    assert list(own) == list(weights)
    unset = "text_decoder.text_projection"  # CoCa's, whatever was in memory
    assert all(torch.equal(own[key], weights[key]) for key in weights if key != unset)
    lists = str.maketrans("[]", "()")
    assert repr(transform(identity, train=True)) == repr(train).translate(lists)
    assert repr(transform(identity)) == repr(val).translate(lists)
    assert getattr(model, "output_dict", True)
    ids = tokenizer(identity)(["a red square"])
    context = changes.get("force_context_length")
    assert torch.equal(ids, open_clip.get_tokenizer(name, context_length=context)(["a red square"]))


def test_a_description_is_plain_and_enough(tmp_path):
    """After a round trip through JSON, and with the folder and the registry's name gone."""
    folder = tmp_path / "model"
    folder.mkdir()
    content = {"model_cfg": config(token_reduction=REDUCTION), "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "size": 7}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    identity = describe(f"local-dir:{folder}")
    shutil.rmtree(folder)
    again = Identity.from_dict(json.loads(json.dumps(identity.to_dict())))
    assert again == identity
    before = open_clip.list_models()
    model = create(again)
    assert type(model) is TextFirstCLIP
    assert model.visual.preprocess_cfg["mean"] == (0.1, 0.2, 0.3) and model.visual.preprocess_cfg["size"] == (32, 32)
    assert model.reduction.config.depths == (1, 1, 1, 1)
    assert tokenizer(again)(["a"]).shape == (1, 12)
    assert open_clip.list_models() == before
    with pytest.raises(ModelError, match="family 'other'"):
        Identity.from_dict({**identity.to_dict(), "family": "other"})


def test_an_architecture_may_say_how_pictures_are_brought_to_its_size():
    """ALBEF's are squeezed: the edges of a long one are still there."""
    picture = Image.new("RGB", (80, 20))
    picture.paste("white", (0, 0, 10, 20))
    for name in ("ALBEF-B-16", "ALBEF-B-16-ELIP", "ALBEF-Nano-8-64", "ALBEF-Nano-8-64-ELIP"):
        identity = describe(name, force_image_size=[32])
        seen = transform(identity)(picture)
        assert seen.shape == (3, 32, 32) and seen[0, :, 0].min() > 1.5 > -1.5 > seen[0, :, 8:].max()
        assert describe(name, image_resize_mode="longest").preprocess["resize_mode"] == "longest"


def test_shapes_without_numbers_and_a_precision():
    assert create(describe("ViT-L-14"), device="meta").visual.proj.device.type == "meta"
    assert create(describe(TINY), precision="pure_bf16").visual.proj.dtype == torch.bfloat16
    assert create(describe(TINY, token_reduction={"method": "none"})).reduction is None


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        (None, {"method": "elip", "keep_ratio": [1.0, 0.9, 0.65, 0.4], "lam": 0.6}),
        ({"lam": 0.5}, {"lam": 0.5, "keep_ratio": [1.0, 0.9, 0.65, 0.4]}),
        ({"method": "elip", "keep_count": [60, 50, 40, 30]}, {"keep_count": [60, 50, 40, 30]}),
        ({"method": "evit", "layers": 3}, {"method": "evit", "layers": [3]}),
        ({"method": "none", "lam": 0.5}, None),
    ],
)
def test_options_of_the_reduction_lie_on_top_of_the_models_own(given, resolved):
    found = describe(TINY, token_reduction=given).token_reduction
    if resolved is None:
        assert found is None
    else:
        assert found.items() >= resolved.items() or {k: found[k] for k in resolved} == resolved
        assert not {"keep_ratio", "keep_count"} <= found.keys()
    assert found == describe(TINY, token_reduction=found or {"method": "none"}).token_reduction


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("ViT-S-16-ELIPP", {}, "There is no model named 'ViT-S-16-ELIPP'; did you mean ViT-S-16-ELIP"),
        ("local-dir:nowhere", {}, "The model local-dir:nowhere cannot be created: .*No such file"),
        ("ViT-S-16", {"token_reduction": {"lam": 0.5}}, "ViT-S-16 has no token reduction for lam to change"),
        (TINY, {"token_reduction": {"method": "tomes"}}, "Unknown token reduction method 'tomes'; known are"),
        (TINY, {"token_reduction": {"lam": 3}}, "lam must be a number in"),
        (TINY, {"token_reduction": {"method": "evit", "lam": 0.5}}, "Unknown token_reduction option 'lam'"),
        (TINY, {"force_image_size": [64, 64, 64]}, "cannot be created"),
        (TINY, {"force_image_size": [64, 7]}, "are smaller than one patch: raise"),
        ("Tiny-RN", {"token_reduction": {"method": "elip"}}, "needs OpenCLIP's own ViT"),
    ],
)
def test_what_is_wrong_is_one_sentence(name, changes, sentence):
    with pytest.raises(ModelError, match=sentence) as error:
        create(describe(name, **changes))
    assert "\n" not in str(error.value)


def test_a_sibling_keeps_all_but_the_reduction():
    own = describe("ViT-S-16-ELIP", force_quick_gelu=True, image_mean=[0.5] * 3, token_reduction={"lam": 0.3})
    assert sibling(own, "ViT-S-16-ELIP") is own
    plain, tome = sibling(own, "ViT-S-16"), sibling(own, "ViT-S-16-ToMe")
    assert plain.token_reduction is None and tome.token_reduction["method"] == "tome"
    for other in (plain, tome):
        assert other.preprocess == own.preprocess and other.config["quick_gelu"]
    assert sibling(own, "ViT-B-16") is None
    assert differences(own, describe("ViT-S-16")) == [
        "mean [0.5, 0.5, 0.5] (not [0.48145466, 0.4578275, 0.40821073])", "quick_gelu True (not False)",
    ]  # fmt: skip


def test_a_tag_brings_its_preprocessing_and_a_warning_of_another_activation(caplog):
    with caplog.at_level(logging.WARNING):
        identity = describe("ViT-B-16-SigLIP", pretrained="webli")
    assert identity.preprocess["mean"] == [0.5] * 3 and not caplog.records
    describe("ViT-B-32", pretrained="openai")
    assert "add --force-quick-gelu" in caplog.text
