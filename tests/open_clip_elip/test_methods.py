"""The rival methods against their slow references: features, gradients, order, sizes, budgets, and what they refuse."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from open_clip_elip import with_token_reduction, without_token_reduction
from open_clip_elip.reduction import (
    METHODS,
    Evit,
    EvitConfig,
    RandomDrop,
    RandomDropConfig,
    Tome,
    TomeConfig,
    drop_alternatives,
)
from training import sharding
from training.distributed import Ranks

from ..processes import spawn
from . import reference_methods as reference
from .tiny import contrastive_loss, gradients, pairs, plain_model, random_blocks

RIVALS = ("evit", "tome", "random")
ALL = ("elip", *RIVALS)
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

    assert_same(model, batch, run)
    assert_work(model, lengths)
    assert seen_lengths(model, batch) == lengths
    for of_image in members:
        assert of_image[0] == [0]  # [CLS] first, merged with nothing
        assert sorted(sum(of_image, [])) == list(range(1 + model.tower.num_patches()))


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
        assert distance <= abs(rrt_of(tome._layers(patches, (r,) * layers), patches) - target) + 1e-12


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
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_without_breaks_or_recompilation(name, fresh_compiler):
    method = name.split()[0]
    model = build(method, depth=2, **COMPILED[name])
    model.set_grad_checkpointing(method == "tome")
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
@pytest.mark.parametrize("method", ALL)
def test_gradient_checkpointing_changes_nothing(method, shortcuts):
    model, batch = build(method, **SMALL[method]), pairs()
    model.tower.shortcuts = shortcuts
    expected = seeded(step, model, *batch)
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(seeded(step, model, *batch), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ALL)
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
@pytest.mark.parametrize("method", ALL)
def test_weights_in_low_precision(method, dtype):
    model = build(method, **SMALL[method]).to(dtype)
    image, text = pairs(4, dtype=dtype)
    output = model(image, text)
    assert output["image_features"].dtype == dtype
    contrastive_loss({k: v.float() for k, v in output.items()}).backward()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("size", [16, (8, 64), (56, 40), 64])
@pytest.mark.parametrize("method", ALL)
def test_other_resolutions(method, size):
    model = build(method, size=size)
    batch = pairs(2, size)
    lengths = seen_lengths(model, batch)
    assert_work(model, lengths)
    model.tower.shortcuts = True
    _, found = step(model, *batch)
    assert all(grad is not None and grad.isfinite().all() for grad in found.values())


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

REDUCED = {"evit": {}, "tome": {"r": 3}, "elip": {}}


def _in_two_processes(rank, folder):
    """DDP: the gradients as averaged, and their mean by hand. FSDP2: losses and gradients of each half of a batch."""
    found = {}
    for method, options in REDUCED.items():
        for checkpointing in (False, True):
            model = build(method, custom_text=checkpointing, **options)
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

            sharded = build(method, custom_text=checkpointing, **options)
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
    plain = without_token_reduction(model)
    assert model.tower.rrt() > 0
    model.tower.reduces = False
    torch.testing.assert_close(step(model, *batch), step(plain, *batch), rtol=1e-8, atol=1e-11)
    assert model.tower.token_counts() == [17] * 4
    assert model.tower.rrt() == 0
    assert seen_lengths(model, batch) == [(17, 17)] * 4
    model.tower.reduces = True
    assert model.tower.rrt() > 0 and max(model.tower.token_counts()) <= 17


@pytest.mark.parametrize("method", ["elip", "evit", "tome"])
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
    ],
)
def test_what_is_refused(method, options, names):
    with pytest.raises(ValueError, match=names) as error:
        build(method, **options)
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
    ],
)
def test_a_configuration_survives_json(method, options):
    kind = METHODS[method]
    config = kind.Config.from_dict(options)
    assert kind.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert kind(config, 4).token_counts(16)


def test_an_option_replaces_its_alternatives():
    assert drop_alternatives({"keep_rate": 0.7, "fuse": True}, {"target_rrt": 0.3}) == {"fuse": True}
    assert drop_alternatives({"target_rrt": 0.7}, {"r": 3}) == {}
    assert drop_alternatives({"r": 13, "prop_attn": True}, {"prop_attn": False}) == {"r": 13, "prop_attn": True}
