"""Text tokens that go halfway: fusion models against a reference in float64, one text at a time, without padding."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from open_clip_elip.fusion.shorter import Shortening
from open_clip_elip.fusion.steps import meter_logits
from open_clip_elip.identity import Identity, ModelError, create
from open_clip_elip.reduction.text import RULES, TextReduction

from ...training.fusion_runs import ALBEF, BLIP, METER

LENGTHS, KEEP = (9, 2, 6, 4), 0.6
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def build(config: dict, rule: str | None, shortcuts: bool = True, **changes) -> torch.nn.Module:
    config = copy.deepcopy(config | changes)
    for bert in (config["text_cfg"]["bert"], config["text_cfg"].get("fusion", {})):
        bert |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    config["text_reduction"] = None if rule is None else {"rule": rule, "keep": KEEP}
    torch.manual_seed(0)
    model = create(Identity(config["family"], "x", config, {"size": (32, 32)})).double().train()
    model.tower.shortcuts = shortcuts
    return model


def texts() -> torch.Tensor:
    ids = torch.randint(5, 60, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 2
    return ids * (torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None])


def draws(shape: tuple[int, int], **more) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **more: DRAWS[tuple(shape)])


DRAWS = {(count, 9): draws((count, 9)) for count in (4, 8, 12)}


# ---------------------------------------------------------------------- the reference


def attention(own, asking, seen) -> torch.Tensor:
    """(heads, n, m)"""
    q, k = (x.view(len(x), own.num_attention_heads, -1).transpose(0, 1) for x in (own.query(asking), own.key(seen)))
    return (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).softmax(dim=2)


def attend(module, x, seen) -> torch.Tensor:
    weights = attention(module.self, x, seen)
    values = module.self.value(seen).view(len(seen), len(weights), -1).transpose(0, 1)
    return module.output((weights @ values).transpose(0, 1).flatten(1), x)


def layer_of(layer, x, image=None) -> torch.Tensor:
    x = attend(layer.attention, x, x)
    x = x if image is None else attend(layer.crossattention, x, image)
    return layer.output(layer.intermediate(x), x)


def left(rule: str, layer, x, clue, drawn, stays=()) -> list[int]:
    """Which of a text's tokens (n, D) stay."""
    n = len(x)
    if rule == "learned":
        asking = clue / clue.norm() * x[0].norm()
        scores = attention(layer.attention.self, asking[None], x).mean(dim=0)[0]
    else:
        scores = drawn if rule == "random" else -torch.arange(n)
    others = sorted((i for i in range(1, n) if i not in stays), key=lambda i: -scores[i])
    count = max(int(KEEP * (n - 1)), 1, len(stays)) - len(stays)
    return sorted([0, *stays, *others[:count]])


def through(rule, layers, half, x, image=None, clue=None, drawn=None, stays=()) -> tuple[torch.Tensor, list[int]]:
    for layer in layers[:half]:
        x = layer_of(layer, x, image)
    where = list(range(len(x))) if rule is None else left(rule, layers[half], x, clue, drawn, stays)
    x = x[where]
    for layer in layers[half:]:
        x = layer_of(layer, x, image)
    return x, where


# ---------------------------------------------------------------------- the models


