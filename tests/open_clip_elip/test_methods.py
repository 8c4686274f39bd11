"""The rival methods against their slow references: features, gradients, order, sizes, budgets, and what they refuse."""

from __future__ import annotations

import json
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from open_clip_elip import with_token_reduction, without_token_reduction
from open_clip_elip.reduction import (
    METHODS,
    AdaptiveConfig,
    AdaptiveElip,
    Elip,
    ElipConfig,
    Evit,
    EvitConfig,
    RandomDrop,
    RandomDropConfig,
    Tome,
    TomeConfig,
    adaptive,
    drop_alternatives,
)
from open_clip_elip.reduction import tome as tome_module
from training import sharding
from training.distributed import Ranks

from ..processes import spawn
from . import reference_methods as reference
from .tiny import contrastive_loss, gradients, pairs, plain_model, random_blocks

RIVALS = ("evit", "tome", "random", "adaptive")
EVIT_LAYERS = {1: (1,), 4: (1, 2, 3), 8: (3, 5, 7), 12: (4, 7, 10), 24: (8, 14, 20)}
STAGES = {4: (1, 1, 1, 1), 6: (1, 1, 3, 1), 12: (2, 2, 6, 2)}
PAPER = (1.0, 0.9, 0.65, 0.4)
SMALL = {"evit": {}, "tome": {"r": 3}, "random": {}, "adaptive": {}, "elip": {}}


def build(method, depth=4, size=32, pool="tok", heads=2, custom_text=False, seed=0, sharp=4, **options):
    """A tiny model; the more `sharp`, the further its attention is from uniform."""
    torch.manual_seed(seed)
    vision = {"layers": depth, "image_size": size, "pool_type": pool, "head_width": 32 // heads}
    plain = plain_model(custom_text, vision=vision)
    with torch.no_grad():
        for block in plain.visual.transformer.resblocks:
            block.attn.in_proj_weight.mul_(sharp)
    return with_token_reduction(plain, method=method, **options)


def by_reference(model, image, text, run):
    """Output of the model whose layers are run by `run(blocks, x, guidance)`."""
    visual = model.visual
    text_features = F.normalize(without_token_reduction(model).encode_text(text), dim=-1)
    guidance = (text_features @ visual.proj.T).detach()
    x = run(visual.transformer.resblocks, visual._embeds(image), guidance)
    features = F.normalize(visual._pool(x)[0] @ visual.proj, dim=-1)
    return {"image_features": features, "text_features": text_features, "logit_scale": model.logit_scale.exp()}


def step(model, image, text, run=None):
    model.zero_grad()
    output = model(image, text) if run is None else by_reference(model, image, text, run)
    contrastive_loss(output).backward()
    return {k: v.detach() for k, v in output.items()}, gradients(model)


def assert_same(model, batch, run):
    expected, expected_gradients = step(model, *batch, run)
    assert not any(g is None for g in expected_gradients.values())
    for shortcuts in (True, False):
        model.tower.shortcuts = shortcuts
        features, found = step(model, *batch)
        torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found, expected_gradients, rtol=1e-8, atol=1e-11)


def seen_lengths(model, batch):
    """(in attention, in MLP) of each layer in a training step without shortcuts, tokens per image."""
    model.tower.shortcuts, images = False, len(batch[0])
    blocks = model.visual.transformer.resblocks
    lengths, hooks = [[None, None] for _ in blocks], []
    for layer, block in enumerate(blocks):
        for half, norm in enumerate((block.ln_1, block.ln_2)):

            def write(_, args, layer=layer, half=half):
                lengths[layer][half] = args[0].shape[:-1].numel() / images

            hooks.append(norm.register_forward_pre_hook(write))
    model(*batch)
    for hook in hooks:
        hook.remove()
    return [tuple(pair) for pair in lengths]


def assert_work(model, lengths, total=None):
    """`lengths` (attention, MLP) are what the model says it does."""
    patches = model.tower.num_patches()
    work = model.reduction.layers(patches)
    assert [(layer.attention, layer.mlp) for layer in work] == lengths
    assert model.tower.token_counts() == [attention for attention, _ in lengths]
    tokens = sum(a + m for a, m in lengths) / 2
    assert model.tower.rrt() == pytest.approx(1 - tokens / (len(lengths) * (1 + patches)), abs=1e-12)


# ---------------------------------------------------------------------- features, gradients, lengths


