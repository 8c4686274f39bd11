"""Text-first models: what guides what, in which mode, and where gradients go."""

import copy

import open_clip
import pytest
import torch

from open_clip_elip import TextFirstCLIP, TextFirstCustomTextCLIP, with_token_reduction, without_token_reduction

from . import reference
from .tiny import (
    REDUCTION,
    TEXT,
    VISION,
    assert_images_train_their_own_tower_only,
    assert_one_sentence,
    pairs,
    plain_model,
    step,
)  # fmt: skip

OPTIONS = {key: tuple(value) for key, value in REDUCTION.items() if key != "method"}
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(params=[False, True], ids=["CLIP", "CustomTextCLIP"])
def custom_text(request):
    return request.param


def text_first(plain, **options):
    return with_token_reduction(plain, **{**OPTIONS, **options})


def by_reference(plain, image, text, **options):
    def run(blocks, x, guidance):
        x, choices, _ = reference.run(blocks, x, guidance, **OPTIONS, **options)
        assert any(choices)
        return x

    return reference.output(plain, image, text, run)


@pytest.mark.parametrize("options", [{}, {"text_scale": "none"}, {"lam": 0.0}, {"merge": False}, {"scoring_depth": 1}])
def test_training_is_the_reference_guided_by_the_caption(custom_text, options):
    plain = plain_model(custom_text)
    model = text_first(plain, **options)
    image, text = pairs()
    expected = step(plain, image, text, lambda *batch: by_reference(plain, *batch, **options))
    torch.testing.assert_close(step(model, image, text), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("vision", [
    {"pool_type": "avg"}, {"final_ln_after_pool": True}, {"no_ln_pre": True}, {"ls_init_value": 0.1},
    {"pos_embed_type": "sin_cos_2d"}, {"head_width": 32, "mlp_ratio": 2.0},
])  # fmt: skip
def test_every_kind_of_vit(vision):
    plain = plain_model(vision=vision)
    image, text = pairs()
    torch.testing.assert_close(text_first(plain)(image, text), by_reference(plain, image, text), **EXACT)


def test_patch_dropout_comes_first():
    plain = plain_model(vision={"patch_dropout": 0.4})
    model = text_first(plain)
    image, text = pairs()
    torch.manual_seed(5)
    expected = by_reference(plain, image, text)
    torch.manual_seed(5)
    torch.testing.assert_close(model(image, text), expected, **EXACT)
    assert model.tower.token_counts() == model.reduction.token_counts(9)  # int(16 * 0.6)


@pytest.mark.parametrize(
    "what_to_keep", [{"keep_ratio": (1.0,) * 4}, {"keep_ratio": None, "keep_count": (99, 50, 20, 16)}]
)
def test_keeping_everything_is_plain_openclip(custom_text, what_to_keep):
    plain = plain_model(custom_text)
    model = text_first(plain, **what_to_keep)
    batch = pairs()
    torch.testing.assert_close(step(model, *batch), step(plain, *batch), **EXACT)
    assert model.tower.rrt() == 0


def test_evaluation_never_sees_the_caption(custom_text):
    plain = plain_model(custom_text).eval()
    model = text_first(plain).eval()
    model.tower.shortcuts = False  # bit for bit without, up to rounding with them: see test_shortcuts.py
    image, text = pairs(5)
    torch.testing.assert_close(model(image, text), plain(image, text), rtol=0, atol=0)
    torch.testing.assert_close(model(image, text[:2]), plain(image, text[:2]), rtol=0, atol=0)  # not pairs: fine here


@pytest.mark.parametrize("training", [True, False])
def test_one_tower_alone(custom_text, training):
    plain = plain_model(custom_text).train(training)
    model = text_first(plain).train(training)
    model.tower.shortcuts = False
    image, text = pairs()
    torch.testing.assert_close(model.encode_image(image), plain.encode_image(image), rtol=0, atol=0)
    torch.testing.assert_close(
        model.encode_image(image, normalize=True), plain.encode_image(image, normalize=True), rtol=0, atol=0
    )
    torch.testing.assert_close(model.encode_text(text), plain.encode_text(text), rtol=0, atol=0)
    only_image, only_text = model(image=image), model(text=text)
    assert only_image["text_features"] is None and only_text["image_features"] is None
    torch.testing.assert_close(only_image["image_features"], plain(image=image)["image_features"], rtol=0, atol=0)
    torch.testing.assert_close(only_text["text_features"], plain(text=text)["text_features"], rtol=0, atol=0)
    torch.testing.assert_close(model.get_logits(image, text), plain.get_logits(image, text), rtol=0, atol=0)


@pytest.mark.parametrize("output_dict", [True, False])
@pytest.mark.parametrize(
    "bias", [{}, {"init_logit_bias": -10.0}, {"init_logit_bias": -10.0, "nonscalar_logit_scale": True}]
)
def test_the_output_has_openclips_form(custom_text, bias, output_dict):
    plain = plain_model(custom_text, **bias)
    plain.output_dict = output_dict
    model = text_first(plain, keep_ratio=(1.0,) * 4)
    image, text = pairs()
    ours, expected = model(image, text), plain(image, text)
    assert type(ours) is type(expected)
    if output_dict:
        assert ours.keys() == expected.keys()
    torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize("captions", [1, 2, 4])
def test_training_needs_one_caption_per_image(custom_text, captions):
    model = text_first(plain_model(custom_text))
    image, text = pairs(4)
    with pytest.raises(ValueError, match="caption") as error:
        model(image[:3], text[:captions])
    assert_one_sentence(error)


def test_no_gradient_reaches_the_text_tower_through_the_image(custom_text):
    assert_images_train_their_own_tower_only(text_first(plain_model(custom_text), lam=0.3), pairs())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("tower", "unlocked"), [("image", 0), ("image", 1), ("image", 4), ("text", 0), ("text", 1)])
