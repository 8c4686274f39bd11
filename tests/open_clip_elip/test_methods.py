"""The methods in models: against the slow references, compiled, checkpointed, in low precision, in two processes."""
from __future__ import annotations

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from open_clip_elip import with_token_reduction, without_token_reduction
from open_clip_elip.reduction import Evit, RandomDrop, Tome
from open_clip_elip.reduction.evit import EvitConfig
from open_clip_elip.reduction.random_drop import RandomDropConfig
from open_clip_elip.reduction.tome import TomeConfig
from training import sharding
from training.distributed import Ranks

from ..processes import spawn
from . import reference
from .tiny import (
    assert_one_sentence,
    config,
    contrastive_loss,
    gradients,
    pairs,
    plain_model,
    seeded,
    seen_lengths,
    step,
)  # fmt: skip

ALL = ("elip", "evit", "tome", "random")
EVIT_LAYERS = {1: (1,), 4: (1, 2, 3), 8: (3, 5, 7), 12: (4, 7, 10), 24: (8, 14, 20)}
SMALL = {"evit": {}, "tome": {"r": 3}, "random": {}, "elip": {}}


def build(method, depth=4, size=32, pool="tok", heads=2, custom_text=False, seed=0, sharp=4, **options):
    """A tiny model; the more `sharp`, the further its attention is from uniform."""
    torch.manual_seed(seed)
    vision = {"layers": depth, "image_size": size, "pool_type": pool, "head_width": 32 // heads}
    plain = plain_model(custom_text, vision=vision)
    with torch.no_grad():
        for block in plain.visual.transformer.resblocks:
            block.attn.in_proj_weight.mul_(sharp)
    return with_token_reduction(plain, method=method, **options)


def assert_work(model, batch, lengths):
    """`lengths` (attention, MLP) are what is seen in a step and what the model says it does."""
    patches = model.tower.num_patches()
    work = model.reduction.layers(patches)
    assert [(layer.attention, layer.mlp) for layer in work] == lengths
    assert model.tower.token_counts() == [attention for attention, _ in lengths]
    tokens = sum(a + m for a, m in lengths) / 2
    assert model.tower.rrt() == pytest.approx(1 - tokens / (len(lengths) * (1 + patches)), abs=1e-12)
    assert seen_lengths(model, batch)[0] == lengths


def assert_same(model, batch, run, lengths):
    """Features, gradients, tokens in their order, and the `lengths` that `run` writes."""
    plain, (image, _) = without_token_reduction(model), batch
    expected, expected_gradients = step(model, *batch, lambda *batch: reference.output(plain, *batch, run))
    assert not any(g is None for g in expected_gradients.values())
    for shortcuts in (True, False):
        model.tower.shortcuts = shortcuts
        features, found = step(model, *batch)
        torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found, expected_gradients, rtol=1e-8, atol=1e-11)
    tokens = run(model.visual.transformer.resblocks, model.visual._embeds(image), None)
    torch.testing.assert_close(model.tower.tokens(image, reduce=True), tokens, rtol=1e-9, atol=1e-11)
    assert_work(model, batch, lengths)


# ---------------------------------------------------------------------- features, gradients, lengths


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

    assert_same(model, batch, run, lengths)


@pytest.mark.parametrize(("depth", "layers"), EVIT_LAYERS.items())
def test_evits_layers_in_proportion(depth, layers):
    assert sorted(layer + 1 for layer in Evit(EvitConfig(), depth).reducing) == list(layers)


def test_lengths_at_224_by_16():
    """EViT: N = 196 -> 138 + 1 -> 98 + 1 -> 70 + 1, ceil(0.7 N) each."""
    assert Evit(EvitConfig(), 12).token_counts(196) == [197] * 4 + [140] * 3 + [100] * 3 + [72] * 2
    assert Tome(TomeConfig(), 12).layers(196) == [(197 - 13 * i, 184 - 13 * i) for i in range(12)]


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

    assert_same(model, batch, run, lengths)
    for of_image in members:
        assert of_image[0] == [0]  # [CLS] first, merged with nothing
        assert sorted(sum(of_image, [])) == list(range(1 + model.tower.num_patches()))


