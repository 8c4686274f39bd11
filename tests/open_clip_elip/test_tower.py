"""The image tower: what it answers in every mode, whose it is, and a method of one's own in it."""
from __future__ import annotations

import copy

import open_clip
import pytest
import torch

from open_clip_elip import ImageTower, with_shortcuts, with_token_reduction, without_token_reduction
from open_clip_elip.registry import plain_name

from .tiny import REDUCTION, config, pairs, plain_model

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
GUIDANCE = torch.linspace(-1, 1, 96, dtype=torch.float64).view(3, 32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("method", [None, "elip", "evit", "tome", "random"])
def test_all_tokens_in_every_mode_and_what_is_pooled_of_them(method, shortcuts, training):
    plain, (image, _) = plain_model().train(training), pairs()
    model = with_shortcuts(plain) if method is None else with_token_reduction(plain, method)
    tower, visual = model.tower, model.visual
    tower.shortcuts = shortcuts
    full = visual.transformer(visual._embeds(image))
    torch.testing.assert_close(tower.tokens(image), full, **CLOSE)
    for guidance, reduce in ((None, None), (None, True), (GUIDANCE, None), (GUIDANCE, False)):
        is_reduced = method is not None and (reduce or (reduce is None and guidance is not None))
        torch.manual_seed(1)
        if is_reduced and method == "random" and not (training or reduce):
            with pytest.raises(ValueError, match="training only"):
                tower.tokens(image, guidance, reduce=reduce)
            continue
        tokens = tower.tokens(image, guidance, reduce=reduce)
        assert tokens.shape == (3, tower.reduction.layers(16)[-1].mlp if is_reduced else 17, 32)
        pooled = visual.ln_post(tokens)[:, 0]
        torch.manual_seed(1)
        torch.testing.assert_close(tower.pooled(image, guidance, reduce=reduce), pooled, **CLOSE)
        torch.manual_seed(1)
        torch.testing.assert_close(tower.features(image, guidance, reduce=reduce), pooled @ visual.proj, **CLOSE)


def test_its_switches():
    tower, image = with_token_reduction(plain_model(), **REDUCTION).tower, pairs()[0]
    full, reduced = tower.tokens(image), tower.tokens(image, reduce=True)
    assert tower.token_counts() == [17, 14, 10, 6] and tower.rrt() == pytest.approx(1 - 47 / 68)
    tower.vision_guided = True
    assert torch.equal(tower.tokens(image), reduced)
    tower.reduces = False
    assert torch.equal(tower.tokens(image, GUIDANCE), full) and torch.equal(tower.tokens(image, reduce=True), reduced)
    assert tower.token_counts() == [17] * 4 and tower.rrt() == 0
    alone = ImageTower(tower.visual)
    assert alone.token_counts() == [17] * 4 and torch.equal(alone.tokens(image, GUIDANCE), full)


def test_another_kind_of_tower_answers_features_only():
    visual = torch.nn.Flatten()
    image = torch.randn(2, 3, 4, 4)
    assert torch.equal(ImageTower(visual).features(image), visual(image))
    for question in (ImageTower(visual).tokens, ImageTower(visual).pooled):
        with pytest.raises(ValueError, match="Flatten"):
            question(image)


def test_copies_and_twins_have_their_own():
    plain = plain_model()
    short = with_shortcuts(plain)
    model = with_token_reduction(short, **REDUCTION)
    towers = [short.tower, model.tower, copy.deepcopy(model).tower, with_token_reduction(model).tower]
    assert len({id(tower) for tower in towers}) == 4 and short.tower.reduction is None
    assert not hasattr(plain, "tower") and "_tower" not in vars(without_token_reduction(model))
    twin = copy.deepcopy(model)
    assert twin.tower.visual is twin.visual is not model.visual
    batch = pairs()
    expected = model(*batch)
    torch.testing.assert_close(twin(*batch), expected, rtol=0, atol=0)
    torch.nn.init.zeros_(twin.visual.proj)
    torch.testing.assert_close(model(*batch), expected, rtol=0, atol=0)
    model.visual = plain_model().visual  # another one in its place
    assert model.tower.visual is model.visual and short.tower.visual is short.visual


def test_a_method_is_one_class_and_one_registration(half):
    """Proof by use: nothing but the fixture knows of it."""
    towers = config()
    made = open_clip.create_model(
        "ViT-S-16", **towers, token_reduction={"method": "half", "share": 0.25}, output_dict=True
    )
    for model, share in ((made, 0.25), (with_token_reduction(plain_model().float(), "half"), 0.5)):
        assert type(model.reduction) is half and model.tower.rrt() == pytest.approx(1 - (1 + share * 16) / 17)
        image, text = pairs(dtype=torch.float32)
        visual = model.visual
        x = visual.transformer(visual._embeds(image)[:, : 1 + int(share * 16)])
        expected = torch.nn.functional.normalize(visual._pool(x)[0] @ visual.proj, dim=-1)
        torch.testing.assert_close(model.train()(image, text)["image_features"], expected, rtol=1e-4, atol=1e-5)
    assert plain_name("ViT-X-Half") == "ViT-X"
    with pytest.raises(ValueError, match="'share'"):
        with_token_reduction(plain_model(), "half", shares=0.25)
