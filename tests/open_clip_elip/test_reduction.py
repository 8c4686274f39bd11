"""The reduction against the literal reference: kept tokens, features, gradients."""

from unittest.mock import patch

import pytest
import torch
from torch import nn

from open_clip_elip.reduction import Elip, ElipConfig
from open_clip_elip.reduction.elip import cls_attention
from open_clip_elip.reduction.merge import keep_and_merge

from . import reference
from .tiny import random_blocks

WIDTH = 16

SCHEDULES = {
    "12 layers": ((2, 2, 6, 2), (1.0, 0.9, 0.65, 0.4)),
    "11 layers": ((2, 2, 5, 2), (1.0, 0.9, 0.7, 0.45)),
    "6 layers": ((1, 1, 3, 1), (1.0, 0.9, 0.65, 0.4)),
    "3 layers": ((1, 1, 1), (0.8, 0.5, 0.3)),
    "1 layer": ((1,), (0.5,)),
    "table 8, 20 %": ((2, 2, 6, 2), (1.0, 0.9, 0.85, 0.4)),
    "table 8, 30 %, two stages": ((6, 6), (1.0, 0.4)),
    "table 8, 30 %, three stages": ((2, 2, 8), (1.0, 0.9, 0.55)),
    "table 8, 30 %, equal ratios": ((4, 4, 4), (1.0, 0.5, 0.5)),
    "table 8, 40 %": ((2, 2, 6, 2), (1.0, 0.9, 0.4, 0.4)),
}


def inputs(batch, tokens, width=WIDTH):
    """x (B, 1+N, D) and guidance (B, D), both leaves that record gradients."""
    x = torch.randn(batch, 1 + tokens, width, dtype=torch.float64, requires_grad=True)
    guidance = torch.randn(batch, width, dtype=torch.float64, requires_grad=True)
    return x, guidance


def watched(reducer, *args):
    """The reducer's output, and the positions (B, K) that each stage which reduces keeps."""
    kept = []

    def watch(*given):
        out, positions = keep_and_merge(*given)
        kept.append(positions.tolist())
        return out, positions

    with patch("open_clip_elip.reduction.elip.keep_and_merge", watch):
        return reducer(*args), kept


def check_against_reference(blocks, x, guidance, **options):
    """Run both, compare everything, and return the reference's choices."""
    reducer = Elip(ElipConfig(**options), len(blocks))
    ours, kept = watched(reducer, blocks, x, guidance)
    expected, choices, lengths = reference.run(blocks, x, guidance, **options)
    assert kept == [choice.kept for choice in choices if choice is not None]
    assert reducer.token_counts(x.shape[1] - 1) == lengths
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)

    leaves = [x, *blocks.parameters()]
    direction = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * direction).sum(), leaves) for y in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)
    return choices


@pytest.mark.parametrize("tokens", [5, 9, 14, 23])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule, tokens):
    depths, keep_ratio = SCHEDULES[schedule]
    x, guidance = inputs(2, tokens)
    blocks = random_blocks(sum(depths), WIDTH)
    assert any(check_against_reference(blocks, x, guidance, depths=depths, keep_ratio=keep_ratio))


@pytest.mark.parametrize("scoring_depth", [None, 1, 2, 5])
@pytest.mark.parametrize("text_scale", ["match", "none"])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.6, 1.0])
def test_options(lam, merge, text_scale, scoring_depth):
    x, guidance = inputs(2, 11)
    options = {"lam": lam, "merge": merge, "text_scale": text_scale, "scoring_depth": scoring_depth}
    blocks, schedule = random_blocks(6, WIDTH), {"depths": (1, 3, 2), "keep_ratio": (1.0, 0.7, 0.4)}
    check_against_reference(blocks, x, guidance, **schedule, **options)


@pytest.mark.parametrize("counts", [(30, 12, 7, 3), (13, 13, 6, 6), (9, 8, 7, 1), (1, 1, 1, 1)])
def test_keep_counts(counts):
    """A stage that does nothing leaves the next one its tokens."""
    x, guidance = inputs(3, 13)
    check_against_reference(random_blocks(4, WIDTH), x, guidance, depths=(1, 1, 1, 1), keep_count=counts)


