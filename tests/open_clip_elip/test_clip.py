"""Text-first models: what guides what, in which mode, and where gradients go."""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F

from open_clip_elip import TextFirstCLIP, TextFirstCustomTextCLIP, with_token_reduction, without_token_reduction

from . import reference
from .tiny import REDUCTION, TEXT, VISION, contrastive_loss, gradients, pairs, plain_model

OPTIONS = {key: tuple(value) for key, value in REDUCTION.items() if key != "method"}
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(params=[False, True], ids=["CLIP", "CustomTextCLIP"])
def custom_text(request):
    return request.param


def text_first(plain, **options):
    return with_token_reduction(plain, **{**OPTIONS, **options})


def backward(model, image, text, loss=contrastive_loss):
    """Loss and every parameter's gradient, from a clean slate."""
    model.zero_grad()
    value = loss(model(image, text))
    value.backward()
    return value.detach(), gradients(model)


def assert_same_gradients(ours, expected, **tolerance):
    assert ours.keys() == expected.keys()
    for name in expected:
        assert (ours[name] is None) == (expected[name] is None), name
        if expected[name] is not None:
            torch.testing.assert_close(ours[name], expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def by_reference(model, image, text, **options):
    """OpenCLIP's output dict with image features from the literal reference."""
    visual = model.visual
    text_features = model.encode_text(text, normalize=True)
    guidance = (text_features @ visual.proj.T).detach()
    x, traces, _ = reference.run(visual.transformer.resblocks, visual._embeds(image), guidance, **OPTIONS, **options)
    pooled, _ = visual._pool(x)
    assert any(trace.kept is not None for trace in traces)
    return {
        "image_features": F.normalize(pooled @ visual.proj, dim=-1),
        "text_features": text_features,
        "logit_scale": model.logit_scale.exp(),
    }


@pytest.mark.parametrize("options", [{}, {"text_scale": "none"}, {"lam": 0.0}, {"merge": False}, {"scoring_depth": 1}])
def test_training_is_the_reference_guided_by_the_caption(custom_text, options):
    plain = plain_model(custom_text)
    model = text_first(plain, **options)
    image, text = pairs()
    expected = by_reference(plain, image, text, **options)
    torch.testing.assert_close(model(image, text), expected, **EXACT)

    loss, grads = backward(model, image, text)
    plain.zero_grad()
    expected_loss = contrastive_loss(expected)
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss.detach(), **EXACT)
    assert_same_gradients(grads, gradients(plain), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "vision",
    [
        {"pool_type": "avg"},
        {"final_ln_after_pool": True},
        {"no_ln_pre": True},
        {"ls_init_value": 0.1},
        {"pos_embed_type": "sin_cos_2d"},
        {"head_width": 32, "mlp_ratio": 2.0},
    ],
)
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
    image, text = pairs()
    expected_loss, expected = backward(plain, image, text)
    loss, grads = backward(model, image, text)
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    assert_same_gradients(grads, expected, **EXACT)
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
    assert "\n" not in str(error.value)


def test_guidance_is_the_text_feature_through_the_transposed_projection(custom_text):
    model = text_first(plain_model(custom_text))
    _, text = pairs()
    text_features = model.encode_text(text, normalize=True)
    guidance = model.guidance_from_text(text_features)
    torch.testing.assert_close(guidance, text_features.detach() @ model.visual.proj.detach().T, **EXACT)
    assert not guidance.requires_grad


def test_no_gradient_reaches_the_text_tower_through_the_image(custom_text):
    model = text_first(plain_model(custom_text), lam=0.3)
    image, text = pairs()
    model(image, text)["image_features"].square().mul(torch.rand(20, dtype=torch.float64)).sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("visual."):
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is None or not parameter.grad.any(), name


def test_gradient_checkpointing_changes_no_number_but_recomputes(custom_text):
    model = text_first(plain_model(custom_text))
    image, text = pairs()
    loss, grads = backward(model, image, text)

    model.set_grad_checkpointing()
    runs = []
    model.visual.transformer.resblocks[0].register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    checkpointed_loss, checkpointed = backward(model, image, text)
    torch.testing.assert_close(checkpointed_loss, loss, rtol=0, atol=1e-12)
    assert_same_gradients(checkpointed, grads, rtol=0, atol=1e-12)
    assert len(runs) == 2

    model.set_grad_checkpointing(False)
    runs.clear()
    backward(model, image, text)
    assert len(runs) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("tower", "unlocked"), [("image", 0), ("image", 1), ("image", 4), ("text", 0), ("text", 1)])
def test_a_locked_tower_gets_no_gradient_and_changes_no_other(custom_text, tower, unlocked, checkpointing):
    model = text_first(plain_model(custom_text))
    image, text = pairs()
    loss, everything = backward(model, image, text)
    model.lock_image_tower(unlocked) if tower == "image" else model.lock_text_tower(unlocked)
    model.set_grad_checkpointing(checkpointing)
    locked_loss, grads = backward(model, image, text)
    torch.testing.assert_close(locked_loss, loss, **EXACT)
    expected = {n: grad if model.get_parameter(n).requires_grad else None for n, grad in everything.items()}
    assert any(grad is None for grad in expected.values()) and any(grad is not None for grad in expected.values())
    assert_same_gradients(grads, expected, **EXACT)


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


def test_a_deep_copy_is_independent(custom_text):
    model = text_first(plain_model(custom_text))
    twin = copy.deepcopy(model)
    image, text = pairs()
    expected = model(image, text)
    torch.testing.assert_close(twin(image, text), expected, rtol=0, atol=0)
    with torch.no_grad():
        twin.visual.proj.zero_()
    torch.testing.assert_close(model(image, text), expected, rtol=0, atol=0)


def build_resnet():
    return open_clip.CLIP(20, {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 32}, TEXT)


def build_timm():
    return open_clip.CLIP(20, {"timm_model_name": "resnet10t", "image_size": 32, "timm_pool": "avg"}, TEXT)


def build_custom_block():
    return plain_model(vision={"qk_norm": True})


def build_attentional_pool():
    return plain_model(vision={"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4})


def build_coca():
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    return open_clip.CoCa(24, {"width": 24, "heads": 2, "layers": 1, "context_length": 12}, text, vision)


@pytest.mark.parametrize(
    "build", [build_resnet, build_timm, build_custom_block, build_attentional_pool, build_coca, torch.nn.Identity]
)
def test_a_model_that_cannot_be_reduced_is_refused_in_one_sentence(build):
    model = build()
    with pytest.raises(ValueError) as error:
        with_token_reduction(model)
    assert len(str(error.value)) > 20 and "\n" not in str(error.value)