@pytest.mark.parametrize(("pool", "keep_ratio", "size"), [("tok", 0.5, 32), ("avg", 0.3, (16, 40)), ("tok", 1e-6, 32),
                                                          ("tok", 1.0, 32), ("avg", 0.9, 8)])  # fmt: skip
def test_random_dropping(pool, keep_ratio, size):
    model = build("random", pool=pool, size=size, keep_ratio=keep_ratio)
    plain, batch = without_token_reduction(model), pairs(4, size)
    patches = model.tower.num_patches()
    keep = max(1, int(keep_ratio * patches))
    embedded, entered = model.visual._embeds(batch[0]).detach(), []
    model.visual.transformer.resblocks[0].ln_1.register_forward_pre_hook(lambda _, args: entered.append(args[0]))

    for shortcuts in (True, False):
        model.tower.shortcuts = shortcuts
        entered.clear()
        found = seeded(step, model, *batch)
        kept = positions(embedded, entered[0])
        assert all(k == sorted(set(k)) and len(k) == keep for k in kept)

        def run(blocks, x, _, kept=kept):
            x = torch.stack([seq[[0] + [1 + i for i in k]] for seq, k in zip(x, kept, strict=True)])
            return torch.nn.Sequential(*blocks)(x)

        expected = step(model, *batch, lambda *batch, run=run: reference.output(plain, *batch, run))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)
    assert_work(model, batch, [(1 + keep, 1 + keep)] * 4)


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


# ---------------------------------------------------------------------- compile, checkpointing, precision, shapes


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = {
    "elip": {"depths": (1, 1), "keep_ratio": (0.6, 0.3)},
    "elip score": {"depths": (2,), "keep_ratio": (0.5,), "scoring_depth": 1, "text_scale": "none", "merge": False},
    "evit": {"layers": (1,), "keep_rate": 0.6},
    "evit target": {"target_rrt": 0.2},
    "tome": {"r": 3},
    "tome target": {"target_rrt": 0.2},
    "random": {},
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_without_breaks_or_recompilation(name, fresh_compiler):
    method = name.split()[0]
    model = build(method, depth=2, custom_text="score" in name, **COMPILED[name])
    model.set_grad_checkpointing(method == "tome" or "score" in name)
    backend = "aot_eager" if name in ("elip", "evit") else "eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            batch = pairs()
            expected = seeded(step, model, *batch)
            torch.testing.assert_close(seeded(step, compiled, *batch), expected, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        compiled.eval()
        torch.testing.assert_close(compiled(*batch), model.eval()(*batch), rtol=1e-9, atol=1e-10)
        model.tower.vision_guided = method == "elip"
        torch.testing.assert_close(compiled(*batch), model(*batch), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("method", ALL)
def test_gradient_checkpointing_changes_no_number_but_recomputes(method, shortcuts):
    model, batch, runs = build(method, **SMALL[method]), pairs(), []
    model.tower.shortcuts = shortcuts
    expected = seeded(step, model, *batch)
    model.visual.transformer.resblocks[0].register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    for checkpointing, count in ((True, 2), (False, 1)):
        model.set_grad_checkpointing(checkpointing)
        runs.clear()
        torch.testing.assert_close(seeded(step, model, *batch), expected, rtol=1e-11, atol=1e-12)
        assert sum(runs) == count


@pytest.mark.parametrize("way", ["plain", "checkpointed", "compiled"])
@pytest.mark.parametrize("method", ALL)
def test_autocast(method, way, fresh_compiler):
    model = build(method, depth=2 if way == "compiled" else 4, sharp=1, **SMALL[method]).float()
    model.set_grad_checkpointing(way == "checkpointed")  # not sharp, for then rounding would change choices
    image, text = pairs(4, dtype=torch.float32)
    expected = seeded(model, image, text)
    run = torch.compile(model, fullgraph=True, backend="eager") if way == "compiled" else model
    with torch.autocast("cpu", torch.bfloat16):
        output = seeded(run, image, text)
        loss = contrastive_loss(output)
    loss.backward()
    assert F.cosine_similarity(output["image_features"].float(), expected["image_features"]).min() > 0.9
    for name, grad in gradients(model).items():
        assert grad is not None and grad.isfinite().all(), name
        assert grad.abs().sum() > 0, name


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "fp16", "pure_fp16"])
@pytest.mark.parametrize("method", ALL)
def test_weights_in_low_precision(method, precision):
    options = config(token_reduction={"method": method, **SMALL[method]}, output_dict=True)
    full, low = (open_clip.create_model("ViT-S-16", **options, precision=name).train() for name in ("fp32", precision))
    low.load_state_dict(full.state_dict())
    image, text = pairs(dtype=torch.float32)
    expected, output = seeded(full, image, text), seeded(low, image.to(low.visual.proj.dtype), text)
    assert output["image_features"].dtype == low.visual.proj.dtype != torch.float32
    assert F.cosine_similarity(output["image_features"].float(), expected["image_features"]).min() > 0.98
    contrastive_loss({k: v.float() for k, v in output.items()}).backward()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(low).values())