def test_the_references_halves_are_openclips_block():
    (block,) = random_blocks(1, layer_scale=0.3)
    x = torch.randn(7, 16, dtype=torch.float64)
    halves = reference.through_mlp(block, reference.attend(block, x)[0])
    torch.testing.assert_close(halves, block(x[None])[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {}),
        ({"depth": 12, "seed": 1}, {}),
        ({"depth": 8, "batch": 1, "heads": 4}, {"keep_rate": 0.5}),
        ({"size": (16, 40), "batch": 2, "pool": "avg"}, {"keep_rate": 0.6}),
        ({"pool": "avg", "custom_text": True}, {"fuse": False}),
        ({}, {"fuse": False, "layers": (1, 2, 3, 4)}),
        ({}, {"keep_rate": 1.0}),
        ({}, {"keep_rate": 1.0, "fuse": False}),
        ({}, {"keep_rate": 1e-6}),
        ({}, {"keep_rate": 1e-6, "fuse": False}),
        ({"batch": 5}, {"keep_rate": 0.9, "layers": (4,)}),
        ({"pool": "avg"}, {"keep_rate": 0.9, "layers": [1, 4]}),
        ({"size": 8}, {}),  # one patch
        ({"size": (8, 24), "depth": 1}, {"keep_rate": 0.3}),
        ({"size": (8, 80)}, {"keep_rate": 0.7, "layers": [2, 3]}),  # 0.7 * 10 is 7, and 0.7 * 8 ...
    ],
)
def test_evit(shape, options):
    shape = dict(shape)
    batch_size = shape.pop("batch", 3)
    model = build("evit", **shape, **options)
    layers = options.get("layers") or EVIT_LAYERS[model.reduction.num_layers]
    batch = pairs(batch_size, shape.get("size", 32))
    lengths = []

    def run(blocks, x, _):
        x, lengths[:] = reference.evit(blocks, x, options.get("keep_rate", 0.7), layers, options.get("fuse", True))
        return x

    assert_same(model, batch, run)
    assert_work(model, lengths)
    assert seen_lengths(model, batch) == lengths


@pytest.mark.parametrize(("depth", "layers"), EVIT_LAYERS.items())
def test_evits_layers_in_proportion(depth, layers):
    assert sorted(layer + 1 for layer in Evit(EvitConfig(), depth).layers) == list(layers)


def test_evits_lengths_at_224_by_16():
    """N = 196 -> 138 + 1 -> 98 + 1 -> 70 + 1, ceil(0.7 N) each."""
    work = Evit(EvitConfig(), 12).layers(196)
    assert [layer.attention for layer in work] == [197] * 4 + [140] * 3 + [100] * 3 + [72] * 2


@pytest.mark.parametrize("rate", [i / 100 for i in range(5, 101, 5)])
@pytest.mark.parametrize("patches", [10, 20, 30, 100, 190])
def test_evits_keep_is_not_off_by_one_through_rounding(rate, patches):
    (layer,) = Evit(EvitConfig(keep_rate=rate, layers=(1,), fuse=False), 1).layers(patches)
    assert layer.mlp - 1 == math.ceil(round(rate * 100) * patches / 100)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {"r": 3}),
        ({"depth": 12, "seed": 1}, {"r": 1}),
        ({"batch": 1, "heads": 4}, {"r": 2}),
        ({"size": (16, 40), "batch": 2, "pool": "avg"}, {"r": 2}),
        ({"pool": "avg", "custom_text": True}, {"r": [0, 4, 0, 2]}),
        ({}, {"r": [5, 0, 2, 0]}),
        ({}, {"r": 3, "prop_attn": False}),
        ({"pool": "avg"}, {"r": 100}),  # down to two tokens
        ({}, {"r": 100, "prop_attn": False}),
        ({}, {"r": 0}),
        ({"size": 8}, {"r": 3}),  # one patch
        ({"size": (8, 16)}, {"r": 3}),
        ({"depth": 1}, {"r": 7}),
        ({"depth": 8, "size": (8, 80)}, {"target_rrt": 0.3}),
    ],
)
def test_tome(shape, options):
    shape = dict(shape)
    batch_size = shape.pop("batch", 3)
    model = build("tome", **shape, **options)
    batch = pairs(batch_size, shape.get("size", 32))
    lengths, members = [], []
    r = options.get("r")
    if r is None:
        r = [layer.attention - layer.mlp for layer in model.reduction.layers(model.tower.num_patches())]

    def run(blocks, x, _):
        x, lengths[:], members[:] = reference.tome(blocks, x, r, options.get("prop_attn", True))
        return x

    assert_same(model, batch, run)
    assert_work(model, lengths)
    assert seen_lengths(model, batch) == lengths
    for of_image in members:
        assert of_image[0] == [0]  # [CLS] first, merged with nothing
        assert sorted(sum(of_image, [])) == list(range(1 + model.tower.num_patches()))


