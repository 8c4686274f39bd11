"""Captions of CLIP that lose tokens halfway: against OpenCLIP's own blocks in float64; and what is counted of it."""
from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from open_clip_elip import TextFirstCLIP, cut_text
from open_clip_elip.identity import ModelError, create, describe
from open_clip_elip.profile import command
from open_clip_elip.profile.flops import count
from open_clip_elip.profile.fusion import QUEUE, make_step, words
from training.tasks.albef import AlbefPretraining
from training.tasks.blip import BlipPretraining
from training.tasks.meter import MeterPretraining

from .test_shortcuts import captions
from .tiny import config, enliven, pairs

LENGTHS = (12, 3, 7, 2, 5, 9)


def clip(rule: str | None, layers: int = 4, reduction: dict | None = None) -> TextFirstCLIP:
    torch.manual_seed(0)
    reductions = {"token_reduction": reduction, "text_reduction": rule and {"rule": rule, "keep": 0.6}}
    model = TextFirstCLIP(**config(text={"layers": layers}), output_dict=True, **reductions).double()
    enliven(model)
    return model.train()


def reference(model: TextFirstCLIP, ids: torch.Tensor, rule: str, draws: torch.Tensor) -> torch.Tensor:
    """Of one caption, without padding, (embed_dim,)."""
    n, blocks = len(ids), model.transformer.resblocks
    x = (model.token_embedding(ids) + model.positional_embedding[:n])[None]
    for number, block in enumerate(blocks):
        if number == len(blocks) // 2:
            order = sorted(range(n - 1), key=lambda i: i if rule == "post" else -draws[i])
            kept = sorted([*order[: max(1, int(0.6 * (n - 1)))], n - 1])
            assert len(kept) == 1 + max(1, (n - 1) * 3 // 5)
            x = x[:, kept]
        mask = torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
        x = block(x, attn_mask=mask)
    return model.ln_final(x[0, -1]) @ model.text_projection


@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("layers", [4, 5, 1])
@pytest.mark.parametrize("rule", ["post", "random"])
def test_captions_are_those_of_the_reference(rule, layers, shortcuts, monkeypatch):
    model, text = clip(rule, layers), captions(*LENGTHS)
    model.tower.shortcuts = shortcuts
    draws = torch.rand(6, 12)
    monkeypatch.setattr(torch, "rand", lambda shape, **more: draws[: shape[0], : shape[1]])
    order = sorted(range(6), key=lambda i: LENGTHS[i]) if shortcuts else range(6)  # they are cut, the shortest first
    row = {caption: place for place, caption in enumerate(order)}
    expected = [reference(model, text[i, :n], rule, draws[row[i]]) for i, n in enumerate(LENGTHS)]
    found = model.encode_text(text)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-11)
    weight = model.token_embedding.weight
    gradients = [torch.autograd.grad(one.sin().sum(), weight)[0] for one in (found, torch.stack(expected))]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def test_all_tokens_in_evaluation_and_where_all_of_the_image_are(monkeypatch):
    model, plain, (image, text) = clip("post", reduction={"method": "elip"}), clip(None), pairs(6)
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model.encode_text(text), plain.encode_text(text))
    model.tower.reduces = False  # --full-tokens-last
    assert torch.equal(model.encode_text(text), plain.encode_text(text))
    model.tower.reduces = True
    assert torch.equal(model.eval().encode_text(text), plain.eval().encode_text(text))
    features = F.normalize(model.train().encode_text(cut_text(text, model)), dim=-1)
    assert torch.equal(model(image, text)["text_features"], features)


def test_a_tower_that_cannot_is_refused():
    with pytest.raises(ModelError, match="text reduction is post or random"):
        create(describe("ViT-Pico-8-64-ELIP", text_reduction={"rule": "learned"}))
    with pytest.raises(ModelError, match="Text reduction needs OpenCLIP's own text tower"):
        create(describe("ViT-B-16-SigLIP", text_reduction={"rule": "post"}), device="meta")
    with pytest.raises(ModelError, match=r"keep must be a number in \(0, 1\]; got 2"):
        describe("ViT-Pico-8-64-ELIP", text_reduction={"rule": "post", "keep": 2})
    model = clip("post")
    model.transformer.resblocks[0].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="unchanged"):
        model.encode_text(captions(5))