def parts(model) -> tuple:
    text, pictures = texts(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    states = model.image_states(pictures, reduce=True)
    return text, pictures, states, model.tokens_in(text)


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["blip", "albef"])
def test_alignment_is_that_of_the_reference(family, rule, shortcuts):
    model = build({"blip": BLIP, "albef": ALBEF}[family], rule, shortcuts)
    text, _, images, tokens = parts(model)
    how = model.shortening()._replace(clue=model.clue(images))
    blip, embed, encoder = family == "blip", model.text.embeddings, model.text.encoder.layer
    begun = text.clone()
    begun[:, 0] = 63 if blip else 2
    states = model.text_states(text, tokens, how=how)
    for b, n in enumerate(LENGTHS):
        x, _ = through(rule if blip else None, encoder, 2, embed(text[b : b + 1, :n])[0], None, images[b, 0],
                       DRAWS[4, 9][b])  # fmt: skip
        torch.testing.assert_close(states[b, 0], x[0], **CLOSE)

    # Pairs as ITM has them: each image with two texts, then each text with another image.
    memory, which = model.read(images), torch.tensor([1, 2, 3, 0])
    of = torch.tensor([0, 2, 1, 0, 2, 3, 3, 1, 0, 1, 2, 3])
    looks = [0, 0, 1, 1, 2, 2, 3, 3, 1, 2, 3, 0]
    logits = model.match(states, text, memory, which, texts=of, tokens=tokens, how=how)
    weight, expected = embed.word_embeddings.weight, []
    for p, (b, i) in enumerate(zip(of.tolist(), looks, strict=True)):
        if blip:
            layers, half, x = encoder, 2, embed(begun[b : b + 1, : LENGTHS[b]])[0]
        else:
            layers, half, x = model.fusion, 0, states[b, : LENGTHS[b]]
        x, where = through(rule, layers, half, x, images[i], images[i, 0], DRAWS[12, 9][p])
        assert len(where) == {9: 5, 2: 2, 6: 4, 4: 2}[LENGTHS[b]]
        expected.append(model.itm_head(x[0]))
    both = logits, torch.stack(expected)
    torch.testing.assert_close(*both, **CLOSE)
    gradients = [torch.autograd.grad(one.sin().sum(), weight, retain_graph=True)[0] for one in both]
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_masked_words_of_albef_stay(rule, shortcuts):
    model = build(ALBEF, rule, shortcuts)
    text, _, images, tokens = parts(model)
    chosen = torch.tensor([4, 7, 8, 19, 27 + 1, 27 + 2, 27 + 3])  # of the last text more than the rule keeps
    how = model.shortening()._replace(clue=model.clue(images))
    logits = model.words(text, chosen, model.read(images), tokens, how)
    expected = []
    for b, n in enumerate(LENGTHS):
        stays = [place - 9 * b for place in chosen.tolist() if place // 9 == b]
        x, _ = through(None, model.text.encoder.layer, 2, model.text.embeddings(text[b : b + 1, :n])[0])
        x, where = through(rule, model.fusion, 0, x, images[b], images[b, 0], DRAWS[4, 9][b], stays)
        assert len(where) == (5, 2, 4, 4)[b]
        expected.append(model.mlm_head(x[[where.index(place) for place in stays]][None])[0])
    torch.testing.assert_close(logits, torch.cat(expected), **CLOSE)


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_meter_is_that_of_the_reference(rule, shortcuts):
    model = build(METER, rule, shortcuts)
    text, pictures, alone, tokens = parts(model)
    masked, chosen, seen = text.clone(), torch.tensor([4, 7, 19, 28, 29, 30]), torch.tensor([2, 1, 3, 3])
    masked.view(-1)[chosen] = 4
    words, judged = meter_logits(model, pictures, text, masked=masked, chosen=chosen, seen=seen, tokens=tokens)
    found = []
    for ids, looks, all_stay in ((masked, [0, 1, 2, 3], chosen.tolist()), (text, seen.tolist(), [])):
        for b, n in enumerate(LENGTHS):
            i, stays = looks[b], [place - 9 * b for place in all_stay if place // 9 == b]
            x = model.text.embeddings(ids[b : b + 1, :n])[0]
            x, where = through(rule, model.text.encoder.layer, 1, x, None, alone[i, 0], DRAWS[4, 9][b], stays)
            image = alone[i]  # where it chooses, by itself; else by the caption, which has no part in another's image
            if rule != "learned":
                image = model.image_states(pictures[i : i + 1], x[:1].detach(), reduce=True)[0]
            t = model.cross_modal_text_transform(x) + model.token_type_embeddings.weight[0]
            v = model.image_stream(image[None])[0]
            for of_text, of_image in zip(model.cross_modal_text_layers, model.cross_modal_image_layers, strict=True):
                t, v = layer_of(of_text, t, v), layer_of(of_image, v, t)
            both = torch.cat([model.cross_modal_text_pooler(t[None]), model.cross_modal_image_pooler(v[None])], dim=1)
            found.append((model.mlm_head(t[[where.index(place) for place in stays]]), model.itm_head(both)))
    torch.testing.assert_close(words, torch.cat([one for one, _ in found[:4]]), **CLOSE)
    torch.testing.assert_close(judged, torch.cat([one for _, one in found[4:]]), **CLOSE)


@pytest.mark.parametrize("rule", RULES)
def test_in_evaluation_all_tokens_stay(rule):
    text, pictures, whole = texts(), torch.randn(4, 3, 32, 32, dtype=torch.float64), []
    for one in (None, rule):
        model = build(METER, one).eval()
        more = {"masked": text, "chosen": torch.tensor([4]), "seen": torch.arange(4)}
        whole.append(meter_logits(model, pictures, text, **more, tokens=model.tokens_in(text)))
    assert all(torch.equal(a, b) for a, b in zip(*whole, strict=True))


def test_widths_may_differ_where_there_are_projections():
    wide = BLIP["vision_cfg"] | {"width": 48}
    model = build(BLIP, "learned", vision_cfg=wide)
    states = torch.randn(2, 5, 48, dtype=torch.float64)
    expected = F.normalize(model.vision_proj(states[:, 0]), dim=1) @ model.text_proj.weight
    torch.testing.assert_close(model.clue(states), expected, **CLOSE)
    assert model.text_states(texts(), how=Shortening(model.text_reduction, torch.randn(4, 32).double())).shape[1] == 9
    with pytest.raises(ModelError, match="take --text-reduction post or random"):
        build(METER, "learned", vision_cfg=METER["vision_cfg"] | {"width": 48}, token_reduction=None)
    with pytest.raises(ModelError, match="take a fusion_layer of at most 2"):
        build(ALBEF, "post", text_cfg=ALBEF["text_cfg"] | {"fusion_layer": 3})


def test_how_many_stay():
    kept = [TextReduction("post", 0.6).kept(n) for n in range(1, 12)]
    assert kept == [1, *(1 + max(1, n * 3 // 5) for n in range(1, 11))]
    assert [TextReduction("post", share).kept(11) for share in (0.1, 0.3, 0.7, 1)] == [2, 4, 8, 11]