def test_tomes_lengths_at_224_by_16():
    work = Tome(TomeConfig(), 12).layers(196)
    assert [layer.attention for layer in work] == [197 - 13 * i for i in range(12)]
    assert [layer.mlp for layer in work] == [184 - 13 * i for i in range(12)]


def test_tomes_sizes_sum_to_the_tokens(monkeypatch):
    model, sizes = build("tome", r=3, depth=4), []
    original = tome_module._merge

    def spy(*args, **kwargs):
        x, size = original(*args, **kwargs)
        sizes.append(size)
        return x, size

    monkeypatch.setattr(tome_module, "_merge", spy)
    model.tower.shortcuts = False
    model(*pairs())
    assert [size.shape[1] for size in sizes] == [14, 11, 8, 5]
    for size in sizes:
        assert torch.equal(size.sum(dim=1), torch.full((3,), 17.0, dtype=size.dtype))
        assert torch.equal(size[:, 0], torch.ones(3, dtype=size.dtype))


@pytest.mark.parametrize(("pool", "keep_ratio", "size"), [("tok", 0.5, 32), ("avg", 0.3, (16, 40)), ("tok", 1e-6, 32),
                                                          ("tok", 1.0, 32), ("avg", 0.9, 8)])  # fmt: skip
def test_random_dropping(pool, keep_ratio, size):
    model = build("random", pool=pool, size=size, keep_ratio=keep_ratio)
    batch = pairs(4, size)
    patches = model.tower.num_patches()
    keep = max(1, int(keep_ratio * patches))
    embedded, entered = model.visual._embeds(batch[0]).detach(), []
    model.visual.transformer.resblocks[0].ln_1.register_forward_pre_hook(lambda _, args: entered.append(args[0]))

    torch.manual_seed(5)
    expected = None
    for shortcuts in (True, False):
        model.tower.shortcuts = shortcuts
        torch.manual_seed(5)
        entered.clear()
        found = step(model, *batch)
        kept = positions(embedded, entered[0])
        assert all(k == sorted(set(k)) and len(k) == keep for k in kept)
        expected = expected or step(model, *batch, lambda blocks, x, _, k=kept: reference.random_drop(blocks, x, k))
        torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-8, atol=1e-11)
    assert_work(model, [(1 + keep, 1 + keep)] * 4)
    assert seen_lengths(model, batch) == [(1 + keep, 1 + keep)] * 4


def positions(embedded, entered):
    """Where the tokens that entered the first layer were, `[CLS]` (first in both) not counted."""
    found = []
    for tokens, chosen in zip(embedded, entered, strict=True):
        torch.testing.assert_close(chosen[0], tokens[0])
        distance = torch.cdist(chosen[1:], tokens[1:])
        assert distance.min(dim=1).values.max() < 1e-9
        found.append(distance.argmin(dim=1).tolist())
    return found


def test_random_dropping_is_uniform_and_differs_between_images_and_steps():
    reducer = RandomDrop(RandomDropConfig(keep_ratio=0.25), 1)
    x = torch.arange(17.0).view(1, 17, 1).expand(4000, 17, 1)
    draws = reducer([torch.nn.Identity()], x)[:, 1:, 0].long() - 1
    share = torch.bincount(draws.flatten(), minlength=16) / 4000
    assert (share - 0.25).abs().max() < 0.035  # five deviations
    assert not torch.equal(draws[0], draws[1])
    torch.manual_seed(3)
    first = reducer([torch.nn.Identity()], x)
    torch.manual_seed(3)
    assert torch.equal(reducer([torch.nn.Identity()], x), first)
    assert not torch.equal(reducer([torch.nn.Identity()], x), first)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {}),
        ({"batch": 5, "seed": 1}, {"spread": 1.0, "keep_ratio": (1.0, 0.8, 0.5, 0.3)}),
        ({"batch": 1}, {}),
        ({"batch": 4, "heads": 4}, {"spread": 0.5, "keep_ratio": (0.7, 0.7, 0.7, 0.2)}),  # packed from the first layer
        ({"depth": 6}, {"lam": 0.2, "text_scale": "none"}),
        ({"size": (16, 40), "batch": 2}, {"lam": 1}),
        ({"depth": 6, "custom_text": True}, {"scoring_depth": 1, "spread": 0.6}),
        ({"depth": 6, "seed": 2}, {"depths": (2, 4), "keep_ratio": (0.6, 0.3), "spread": 0.5}),
        ({"batch": 2}, {"keep_ratio": (1.0, 1.0, 1.0, 1.0)}),
        ({"batch": 3}, {"keep_ratio": (1e-6,) * 4}),
        ({"size": 8, "batch": 2}, {}),  # one patch
        ({"size": 16, "batch": 3}, {"spread": 1.0}),
    ],
)
def test_adaptive(shape, options):
    shape = dict(shape)
    batch_size = shape.pop("batch", 3)
    depths = options.get("depths") or STAGES[shape.get("depth", 4)]
    named = {"keep_ratio": PAPER, **options, "depths": depths}
    model = build("adaptive", **shape, **named)
    batch = pairs(batch_size, shape.get("size", 32))
    counts = []

    def run(blocks, x, guidance):
        x, counts[:] = reference.adaptive(blocks, x, guidance, **named)
        return x

    assert_same(model, batch, run)
    lengths, tokens, patches = [], 1 + model.tower.num_patches(), model.tower.num_patches()
    for depth, ratio in zip(depths, named["keep_ratio"], strict=True):
        keep = max(1, int(ratio * patches))
        tokens = keep + 2 if tokens - 1 > keep else tokens
        lengths += [(tokens, tokens)] * depth
    assert_work(model, lengths)
    assert seen_lengths(model, batch) == lengths
    if options.get("spread", 0) == 1 and shape.get("size", 32) == 32:
        assert any(len(set(stage)) > 1 for stage in counts)  # images do differ


