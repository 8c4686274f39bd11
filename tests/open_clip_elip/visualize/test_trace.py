"""What whoever watches a reduction is told, against what the tower does; and what that means for patches."""
from __future__ import annotations

import pytest
import torch

from open_clip_elip import identity as identities
from open_clip_elip import with_token_reduction
from open_clip_elip.reduction import Removal
from open_clip_elip.reduction.attention import add_mlp
from open_clip_elip.reduction.merge import best
from open_clip_elip.reduction.tome import destinations as merged_into
from open_clip_elip.reduction.tome import merge, soft_match
from open_clip_elip.visualize.trace import stages, text_guidance, trace

from ...training import fusion_runs
from ..tiny import REDUCTION, assert_one_sentence, pairs, plain_model, seeded

OPTIONS = {
    "elip": {key: value for key, value in REDUCTION.items() if key != "method"},
    "evit": {"layers": (1, 3), "keep_rate": 0.6},
    "tome": {"r": 3},
    "random": {"keep_ratio": 0.4},
}


def build(method, **more):
    model = plain_model()
    with torch.no_grad():
        for block in model.visual.transformer.resblocks:
            block.attn.in_proj_weight.mul_(4)
    return with_token_reduction(model, method, **OPTIONS[method] | more).eval()


@torch.no_grad()
def tokens(model, image, guidance):
    return seeded(lambda: model.tower.tokens(image, guidance, reduce=True))


@pytest.mark.parametrize("method", OPTIONS)
def test_to_watch_changes_no_number_and_all_removals_are_told(method):
    model, (image, text) = build(method), pairs(4)
    guidance = model.encode_text_and_guidance(text)[1] if method == "elip" else None
    alone, seen = tokens(model, image, guidance), []
    model.reduction.watch = seen.append
    assert torch.equal(tokens(model, image, guidance), alone)
    work = model.reduction.layers(16)
    lengths = [17, *(layer.mlp for layer in work)]
    if method in ("elip", "random"):  # before a layer
        lengths = [17, *(layer.attention for layer in work)]
    shorter = [(i, lengths[i], lengths[i + 1]) for i in range(4) if lengths[i + 1] < lengths[i]]
    assert [(one.layer, one.x.shape[1], 2 + int(one.into.max())) for one in seen] == shorter
    assert all(one.into.shape == (4, one.x.shape[1] - 1) for one in seen)


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("method", ["elip", "evit", "random"])
def test_what_goes_on_is_what_is_told(method, merges):
    more = {"elip": {"merge": merges}, "evit": {"fuse": merges}, "random": {}}[method]
    model, (image, text), seen, entered = build(method, **more), pairs(4), [], []
    model.reduction.watch = seen.append
    model.visual.transformer.resblocks[1 if method == "elip" else 0].register_forward_hook(
        lambda _, inputs, output: entered.append(output if method == "evit" else inputs[0])
    )
    tokens(model, image, text_guidance(model, text))
    first, after = seen[0], entered[-1]  # ELIP's scoring pass comes before
    kept = after.shape[1] - 1 - (merges and method != "random")
    for row in range(4):
        places = [(first.into[row] == token).nonzero().item() for token in range(kept)]
        assert places == sorted(places)
        expected = first.x[row, [0] + [1 + place for place in places]]
        if method == "evit":  # it is told between attention and MLP
            expected = add_mlp(model.visual.transformer.resblocks[0], expected)
        torch.testing.assert_close(after[row, : 1 + kept], expected, rtol=0, atol=1e-12)
        others = set(range(16)) - set(places)
        assert {first.into[row, place].item() for place in others} == {kept if after.shape[1] > 1 + kept else -1}
        if method != "random":
            assert places == best(first.scores[row : row + 1], kept)[0].tolist()


def test_pairs_that_merge():
    x, keys = torch.randn(3, 11, 4, dtype=torch.float64), torch.randn(3, 11, 5)
    match = soft_match(keys, 4)
    into = merged_into(11, *match)
    summed = torch.zeros(3, 7, 4, dtype=torch.float64).scatter_add(1, into.unsqueeze(-1).expand(-1, -1, 4), x)
    torch.testing.assert_close(summed, merge(x, *match), rtol=0, atol=1e-12)
    assert (into[:, 0] == 0).all() and (into[:, 1:] > 0).all()


def test_stages_by_hand():
    """Of 5 patches the first goes on merged with the third; then that token is dropped, and two others merge."""
    first = Removal(2, None, torch.tensor([[3, 0, 3, 1, 2]]), torch.tensor([[0.1, 0.3, 0.1, 0.2, 0.25]]))
    second = Removal(4, None, torch.tensor([[0, 1, 1, -1]]), torch.tensor([[0.4, 0.2, 0.1, 0.3]]))
    one, two = stages([first, second], 1, 5)
    assert (one.layer, two.layer) == (3, 5)
    assert one.kept.tolist() == [[False, True, False, True, True]]
    assert two.token.tolist() == [[-1, 0, -1, 1, 1]] and two.kept.tolist() == [[False, True, False, False, False]]
    assert one.scores.tolist()[0] == pytest.approx([0.1, 0.3, 0.1, 0.2, 0.25])
    nan = torch.nan
    expected = torch.tensor([[nan, 0.4, nan, 0.2, 0.1]])
    torch.testing.assert_close(two.scores, expected, equal_nan=True)


def test_captions_guide_elip_alone():
    image, text = pairs(3)
    for method in OPTIONS:
        model = build(method)
        one, other, alone = (seeded(trace, model, image, words) for words in (text, text.flip(0), None))
        same = [torch.equal(a.kept, b.kept) for of in (other, alone) for a, b in zip(one, of, strict=True)]
        assert all(same) == (method != "elip")
        assert model.reduction.watch is None


@pytest.mark.parametrize("config", [fusion_runs.ALBEF, fusion_runs.BLIP, fusion_runs.METER], ids=lambda c: c["family"])
def test_fusion_families_are_guided_as_in_training(config, tmp_path):
    name = fusion_runs.write_fusion(tmp_path / "model", config)
    model = identities.create(identities.describe(name)).eval()
    image, text = torch.randn(2, 3, 32, 32), torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    found = trace(model, image, text)
    assert [int(stage.kept[0].sum()) for stage in found][0] == 14 and len(found) == 3
    seen = []
    model.tower.reduction.watch = seen.append
    with torch.no_grad():
        model.image_states(image, model.text_states(text)[:, 0], reduce=True)
    expected = stages(seen, 2, 16)
    assert all(torch.equal(a.token, b.token) for a, b in zip(found, expected, strict=True))


def test_a_method_that_tells_nothing_is_one_sentence(half):
    model = with_token_reduction(plain_model(), "half").eval()
    with pytest.raises(identities.ModelError, match="Half does not tell") as error:
        trace(model, pairs()[0])
    assert_one_sentence(error)
