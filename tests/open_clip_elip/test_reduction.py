"""The reduction against the literal reference: kept tokens, features, gradients."""

import pytest
import torch
from torch import nn

from open_clip_elip.reduction import Elip, ElipConfig, cls_attention, keep_and_merge

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


def check_against_reference(blocks, x, guidance, **options):
    """Run both, compare everything, and return the reference's traces."""
    depth = len(blocks)
    reducer = Elip(ElipConfig(**{"keep_ratio": None, **options} if "keep_count" in options else options), depth)
    ours, kept = reducer(blocks, x, guidance, return_kept=True)
    expected, traces, lengths = reference.run(blocks, x, guidance, **options)

    assert len(kept) == len(traces) == len(options["depths"])
    for ours_kept, trace in zip(kept, traces, strict=True):
        if trace.kept is None:
            assert ours_kept is None
        else:
            assert ours_kept.dtype == torch.long
            assert ours_kept.tolist() == trace.kept
    assert reducer.token_counts(x.shape[1] - 1) == lengths
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)

    leaves = [x, *blocks.parameters()]
    direction = torch.randn_like(expected)
    ours_grads = torch.autograd.grad((ours * direction).sum(), leaves)
    expected_grads = torch.autograd.grad((expected * direction).sum(), leaves)
    for ours_grad, expected_grad in zip(ours_grads, expected_grads, strict=True):
        torch.testing.assert_close(ours_grad, expected_grad, rtol=1e-9, atol=1e-10)
    return traces


@pytest.mark.parametrize("tokens", [5, 9, 14, 23])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule, tokens):
    depths, keep_ratio = SCHEDULES[schedule]
    x, guidance = inputs(2, tokens)
    traces = check_against_reference(
        random_blocks(sum(depths), WIDTH), x, guidance, depths=depths, keep_ratio=keep_ratio
    )
    assert any(trace.kept is not None for trace in traces)


@pytest.mark.parametrize("scoring_depth", [None, 1, 2, 5])
@pytest.mark.parametrize("text_scale", ["match", "none"])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.6, 1.0])
def test_options(lam, merge, text_scale, scoring_depth):
    x, guidance = inputs(2, 11)
    check_against_reference(
        random_blocks(6, WIDTH),
        x,
        guidance,
        depths=(1, 3, 2),
        keep_ratio=(1.0, 0.7, 0.4),
        lam=lam,
        merge=merge,
        text_scale=text_scale,
        scoring_depth=scoring_depth,
    )


@pytest.mark.parametrize("counts", [(30, 12, 7, 3), (13, 13, 6, 6), (9, 8, 7, 1), (1, 1, 1, 1)])
def test_keep_counts(counts):
    x, guidance = inputs(3, 13)
    check_against_reference(random_blocks(4, WIDTH), x, guidance, depths=(1, 1, 1, 1), keep_count=counts)


@pytest.mark.parametrize(("batch", "width", "heads"), [(1, 8, 1), (5, 24, 3), (2, 32, 8)])
def test_shapes(batch, width, heads):
    x, guidance = inputs(batch, 10, width)
    blocks = random_blocks(4, width, heads)
    check_against_reference(blocks, x, guidance, depths=(2, 2), keep_ratio=(0.9, 0.5))


@pytest.mark.parametrize("training", [True, False])
def test_layer_scale_and_both_modes(training):
    x, guidance = inputs(2, 10)
    blocks = random_blocks(4, WIDTH, layer_scale=0.3).train(training)
    check_against_reference(blocks, x, guidance, depths=(2, 2), keep_ratio=(0.9, 0.5))


def test_without_guidance_vision_alone_decides():
    x, guidance = inputs(2, 12)
    blocks = random_blocks(4, WIDTH)
    options = {"depths": (2, 2), "keep_ratio": (0.8, 0.4)}
    check_against_reference(blocks, x, None, **options)
    none = Elip(ElipConfig(**options), 4)(blocks, x, None)
    lam_one = Elip(ElipConfig(**options, lam=1.0), 4)(blocks, x, guidance)
    torch.testing.assert_close(none, lam_one, rtol=0, atol=1e-12)


def test_the_text_decides_which_tokens_stay():
    x, guidance = inputs(8, 20)
    blocks = random_blocks(2, WIDTH)
    config = ElipConfig(depths=(2,), keep_ratio=(0.5,), lam=0.0)
    _, kept = Elip(config, 2)(blocks, x, guidance, return_kept=True)
    _, kept_other = Elip(config, 2)(blocks, x, guidance.flip(0), return_kept=True)
    assert not torch.equal(kept[0], kept_other[0])


def test_text_scale_match_ignores_the_norm_of_the_guidance():
    x, guidance = inputs(2, 12)
    blocks = random_blocks(2, WIDTH)
    reducer = Elip(ElipConfig(depths=(2,), keep_ratio=(0.5,), lam=0.3, text_scale="match"), 2)
    torch.testing.assert_close(reducer(blocks, x, guidance), reducer(blocks, x, 50 * guidance), rtol=0, atol=1e-10)


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