@pytest.mark.parametrize(
    ("batch", "width", "heads", "scale", "training"),
    [(1, 8, 1, None, True), (5, 24, 3, None, True), (2, 32, 8, None, True), (2, 16, 2, 0.3, True),
     (2, 16, 2, 0.3, False)],
)  # fmt: skip
def test_shapes_layer_scale_and_both_modes(batch, width, heads, scale, training):
    x, guidance = inputs(batch, 10, width)
    blocks = random_blocks(4, width, heads, layer_scale=scale).train(training)
    check_against_reference(blocks, x, guidance, depths=(2, 2), keep_ratio=(0.9, 0.5))


def test_without_guidance_vision_alone_decides():
    x, guidance = inputs(2, 12)
    blocks = random_blocks(4, WIDTH)
    options = {"depths": (2, 2), "keep_ratio": (0.8, 0.4)}
    check_against_reference(blocks, x, None, **options)
    none = Elip(ElipConfig(**options), 4)(blocks, x, None)
    lam_one = Elip(ElipConfig(**options, lam=1.0), 4)(blocks, x, guidance)
    torch.testing.assert_close(none, lam_one, rtol=0, atol=1e-12)


def blocks_that_score_by_first_coordinate(depth):
    """Nearly the identity on features; `[CLS]`, whatever it is, attends to tokens with a large first coordinate."""
    blocks = random_blocks(depth, WIDTH, heads=1)
    with torch.no_grad():
        for block in blocks:
            block.ln_1.weight.fill_(1)
            block.ln_1.bias.zero_()
            query, key, _ = block.attn.in_proj_weight.chunk(3)
            query.zero_()
            key.copy_(torch.eye(WIDTH))
            block.attn.in_proj_bias.zero_()
            block.attn.in_proj_bias[0] = 4.0
            for name, parameter in block.named_parameters():
                if "out_proj" in name or "c_proj" in name:
                    parameter.mul_(0.01)
    return blocks


def test_an_earlier_merged_token_is_chosen_or_merged_again():
    """After the first stage 8 kept tokens are at 0..7, and the merged one is at 8; after the second it is at 5."""
    blocks, options = blocks_that_score_by_first_coordinate(3), {"depths": (1, 1, 1), "keep_count": (8, 5, 3)}
    guidance = torch.randn(3, WIDTH, dtype=torch.float64)
    x = torch.randn(3, 1 + 16, WIDTH, dtype=torch.float64)
    # Every token points the same way plus its own noise; the average of many has less noise, hence the highest score.
    x[:, 1:, 0] = 1 + 0.2 * torch.rand(3, 16, dtype=torch.float64)
    choices = check_against_reference(blocks, x.clone().requires_grad_(), guidance, **options)
    assert all(8 in choices[1].kept[i] and 5 in choices[2].kept[i] for i in range(3))
    # The tokens to drop point the other way; their average does so even more clearly, hence the lowest score.
    x[:, 1:, 0] = torch.linspace(-3, 3, 16, dtype=torch.float64)[torch.randperm(16)]
    choices = check_against_reference(blocks, x.clone().requires_grad_(), guidance, **options)
    assert all(8 in choices[1].dropped[i] and 5 in choices[2].dropped[i] for i in range(3))
    assert all(len(dropped) > 1 for dropped in choices[1].dropped)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("what_to_keep", [{"keep_ratio": (1.0, 1.0)}, {"keep_count": (7, 7)}, {"keep_count": (90, 8)}])