def test_kept_patches_stay_in_order():
    """Blocks that leave the tokens as they are between reductions: only the choice is left."""
    blocks = random_blocks(4)
    for block in blocks:
        for parameter in (block.attn.out_proj.weight, block.attn.out_proj.bias, *block.mlp.c_proj.parameters()):
            torch.nn.init.zeros_(parameter)
    x = torch.randn(3, 17, 16, dtype=torch.float64)
    reducers = [Evit(EvitConfig(keep_rate=0.8), 4), RandomDrop(RandomDropConfig(), 4), Tome(TomeConfig(r=3), 4)]
    for reducer in reducers:
        out = reducer(blocks, x)
        torch.testing.assert_close(out[:, 0], x[:, 0])
        for before, after in zip(x, out, strict=True):
            distance = torch.cdist(after[1:], before[1:])
            places = distance.argmin(dim=1)[distance.min(dim=1).values < 1e-9].tolist()
            if not isinstance(reducer, Tome):  # of ToMe the tokens of set A come before those of set B
                assert len(places) >= 2 and places == sorted(places)


# ---------------------------------------------------------------------- target_rrt


def rrt_of(work, patches):
    return 1 - sum(layer.attention + layer.mlp for layer in work) / (2 * len(work) * (1 + patches))


TARGETS = [0.0, 0.05, 0.2877, 0.5, 0.8, 0.95]


@pytest.mark.parametrize("patches", [1, 16, 49, 196, 576])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layers", [1, 4, 12])
def test_no_keep_rate_is_nearer_to_the_target(target, patches, layers):
    evit = Evit(EvitConfig(target_rrt=target), layers)
    rates = (i / 5000 for i in range(1, 5001))
    schedules = {tuple(evit._layers(patches, rate)) for rate in rates}
    nearest = min(abs(rrt_of(work, patches) - target) for work in schedules)
    assert abs(evit.rrt(patches) - target) <= nearest + 1e-12
    found = evit.layers(patches)
    assert found == Evit(EvitConfig(keep_rate=evit.keep_rate(patches)), layers).layers(patches)

    random = RandomDrop(RandomDropConfig(target_rrt=target), layers)
    nearest = min(abs(1 - (1 + keep) / (1 + patches) - target) for keep in range(1, patches + 1))
    assert abs(random.rrt(patches) - target) == pytest.approx(nearest, abs=1e-12)