@pytest.mark.parametrize("method", ALL)
def test_a_sharp_attention_gives_no_nan(method):
    model = build(method, **SMALL[method]).float()
    with torch.no_grad():
        for block in model.visual.transformer.resblocks:
            block.attn.in_proj_weight.mul_(30)
    image, text = pairs(4, dtype=torch.float32)
    for batch in ((image, text), (torch.zeros_like(image), text)):  # nor do equal blank images
        output, found = step(model, *batch)
        assert output["image_features"].isfinite().all()
        assert all(grad.isfinite().all() for grad in found.values())


# ---------------------------------------------------------------------- several processes

REDUCED = ("evit", "tome", "elip")


def _in_two_processes(rank, folder):
    """DDP: the gradients as averaged, and their mean by hand. FSDP2: losses and gradients of each half of a batch."""
    found = {}
    for method in REDUCED:
        for checkpointing in (False, True):
            model = build(method, custom_text=checkpointing, **SMALL[method])
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

            sharded = build(method, custom_text=checkpointing, **SMALL[method])
            sharded = sharding.shard(sharded, Ranks(torch.device("cpu"), rank, rank, 2), "fp32")
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


@pytest.mark.parametrize("method", ALL)
def test_trains_with_all_tokens_on_request(method):
    model, batch = build(method, **SMALL[method]), pairs()
    model.tower.reduces = False
    plain = without_token_reduction(model)
    torch.testing.assert_close(step(model, *batch), step(plain, *batch), rtol=1e-8, atol=1e-11)
    assert seen_lengths(model, batch)[0] == [(17, 17)] * 4
    model.tower.reduces = True
    assert model.tower.rrt() > 0


@pytest.mark.parametrize("method", REDUCED)
def test_an_image_alone_is_encoded_as_in_a_batch(method):
    model, (image, _) = build(method, **SMALL[method]).eval(), pairs()
    full = model.encode_image(image)
    model.tower.vision_guided = True
    reduced = model.encode_image(image)
    assert not torch.allclose(reduced, full, rtol=1e-3)
    torch.testing.assert_close(model.encode_image(image[1:2]), reduced[1:2], rtol=1e-9, atol=1e-11)


def test_vision_guided_is_refused_where_an_image_is_not_encoded_by_itself():
    model = build("random").eval()
    model.tower.vision_guided = True
    with pytest.raises(ValueError, match="training") as error:
        model.encode_image(pairs()[0])
    assert_one_sentence(error)