def test_a_locked_tower_gets_no_gradient_and_changes_no_other(custom_text, tower, unlocked, checkpointing):
    model = text_first(plain_model(custom_text))
    batch = pairs()
    output, everything = step(model, *batch)
    model.lock_image_tower(unlocked) if tower == "image" else model.lock_text_tower(unlocked)
    model.set_grad_checkpointing(checkpointing)
    expected = {n: grad if model.get_parameter(n).requires_grad else None for n, grad in everything.items()}
    assert any(grad is None for grad in expected.values()) and any(grad is not None for grad in expected.values())
    torch.testing.assert_close(step(model, *batch), (output, expected), **EXACT)


def test_the_two_versions_share_their_weights(custom_text):
    plain = plain_model(custom_text)
    before = copy.deepcopy(plain.state_dict())
    model = text_first(plain)
    assert not hasattr(plain, "reduction")
    assert type(model) is (TextFirstCustomTextCLIP if custom_text else TextFirstCLIP)
    assert isinstance(model, type(plain))
    again = without_token_reduction(model)
    assert type(again) is type(plain) is (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)
    for other in (model, again):
        assert list(other.state_dict()) == list(before)
        for name, parameter in plain.named_parameters():
            assert other.get_parameter(name) is parameter
        assert other.output_dict == plain.output_dict and other.training == plain.training
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.visual.proj.zero_()
    assert plain.logit_scale == 1.5 and not again.visual.proj.any()
    assert hasattr(model, "reduction") and not hasattr(again, "reduction")


def build_coca():
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    return open_clip.CoCa(24, {"width": 24, "heads": 2, "layers": 1, "context_length": 12}, text, vision)


REFUSED = {
    "ResNet": lambda: open_clip.CLIP(20, {"layers": [1] * 4, "width": 8, "head_width": 8, "image_size": 32}, TEXT),
    "timm": lambda: open_clip.CLIP(20, {"timm_model_name": "resnet10t", "image_size": 32, "timm_pool": "avg"}, TEXT),
    "another block": lambda: plain_model(vision={"qk_norm": True}),
    "attentional pooling": lambda: plain_model(
        vision={"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}
    ),
    "CoCa": build_coca,
    "no CLIP": torch.nn.Identity,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_reduced_is_refused_in_one_sentence(kind):
    model = REFUSED[kind]()
    with pytest.raises(ValueError) as error:
        with_token_reduction(model)
    assert_one_sentence(error)