@pytest.mark.parametrize("patches", [1, 16, 49, 196])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layers", [1, 4, 12])
def test_no_r_is_nearer_to_the_target(target, patches, layers):
    """Of one r for all layers, and of all that are even to within one in the way of a line drawn in pixels."""
    tome = Tome(TomeConfig(target_rrt=target), layers)
    r = [layer.attention - layer.mlp for layer in tome.layers(patches)]
    distance = abs(tome.rrt(patches) - target)
    for total in range(layers * ((patches + 1) // 2) + 1):
        even = [total * (i + 1) // layers - total * i // layers for i in range(layers)]
        assert distance <= abs(rrt_of(tome._layers(patches, tuple(even)), patches) - target) + 1e-12
    for r in range(patches // 2 + 1):
        assert distance <= abs(rrt_of(tome._layers(patches, r), patches) - target) + 1e-12


def test_elips_ratio_at_224_by_16():
    assert Elip(ElipConfig(), 12).rrt(196) == pytest.approx(1 - 1684 / 2364)
    assert AdaptiveElip(AdaptiveConfig(), 12).rrt(196) == pytest.approx(1 - 1684 / 2364)
    assert AdaptiveElip(AdaptiveConfig(), 12).token_counts(196) == [197] * 2 + [178] * 2 + [129] * 6 + [80] * 2


# ---------------------------------------------------------------------- adaptive: the budget


def attention_patterns(batch, length, dtype=torch.float32):
    """Scores (B, N) that are hard to choose from."""
    positions_BN = torch.arange(length, dtype=dtype).expand(batch, length)
    one_hot = torch.zeros(batch, length, dtype=dtype)
    one_hot[:, length // 2] = 1
    mixed = torch.rand(batch, length, dtype=dtype)
    mixed[0] = 0
    mixed[-1] = one_hot[-1]
    return {
        "one-hot": one_hot,
        "uniform": torch.full((batch, length), 1 / (1 + length), dtype=dtype),
        "zero": torch.zeros(batch, length, dtype=dtype),
        "subnormal": torch.full((batch, length), 1e-42, dtype=dtype),
        "geometric": 10 ** -(positions_BN % 45),
        "mixed": mixed,
        "random": torch.rand(batch, length, dtype=dtype),
    }


@pytest.mark.parametrize("pattern", attention_patterns(1, 2))
@pytest.mark.parametrize("spread", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("patches", [2, 3, 4, 9, 16, 60])
@pytest.mark.parametrize("ratios", [PAPER, (0.6, 0.6, 0.6, 0.6), (0.9, 0.9, 0.3, 0.3), (0.99, 0.98, 0.97, 1e-6)])
def test_the_batch_keeps_to_its_budget(pattern, spread, patches, ratios):
    reducer = AdaptiveElip(AdaptiveConfig(depths=(1, 1, 1, 1), keep_ratio=ratios, spread=spread), 4)
    for batch in (1, 3):
        x = torch.randn(batch, 1 + patches, 4)
        padded, mask, tokens = x, None, patches
        for keep, low, high in reducer.limits(patches):
            if tokens <= keep:
                continue
            assert 1 <= low <= keep <= high
            scores = attention_patterns(batch, padded.shape[1] - 1)[pattern]
            if mask is not None:
                scores = scores.masked_fill(~mask[:, 1:], 0)
            patch_mask = None if mask is None else mask[:, 1:]
            chosen = adaptive.choose(scores, patch_mask, keep, low, high)
            there = torch.full((batch,), patches) if mask is None else patch_mask.sum(dim=1)
            counts = chosen.sum(dim=1)
            assert counts.sum() == batch * keep
            assert (counts >= low).all() and (counts <= high).all() and (counts < there).all()
            if mask is not None:
                assert not (chosen & ~patch_mask).any()
            valid = torch.ones_like(chosen) if mask is None else patch_mask
            for image in range(batch):  # none is kept while a better one goes
                worst_kept = scores[image][chosen[image]].min()
                assert worst_kept >= scores[image][valid[image] & ~chosen[image]].max()
            rows, layout = adaptive.pack(padded, scores, patch_mask, chosen, keep, high + 2)
            assert rows.shape == (batch * (keep + 2), 4) and rows.isfinite().all()
            padded, mask, tokens = layout.pad(rows), layout.mask, keep + 1
            assert torch.equal(mask.sum(dim=1), 2 + counts)


@pytest.mark.parametrize("merge_depths", [(1, 1, 1, 1), (2, 2)])
def test_without_spread_adaptive_is_elip(merge_depths):
    options = {"depths": merge_depths, "keep_ratio": (1.0, 0.8, 0.5, 0.3) if len(merge_depths) == 4 else (0.7, 0.3)}
    batch = pairs(4)
    for shortcuts in (True, False):
        elip, flexible = build("elip", **options), build("adaptive", spread=0.0, **options)
        flexible.load_state_dict(elip.state_dict())
        elip.tower.shortcuts = flexible.tower.shortcuts = shortcuts
        torch.testing.assert_close(step(flexible, *batch), step(elip, *batch), rtol=1e-9, atol=1e-12)
    assert flexible.token_counts() == elip.token_counts()


def test_the_images_order_does_not_matter():
    model = build("adaptive", spread=1.0, keep_ratio=(1.0, 0.8, 0.5, 0.3))
    image, text = pairs(6)
    permutation = torch.tensor([3, 0, 5, 1, 4, 2])
    features = model(image, text)["image_features"]
    permuted = model(image[permutation], text[permutation])["image_features"]
    torch.testing.assert_close(permuted, features[permutation], rtol=1e-9, atol=1e-12)


def test_the_adaptive_reference_without_spread_keeps_the_best():
    scores = torch.rand(3, 10, dtype=torch.float64).tolist()
    for values, kept in zip(scores, reference.adaptive_choice(scores, 4, 4, 4), strict=True):
        assert kept == sorted(sorted(range(10), key=lambda p: -values[p])[:4])


# ---------------------------------------------------------------------- compile, checkpointing, precision, shapes


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def seeded(function, *args):
    torch.manual_seed(7)
    return function(*args)


COMPILED = {
    "evit": {"layers": (1,), "keep_rate": 0.6},
    "evit target": {"target_rrt": 0.2},
    "tome": {"r": 3},
    "tome target": {"target_rrt": 0.2},
    "random": {},
    "adaptive": {"depths": (1, 1), "keep_ratio": (0.6, 0.3)},
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_without_breaks_or_recompilation(name, fresh_compiler):
    method = name.split()[0]
    model = build(method, depth=2, **COMPILED[name])
    model.set_grad_checkpointing(method in ("tome", "adaptive"))
    backend = "eager" if method in ("tome", "random") else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            batch = pairs()
            expected = _prefixed(seeded(step, model, *batch))
            torch.testing.assert_close(seeded(step, compiled, *batch), expected, rtol=1e-9, atol=1e-10)


def _prefixed(outcome):
    output, found = outcome
    return output, {f"_orig_mod.{name}": gradient for name, gradient in found.items()}


@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("method", RIVALS)
def test_gradient_checkpointing_changes_nothing(method, shortcuts):
    model, batch = build(method, **SMALL[method]), pairs()
    model.tower.shortcuts = shortcuts
    expected = seeded(step, model, *batch)
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(seeded(step, model, *batch), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", RIVALS)
def test_autocast(method, checkpointing):
    model = build(method, sharp=1, **SMALL[method]).float()  # sharp, rounding would change choices
    model.set_grad_checkpointing(checkpointing)
    image, text = pairs(4, dtype=torch.float32)
    expected = seeded(model, image, text)
    with torch.autocast("cpu", torch.bfloat16):
        output = seeded(model, image, text)
        loss = contrastive_loss(output)
    loss.backward()
    assert F.cosine_similarity(output["image_features"].float(), expected["image_features"]).min() > 0.9
    for name, grad in gradients(model).items():
        assert grad is not None and grad.isfinite().all(), name
        assert grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", RIVALS)
def test_weights_in_low_precision(method, dtype):
    model = build(method, **SMALL[method]).to(dtype)
    image, text = pairs(4, dtype=dtype)
    output = model(image, text)
    assert output["image_features"].dtype == dtype
    contrastive_loss({k: v.float() for k, v in output.items()}).backward()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("size", [16, (8, 64), (56, 40), 64])
@pytest.mark.parametrize("method", RIVALS)
def test_other_resolutions(method, size):
    model = build(method, size=size)
    batch = pairs(2, size)
    lengths = seen_lengths(model, batch)
    assert_work(model, lengths)
    model.tower.shortcuts = True
    _, found = step(model, *batch)
    assert all(grad is not None and grad.isfinite().all() for grad in found.values())


@pytest.mark.parametrize("method", RIVALS)
def test_a_sharp_attention_gives_no_nan(method):
    model = build(method, **SMALL[method]).float()
    with torch.no_grad():
        for block in model.visual.transformer.resblocks:
            block.attn.in_proj_weight.mul_(30)
    output, found = step(model, *pairs(4, dtype=torch.float32))
    assert output["image_features"].isfinite().all()
    assert all(grad.isfinite().all() for grad in found.values())


@pytest.mark.parametrize("method", RIVALS)
def test_a_batch_of_equal_blank_images(method):
    model = build(method, **SMALL[method])
    _, text = pairs(3)
    output, found = step(model, torch.zeros(3, 3, 32, 32, dtype=torch.float64), text)
    assert output["image_features"].isfinite().all()
    assert all(grad.isfinite().all() for grad in found.values())


# ---------------------------------------------------------------------- several processes

REDUCED = {"evit": {}, "tome": {"r": 3}, "adaptive": {"spread": 0.5}}


def _in_two_processes(rank, folder):
    """DDP: the gradients as averaged, and their mean by hand. FSDP2: losses and gradients of each half of a batch."""
    found = {}
    for method, options in REDUCED.items():
        for checkpointing in (False, True):
            model = build(method, **options)
            model.set_grad_checkpointing(checkpointing)
            torch.manual_seed(1)
            image, text = pairs(8)
            halves = [(image[:4], text[:4]), (image[4:], text[4:])]
            ddp = DistributedDataParallel(model)
            for _ in range(2):  # an unused parameter would raise at the start of the second step
                ddp.zero_grad()
                contrastive_loss(ddp(*halves[rank])).backward()
            averaged = gradients(model)
            model.zero_grad()
            losses = [contrastive_loss(model(*half)) for half in halves]
            (sum(losses) / 2).backward()
            whole = {"losses": [loss.item() for loss in losses], "gradients": gradients(model)}

            sharded = sharding.shard(build(method, **options), Ranks(torch.device("cpu"), rank, rank, 2), "fp32")
            sharded.set_grad_checkpointing(checkpointing)
            loss = contrastive_loss(sharded(*halves[rank]))
            loss.backward()
            pieces = {name: p.grad for name, p in sharded.named_parameters()}
            pieces = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in pieces.items()}
            found[method, checkpointing] = averaged, whole, {"loss": loss.item(), "gradients": pieces}
    torch.save(found, f"{folder}/{rank}.pt")


def test_in_two_processes(tmp_path):
    spawn(_in_two_processes, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == 2 * len(REDUCED)
        for averaged, whole, sharded in found.values():
            torch.testing.assert_close(averaged, whole["gradients"], rtol=1e-8, atol=1e-11)
            assert sharded["loss"] == pytest.approx(whole["losses"][rank], rel=1e-9)
            torch.testing.assert_close(sharded["gradients"], whole["gradients"], rtol=1e-8, atol=1e-11)


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("custom_text", [False, True])
def test_there_and_back(method, custom_text):
    model = build(method, custom_text=custom_text)
    plain = without_token_reduction(model)
    assert type(plain) in (open_clip.CLIP, open_clip.CustomTextCLIP)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not list(model.reduction.parameters()) and not list(model.reduction.buffers())
    again = with_token_reduction(plain, method=method, **model.reduction.config.to_dict())
    assert again.reduction.config == model.reduction.config
    assert all(a is b for a, b in zip(again.parameters(), model.parameters(), strict=True))
    image, text = pairs()
    for found in (model.encode_image(image), model.eval().encode_image(image), model(image)["image_features"]):
        expected = plain.encode_image(image)
        found, expected = F.normalize(found, dim=-1), F.normalize(expected, dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.eval()(image, text), plain.eval()(image, text), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", RIVALS)
def test_trains_with_all_tokens_on_request(method):
    model, batch = build(method, **SMALL[method]), pairs()
    plain = without_token_reduction(model)
    assert model.tower.rrt() > 0
    model.tower.reduces = False
    torch.testing.assert_close(step(model, *batch), step(plain, *batch), rtol=1e-8, atol=1e-11)
    assert model.tower.token_counts() == [17] * 4
    assert model.tower.rrt() == 0
    assert seen_lengths(model, batch) == [(17, 17)] * 4
    model.tower.reduces = True
    assert model.tower.rrt() > 0 and max(model.tower.token_counts()) <= 17


@pytest.mark.parametrize("method", ["evit", "tome"])
def test_vision_guided(method):
    model = build(method, **SMALL[method]).eval()
    image, _ = pairs()
    full = model.encode_image(image)
    model.tower.vision_guided = True
    reduced = model.encode_image(image)
    assert not torch.allclose(reduced, full, rtol=1e-3)
    run = {
        "evit": lambda blocks, x: reference.evit(blocks, x, 0.7, (1, 2, 3))[0],
        "tome": lambda blocks, x: reference.tome(blocks, x, 3)[0],
    }[method]
    visual = model.visual
    x = run(visual.transformer.resblocks, visual._embeds(image))
    torch.testing.assert_close(reduced, visual._pool(x)[0] @ visual.proj, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.encode_image(image[1:2]), reduced[1:2], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["random", "adaptive"])
def test_vision_guided_is_refused_where_an_image_is_not_encoded_by_itself(method):
    model = build(method).eval()
    model.tower.vision_guided = True
    with pytest.raises(ValueError, match="training") as error:
        model.encode_image(pairs()[0])
    assert_one_sentence(error)


NAMES = [f"ViT-{size}-16-{suffix}" for size in "SB" for suffix in ("EViT", "ToMe", "Random", "ELIP-Adaptive")]


@pytest.mark.parametrize("name", NAMES)
def test_registered_names(name):
    method = {"EViT": "evit", "ToMe": "tome", "Random": "random", "Adaptive": "adaptive"}[name.split("-")[-1]]
    plain_name = "-".join(name.split("-")[:3])
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta")
        plain = open_clip.create_model(plain_name, device="meta")
    assert isinstance(model.reduction, METHODS[method])
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert repr(without_token_reduction(model)) == repr(plain)
    assert open_clip.list_pretrained_tags_by_model(name) == open_clip.list_pretrained_tags_by_model(plain_name)
    options = open_clip.get_model_config(name)["token_reduction"]
    assert options.pop("method") == method
    assert METHODS[method].Config.from_dict(options) == METHODS[method].Config()  # the defaults


# ---------------------------------------------------------------------- options


def assert_one_sentence(error):
    text = str(error.value)
    assert len(text) > 10 and "\n" not in text and text.rstrip("?.") != text, text


@pytest.mark.parametrize(
    ("method", "options", "names"),
    [
        ("evit", {"keep_rat": 0.5}, "keep_rate"),
        ("evit", {"keep_rate": 0.5, "target_rrt": 0.3}, "target_rrt"),
        ("evit", {"keep_rate": 0}, "keep_rate"),
        ("evit", {"keep_rate": 1.1}, "keep_rate"),
        ("evit", {"keep_rate": float("nan")}, "keep_rate"),
        ("evit", {"keep_rate": True}, "keep_rate"),
        ("evit", {"keep_rate": "0.5"}, "keep_rate"),
        ("evit", {"target_rrt": -0.1}, "target_rrt"),
        ("evit", {"target_rrt": 1}, "target_rrt"),
        ("evit", {"layers": (2, 5)}, "layers"),
        ("evit", {"layers": ()}, "layers"),
        ("evit", {"layers": (0, 2)}, "layers"),
        ("evit", {"layers": (2, 2)}, "layers"),
        ("evit", {"layers": (3, 2)}, "layers"),
        ("evit", {"layers": 3}, "layers"),
        ("evit", {"layers": (1.5,)}, "layers"),
        ("evit", {"fuse": 1}, "fuse"),
        ("tome", {"R": 2}, "r"),
        ("tome", {"r": 3, "target_rrt": 0.3}, "target_rrt"),
        ("tome", {"r": -1}, "r must"),
        ("tome", {"r": 1.5}, "r must"),
        ("tome", {"r": True}, "r must"),
        ("tome", {"r": "13"}, "r must"),
        ("tome", {"r": [1, 2, 3]}, "r has 3"),
        ("tome", {"r": [1, 2, -3, 1]}, "r must"),
        ("tome", {"r": []}, "r"),
        ("tome", {"target_rrt": 2}, "target_rrt"),
        ("tome", {"prop_attn": "yes"}, "prop_attn"),
        ("random", {"keep_rate": 0.5}, "keep_ratio"),
        ("random", {"keep_ratio": 0.5, "target_rrt": 0.3}, "target_rrt"),
        ("random", {"keep_ratio": 0}, "keep_ratio"),
        ("random", {"keep_ratio": [0.5, 0.4]}, "keep_ratio"),
        ("random", {"keep_ratio": []}, "keep_ratio"),
        ("random", {"target_rrt": 0.99}, "target_rrt"),
        ("adaptive", {"spreads": 0.3}, "spread"),
        ("adaptive", {"spread": 1.5}, "spread"),
        ("adaptive", {"spread": -0.1}, "spread"),
        ("adaptive", {"merge": False}, "merge"),
        ("adaptive", {"keep_ratio": (1, 0.5), "depths": (2, 3)}, "layers"),
        ("adaptive", {"keep_ratio": (0.5, 0.9, 0.4, 0.3)}, "keep_ratio"),
    ],
)
def test_what_is_refused(method, options, names):
    with pytest.raises(ValueError, match=names) as error:
        build(method, **options)
    assert_one_sentence(error)


def test_adaptive_needs_the_class_token():
    with pytest.raises(ValueError, match=r"\[CLS\]") as error:
        build("adaptive", pool="avg")
    assert_one_sentence(error)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="evit") as error:
        build("evti")
    assert_one_sentence(error)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("evit", {}),
        ("evit", {"target_rrt": 0.3, "layers": [2, 3], "fuse": False}),
        ("tome", {}),
        ("tome", {"r": [1, 2, 3, 4], "prop_attn": False}),
        ("tome", {"target_rrt": 0.3}),
        ("random", {"keep_ratio": [0.4]}),
        ("random", {"target_rrt": 0.3}),
        ("adaptive", {"spread": 0.5, "keep_count": [9, 5], "depths": [2, 2]}),
    ],
)
def test_a_configuration_survives_json(method, options):
    config_class, module_class = METHODS[method]
    config = config_class.from_dict(options)
    assert config_class.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    if "depths" in options or method != "adaptive":
        assert module_class(config, 4).token_counts(16)


def test_an_option_replaces_its_alternatives():
    assert drop_alternatives({"keep_rate": 0.7, "fuse": True}, {"target_rrt": 0.3}) == {"fuse": True}
    assert drop_alternatives({"target_rrt": 0.7}, {"r": 3}) == {}
    assert drop_alternatives({"r": 13, "prop_attn": True}, {"prop_attn": False}) == {"r": 13, "prop_attn": True}
