"""What goes wrong in silence when ALBEF is built from ready-made parts."""
from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from open_clip_elip import loading, weights
from open_clip_elip.fusion.bert import Tokens
from open_clip_elip.fusion.objectives import distilled, draw, negative_weights
from open_clip_elip.fusion.start import start_image, start_task
from open_clip_elip.fusion.steps import matching
from open_clip_elip.fusion.tokenizer import WordPieces, albef_caption, albef_question
from open_clip_elip.identity import Identity, ModelError, create

from ...training.fusion_runs import ALBEF, write_vocabulary


def albef(image_size: int = 32, reduction: dict | None = None, **text: object) -> torch.nn.Module:
    config = json.loads(json.dumps(ALBEF)) | {"token_reduction": reduction}
    config["vision_cfg"]["image_size"] = image_size
    config["text_cfg"]["bert"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **text}
    return create(Identity("albef", "x", config, {"size": (image_size, image_size)}))


def texts(*lengths: int) -> torch.Tensor:
    ids = torch.randint(5, 64, (len(lengths), max(lengths)))
    ids[:, 0] = 2
    return ids * (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None])


def test_the_first_token_sees_the_last_though_nothing_is_padded():
    model, text, image = albef(), texts(6, 6), torch.randn(2, 3, 32, 32)
    other = text.clone()
    other[:, -1] = (text[:, -1] - 5 + 1) % 59 + 5
    memory, fixed = model.read(model.image_states(image)), torch.randn(2, 6, 32)
    changed = fixed.clone()
    changed[:, -1] += 1
    a, b = (model.fuse(states, text, memory)[:, 0] for states in (fixed, changed))
    assert (a - b).abs().max() > 1e-4
    assert (model.text_states(text)[:, 0] - model.text_states(other)[:, 0]).abs().max() > 1e-4


def test_padding_is_not_seen_and_does_not_change_a_thing():
    model, text, image = albef(), texts(6, 4), torch.randn(2, 3, 32, 32)
    memory = model.read(model.image_states(image))
    short, long = (model.match(model.text_states(t), t, memory) for t in (text, F.pad(text, (0, 5))))
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-6)


def test_all_image_tokens_are_normalised_and_used_reduced_or_not():
    model, image = albef(reduction={"method": "elip", "keep_ratio": [1, 0.5, 0.5, 0.5]}), torch.randn(2, 3, 32, 32)
    whole = model.image_states(image)
    assert whole.shape == (2, 17, 32)
    visual = model.visual
    expected = visual.ln_post(visual.transformer(visual._embeds(image)))
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-6)
    reduced = model.train().image_states(image, torch.randn(2, 32))
    assert reduced.shape[1] == model.tower.token_counts()[-1] < 17
    torch.testing.assert_close(
        model.encode_image(image, reduce=False), model.vision_proj(whole[:, 0]), rtol=1e-5, atol=1e-6
    )
    loss = model.match(model.text_states(texts(4, 4)), texts(4, 4), model.read(reduced)).sum()
    loss.backward()
    assert visual.transformer.resblocks[-1].mlp.c_fc.weight.grad.abs().sum() > 0


def test_positions_are_resized_without_smoothing(tmp_path):
    large, small = albef(64), albef(32)
    torch.nn.init.normal_(large.visual.positional_embedding)
    old = large.visual.positional_embedding[1:].view(1, 8, 8, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(old, (4, 4), mode="bicubic", align_corners=False).flatten(2)[0].t()
    path = tmp_path / "large.pt"
    torch.save(large.state_dict(), path)
    loading.load(small, weights.read(str(path)), name="small", source=str(path))
    for model in (small, albef(32)):
        if model is not small:
            start_task(model, {"state_dict": large.state_dict()}, "large")
        torch.testing.assert_close(model.visual.positional_embedding[1:], expected, rtol=0, atol=1e-6)
        assert torch.equal(model.visual.positional_embedding[0], large.visual.positional_embedding[0])


def test_a_start_of_another_width_is_one_sentence(tmp_path):
    path = tmp_path / "deit.pth"
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 48), "head.weight": torch.zeros(10, 48)}}, path)
    with pytest.raises(ModelError, match=r"visual.class_embedding is \(48,\), here is \(32,\)"):
        start_image(albef(), str(path))


def test_texts_begin_with_cls_and_end_without_sep(tmp_path):
    tokenizer = WordPieces(str(write_vocabulary(tmp_path / "v")), 6)
    (tmp_path / "v" / "tokenizer_config.json").unlink()  # vocab.txt is enough
    assert tokenizer("A red, round THING!").tolist() == [[2, 5, 7, 13, 6, 0]]
    assert tokenizer(["a " * 9])[0].tolist() == [2, 5, 5, 5, 5, 5]  # `[CLS]` counts
    assert WordPieces(str(tmp_path / "v"), 6, lambda text: text)("red[SEP]").tolist() == [[2, 7, 3, 0, 0, 0]]


def test_cleaning_differs_between_captions_and_questions():
    text = 'A <person>\'s  "Dog-house"/shed, (no. 3)?\n'
    assert albef_caption(text) == "a persons dog house shed no 3"
    assert albef_caption(text, 2) == "a persons"
    assert albef_question("Is  it a dog-house?  ") == "is  it a dog house"


def test_rows_without_a_partner_are_left_out():
    own = torch.tensor([[True, True, False]] * 2 + [[False, False, True]])
    weights = negative_weights(torch.tensor([[0.0, 0.0, -1e9]] * 3), own)
    drawn = draw(weights)  # a softmax that underflows still finds the third
    assert drawn[:2].tolist() == [2, 2] and drawn[2] in (0, 1)
    assert draw(negative_weights(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))).tolist() == [-1, -1]
    assert draw(torch.full((2, 2), float("nan"))).tolist() == [-1, -1]
    model, text = albef(), texts(4, 4)
    memory, states = model.read(model.image_states(torch.randn(2, 3, 32, 32))), model.text_states(text)
    tokens = Tokens(model.mask(text))
    none, one = torch.tensor([-1, -1]), torch.tensor([1, -1])
    alone = F.cross_entropy(model.match(states, text, memory), torch.ones(2, dtype=torch.long))
    torch.testing.assert_close(matching(model, states, text, tokens, memory, none, none), alone)
    assert matching(model, states, text, tokens, memory, one, none) != alone


def test_a_batch_without_a_chosen_token_costs_nothing():
    logits = torch.randn(0, 7, requires_grad=True)
    loss = distilled(logits, torch.zeros(0, dtype=torch.long), logits.detach(), 0.4)
    assert loss == 0
    loss.backward()