def test_nothing_happens_where_no_token_is_to_go(what_to_keep, merge):
    x, guidance = inputs(2, 7)
    blocks = random_blocks(4, WIDTH)
    reducer = Elip(ElipConfig(depths=(2, 2), **what_to_keep, merge=merge), 4)
    y, kept = watched(reducer, blocks, x, guidance)
    assert kept == []
    assert reducer.token_counts(7) == [8, 8, 8, 8]
    assert reducer.rrt(7) == 0
    torch.testing.assert_close(y, nn.Sequential(*blocks)(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_at_least_one_token_is_kept(tokens):
    x, guidance = inputs(2, tokens)
    blocks = random_blocks(2, WIDTH)
    check_against_reference(blocks, x, guidance, depths=(1, 1), keep_ratio=(0.1, 0.1))


@pytest.mark.parametrize("merge", [True, False])
def test_with_merging_every_token_gets_a_gradient_else_the_kept_ones_and_the_guidance_never(merge):
    x, guidance = inputs(2, 9)
    blocks = random_blocks(2, WIDTH)
    y, kept = watched(Elip(ElipConfig(depths=(2,), keep_ratio=(0.5,), merge=merge), 2), blocks, x, guidance)
    assert y.shape == (2, 1 + 4 + merge, WIDTH)
    y.square().sum().backward()
    touched = x.grad.abs().sum(-1) > (1e-8 if merge else 0)
    for sample in range(2):
        expected = list(range(10)) if merge else [0] + [1 + position for position in kept[0][sample]]
        assert touched[sample].nonzero().flatten().tolist() == expected
    assert guidance.grad is None or not guidance.grad.any()
    assert all(parameter.grad is not None for parameter in blocks.parameters())


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (16, 4), (24, 3)])
def test_cls_attention_is_what_the_block_attends_with(width, heads):
    y = torch.randn(3, 8, width, dtype=torch.float64)
    block = random_blocks(1, width, heads)[0]
    scores = cls_attention(block, y)
    normed = block.ln_1(y)
    _, full = block.attn(normed, normed, normed, need_weights=True, average_attn_weights=True)
    assert scores.shape == (3, 7)
    torch.testing.assert_close(scores.detach(), full[:, 0, 1:].detach(), rtol=0, atol=1e-12)


def test_keep_and_merge_by_hand():
    x = torch.tensor([[1.0, 10, 20, 30, 40], [2.0, 50, 60, 70, 80]]).unsqueeze(-1)
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.1, 0.05, 0.25, 0.15]])
    merged, kept = keep_and_merge(x, scores, 2)
    assert kept.tolist() == [[1, 3], [2, 3]]
    expected = [[1, 20, 40, (10 * 0.1 + 30 * 0.2) / 0.3], [2, 70, 80, (50 * 0.1 + 60 * 0.05) / 0.15]]
    torch.testing.assert_close(merged.squeeze(-1), torch.tensor(expected))
    pruned, kept = keep_and_merge(x, scores, 2, merge=False)
    assert kept.tolist() == [[1, 3], [2, 3]]
    assert pruned.squeeze(-1).tolist() == [[1, 20, 40], [2, 70, 80]]
    assert not keep_and_merge(x, scores.requires_grad_(), 2)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropped_tokens_that_got_no_attention_at_all_still_give_a_finite_token(dtype):
    x = torch.randn(1, 1 + 6, 4, dtype=dtype)
    scores = torch.tensor([[0.5, 0.4, 0.0, 0.0, 0.0, 0.0]], dtype=dtype)  # softmax underflows like this
    merged, _ = keep_and_merge(x, scores, 2)
    assert merged.dtype == dtype
    assert merged.isfinite().all()


@pytest.mark.parametrize(("depth", "calls", "recording"), [
    (None, [1, 1, 1, 2, 2, 1], [[True]] * 3 + [[False, True]] * 2 + [[True]]), (1, [1] * 6, [[True]] * 6)
])  # fmt: skip
def test_the_last_scoring_layer_is_read_and_not_run(depth, calls, recording):
    """Only the attention row of [CLS] is needed there; the others run twice, once without a graph."""
    blocks, mlps, grads = random_blocks(6, WIDTH), [0] * 6, [[] for _ in range(6)]
    for i, block in enumerate(blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: mlps.__setitem__(i, mlps[i] + 1))
        block.register_forward_pre_hook(lambda *_, i=i: grads[i].append(torch.is_grad_enabled()))
    config = ElipConfig(depths=(2, 1, 3), keep_ratio=(1.0, 0.8, 0.5), scoring_depth=depth)
    Elip(config, 6)(blocks, *inputs(2, 12))
    assert mlps == calls and grads == recording