# ---------------------------------------------------------------------- what it costs


class Pieces(list):
    """Of a tokenizer without words."""

    mask_token_id, all_special_ids = 4, (0, 2, 3)

    def convert_ids_to_tokens(self, ids):
        return list(ids)


def profile(folder, *models: str, length: int = 11) -> list[dict]:
    (folder / "lengths.txt").write_text(f"{length}\n")
    more = ["--no-time", "--device", "cpu", "--batch-size", "8", "--caption-lengths", str(folder / "lengths.txt")]
    assert command.main([*models, *more, "--json", str(folder / "cost.json")]) == 0
    return [one["flops"] for one in json.loads((folder / "cost.json").read_text())["models"]]


def test_the_profile_counts_captions_of_clip(tmp_path):
    """By hand: of 12 layers, 512 wide, 6 have 7 tokens of 11, of the last but the keys and values of these."""
    name = "ViT-B-16:shortcuts=true"
    whole, less = profile(tmp_path, name, f"{name},text_reduction=post")

    def layers(tokens: int, number: int) -> int:
        return number * (12 * 512**2 * tokens + 2 * 512 * tokens**2)

    saved = layers(11, 5) - layers(7, 5) + 4 * (2 * 512**2 + 2 * 512)
    assert whole["forward"] - less["forward"] == whole["text_forward"] - less["text_forward"] == 8 * 2 * saved
    assert less["backward"] < whole["backward"] and less["scoring"] == whole["scoring"] == 0


@pytest.mark.parametrize("family", ["ALBEF", "BLIP", "METER"])
def test_the_profile_counts_texts_of_fusion_models(family, tmp_path):
    name = f"{family}-Nano-8-64-ELIP"
    words = [name, *(f"{name}:text_reduction={rule}" for rule in ("post", "random", "learned"))]
    whole, post, random, learned = profile(tmp_path, *words)
    assert post == random and 0 < post["text_forward"] < whole["text_forward"]
    saved = whole["text_forward"] - post["text_forward"]
    if family == "BLIP":
        # 8 texts alone and 3 * 8 that look at images of 27 tokens: 4 of 11 tokens, 128 wide, in the last 2 of 4 layers.
        D, gone = 128, 11**2 - 7**2
        alone = 2 * (4 * 12 * D * D + 2 * D * gone)
        looking = 4 * 14 * D * D + 2 * D * gone + 2 * D * 4 * 27 + 4 * 2 * D * D + 2 * D * 4
        assert saved == 2 * 8 * (alone + 3 * looking)
    assert learned["teacher"] == post["teacher"] == whole["teacher"]
    scored = learned["scoring"] - post["scoring"]
    assert scored > 0 if family != "METER" else scored < 0  # whose images are scored once, not for each text
    assert learned["text_forward"] == post["text_forward"]


@pytest.mark.parametrize("rule", ["post", "learned"])
@pytest.mark.parametrize("family", ["ALBEF", "BLIP", "METER"])
def test_the_log_tells_what_a_batch_costs(family, rule):
    """To within less than a token a text, for shares are rounded."""
    model = create(describe(f"{family}-Nano-8-64-ELIP", text_reduction={"rule": rule}), device="meta").train()
    if family == "METER":
        task = MeterPretraining(model, SimpleNamespace(pieces=Pieces()))
    else:
        task = {"ALBEF": AlbefPretraining, "BLIP": BlipPretraining}[family](model, queue_size=QUEUE)
    text = words([21, 5, 9, 14, 11, 6], model)
    step = make_step(model, torch.empty(6, 3, 64, 64, device="meta"), text)
    chosen = (step.more if family == "METER" else step.targets)["chosen"]
    batch = {"text": text, "tokens": model.tokens_in(text), "image": step.batch[0], "chosen": chosen}
    counted = count(model, step.losses).total
    assert task.cost(batch).operations * 6 == pytest.approx(counted, rel=0.02)
    model.text_reduction = None
    assert task.cost(batch).operations * 6 < count(model, step.losses).total