def test_an_earlier_merged_token_is_chosen_again():
    # Every token points the same way plus its own noise; the average of many has less noise, hence the highest score.
    x = torch.randn(3, 1 + 16, WIDTH, dtype=torch.float64)
    x[:, 1:, 0] = 1 + 0.2 * torch.rand(3, 16, dtype=torch.float64)
    x.requires_grad_()
    guidance = torch.randn(3, WIDTH, dtype=torch.float64)
    blocks = blocks_that_score_by_first_coordinate(3)
    traces = check_against_reference(blocks, x, guidance, depths=(1, 1, 1), keep_count=(8, 5, 3))
    for sample in range(3):
        assert 8 in traces[1].kept[sample]  # 8 kept tokens are at 0..7, the merged one is at 8
        assert 5 in traces[2].kept[sample]


def test_an_earlier_merged_token_is_merged_again():
    # The tokens to drop point the other way; their average does so even more clearly, hence the lowest score.
    x = torch.randn(3, 1 + 16, WIDTH, dtype=torch.float64)
    x[:, 1:, 0] = torch.linspace(-3, 3, 16, dtype=torch.float64)[torch.randperm(16)]
    x.requires_grad_()
    guidance = torch.randn(3, WIDTH, dtype=torch.float64)
    blocks = blocks_that_score_by_first_coordinate(3)
    traces = check_against_reference(blocks, x, guidance, depths=(1, 1, 1), keep_count=(8, 5, 3))
    for sample in range(3):
        assert 8 in traces[1].dropped[sample]
        assert len(traces[1].dropped[sample]) > 1
        assert 5 in traces[2].dropped[sample]


def run_plainly(blocks, x):
    for block in blocks:
        x = block(x)
    return x


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(
    "what_to_keep",
    [
        {"keep_ratio": (1.0, 1.0)},
        {"keep_ratio": None, "keep_count": (7, 7)},
        {"keep_ratio": None, "keep_count": (90, 8)},
    ],
)
def test_nothing_happens_where_no_token_is_to_go(what_to_keep, merge):
    x, guidance = inputs(2, 7)
    blocks = random_blocks(4, WIDTH)
    reducer = Elip(ElipConfig(depths=(2, 2), **what_to_keep, merge=merge), 4)
    y, kept = reducer(blocks, x, guidance, return_kept=True)
    assert kept == [None, None]
    assert reducer.token_counts(7) == [8, 8, 8, 8]
    assert reducer.rrt(7) == 0
    torch.testing.assert_close(y, run_plainly(blocks, x), rtol=0, atol=1e-12)


def test_a_stage_that_does_nothing_leaves_the_next_one_its_tokens():
    x, guidance = inputs(2, 7)
    traces = check_against_reference(random_blocks(3, WIDTH), x, guidance, depths=(1, 1, 1), keep_count=(9, 7, 4))
    assert [trace.kept is None for trace in traces] == [True, True, False]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_at_least_one_token_is_kept(tokens):
    x, guidance = inputs(2, tokens)
    blocks = random_blocks(2, WIDTH)
    check_against_reference(blocks, x, guidance, depths=(1, 1), keep_ratio=(0.1, 0.1))


def test_without_merging_only_the_kept_tokens_get_a_gradient():
    x, guidance = inputs(2, 9)
    blocks = random_blocks(2, WIDTH)
    reducer = Elip(ElipConfig(depths=(2,), keep_ratio=(0.5,), merge=False), 2)
    y, kept = reducer(blocks, x, guidance, return_kept=True)
    assert y.shape == (2, 1 + 4, WIDTH)
    y.square().sum().backward()
    touched = x.grad.abs().sum(-1) > 0
    for sample in range(2):
        expected = [0] + [1 + position for position in kept[0][sample].tolist()]
        assert touched[sample].nonzero().flatten().tolist() == expected
    assert guidance.grad is None or not guidance.grad.any()


def test_with_merging_every_token_gets_a_gradient_and_the_guidance_none():
    x, guidance = inputs(2, 9)
    blocks = random_blocks(2, WIDTH)
    y = Elip(ElipConfig(depths=(2,), keep_ratio=(0.5,)), 2)(blocks, x, guidance)
    assert y.shape == (2, 1 + 4 + 1, WIDTH)
    y.square().sum().backward()
    assert (x.grad.abs().sum(-1) > 1e-8).all()
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
    torch.testing.assert_close(scores.detach(), reference.cls_scores(block, y), rtol=0, atol=1e-12)


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


def test_no_gradient_reaches_the_scores():
    x = torch.randn(2, 1 + 6, 4, requires_grad=True)
    scores = torch.rand(2, 6, requires_grad=True)
    merged, _ = keep_and_merge(x, scores, 3)
    merged.square().sum().backward()
    assert x.grad.any()
    assert scores.grad is None or not scores.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropped_tokens_that_got_no_attention_at_all_still_give_a_finite_token(dtype):
    x = torch.randn(1, 1 + 6, 4, dtype=dtype)
    scores = torch.tensor([[0.5, 0.4, 0.0, 0.0, 0.0, 0.0]], dtype=dtype)  # softmax underflows like this
    merged, _ = keep_and_merge(x, scores, 2)
    assert merged.dtype == dtype
    assert merged.isfinite().all()


def test_the_reducer_has_no_state():
    reducer = Elip(ElipConfig(), 12)
    assert isinstance(reducer, nn.Module)
    assert not list(reducer.parameters()) and not list(reducer.buffers()) and not reducer.state_dict()


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
