"""Parameter groups, layer decay, and the schedules against OpenCLIP's."""
from __future__ import annotations

import argparse

import open_clip
import pytest
import torch
from open_clip_train import scheduler

import open_clip_elip
from training.errors import UserError
from training.optim import create_optimizer, create_schedule, distances_from_head, parameter_groups

from .tiny import pairs, run_options, tiny_clip

VISION = {"image_size": 16, "patch_size": 8, "layers": 3, "width": 16, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}


def two_towers(kind=open_clip.CLIP, **text) -> torch.nn.Module:
    """Three image layers and two text layers."""
    return kind(8, VISION, TEXT | text, init_logit_bias=-1.0, output_dict=True)


def names_by_group(model, groups) -> list[set[str]]:
    names = {p: name for name, p in model.named_parameters()}
    return [{names[p] for p in group["params"]} for group in groups]


# ---------------------------------------------------------------------- groups


def test_without_layer_decay_an_openclip_optimizer_state_loads():
    """OpenCLIP's trainer: first what is not decayed, then the rest, each in the model's order."""
    model = tiny_clip(dtype=torch.float32)
    named = dict(model.named_parameters())
    exempt = [n for n, p in named.items() if p.ndim < 2 or "ln" in n or "bias" in n or "logit_scale" in n]
    free, decayed = [named[n] for n in exempt], [p for n, p in named.items() if n not in exempt]
    theirs = torch.optim.AdamW([{"params": free, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], 1e-3)
    batch = pairs(4, dtype=torch.float32)
    sum(v.sum() for v in model(batch["image"], batch["text"]).values()).backward()
    theirs.step()

    ours = create_optimizer(model, run_options())
    assert ours.defaults["fused"]
    assert not any("lr_scale" in g for g in ours.param_groups)
    assert [g["params"] for g in ours.param_groups] == [g["params"] for g in theirs.param_groups]
    assert [g["weight_decay"] for g in ours.param_groups] == [0.0, 0.1]
    ours.load_state_dict(theirs.state_dict())
    for p in model.parameters():
        assert torch.equal(ours.state[p]["exp_avg"], theirs.state[p]["exp_avg"])


@pytest.mark.parametrize(("kind", "prefix"), [(open_clip.CLIP, ""), (open_clip.CustomTextCLIP, "text.")])
def test_distances(kind, prefix):
    found = distances_from_head(two_towers(kind))
    expected = {"logit_scale": 0, "logit_bias": 0}
    expected |= {f"visual.{n}": 4 for n in ("class_embedding", "positional_embedding", "conv1.weight")}
    expected |= {f"visual.ln_pre.{n}": 4 for n in ("weight", "bias")}
    expected |= {f"visual.{n}": 0 for n in ("ln_post.weight", "ln_post.bias", "proj")}
    expected |= {f"{prefix}{n}": 3 for n in ("positional_embedding", "token_embedding.weight")}
    expected |= {f"{prefix}{n}": 0 for n in ("ln_final.weight", "ln_final.bias", "text_projection")}
    inside = [name for name, _ in two_towers().transformer.resblocks[0].named_parameters()]
    for tower, layers in (("visual.", 3), (prefix, 2)):
        for block in range(layers):
            expected |= {f"{tower}transformer.resblocks.{block}.{n}": layers - block for n in inside}
    assert found == expected


def test_distances_of_other_text_towers():
    found = distances_from_head(two_towers(open_clip.CustomTextCLIP, embed_cls=True, proj_bias=True))
    assert found["text.cls_emb"] == 3
    assert found["text.text_projection.weight"] == found["text.text_projection.bias"] == 0
    model = tiny_clip()  # text-first
    found = distances_from_head(model)
    assert found == distances_from_head(open_clip_elip.without_token_reduction(model)) and max(found.values()) == 7


@pytest.mark.parametrize("locked", [False, True])
def test_layer_decay_scales_by_depth_and_keeps_the_weight_decay_rule(locked):
    model = two_towers()
    if locked:  # all but the projection, and the last block with its norm
        model.lock_image_tower(unlocked_groups=2)
    groups = parameter_groups(model, 0.2, layer_decay=0.5)
    plain = dict(zip((0.0, 0.2), names_by_group(model, parameter_groups(model, 0.2)), strict=True))
    distances, seen = distances_from_head(model), []
    for group, names in zip(groups, names_by_group(model, groups), strict=True):
        assert names and names <= plain[group["weight_decay"]]
        assert {0.5 ** distances[name] for name in names} == {group["lr_scale"]}
        seen += names
    assert sorted(seen) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    if not locked:
        expected = [(0.5**distance, decay) for distance in range(5) for decay in (0.0, 0.2)]
        assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == expected


# ---------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("opt", ["adamw", "timm/lamb", "timm/adamw", "timm/sgd"])
@pytest.mark.parametrize("scheduled", [True, False])
def test_layers_move_by_their_share(opt, scheduled):
    model = two_towers().double()
    args = run_options(opt=opt, wd=0.0, layer_decay=0.5, skip_scheduler=not scheduled, lr_scheduler="const")
    optimizer = create_optimizer(model, args)
    schedule = create_schedule(optimizer, args, total_steps=10, warmup_steps=0)
    assert schedule(3) == 1e-3 if scheduled else schedule is None
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3 * g["lr_scale"] for g in optimizer.param_groups]
    assert optimizer.param_groups[0]["lr"] == 1e-3  # what the log shows
    if opt == "timm/lamb":  # scales each tensor's step by its norm
        return
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    for name, distance in distances_from_head(model).items():
        assert moved[name] == pytest.approx(moved["logit_scale"] * 0.5**distance, rel=1e-6) and moved[name] > 0


@pytest.mark.parametrize("opt", ["adamw", "timm/lamb"])
def test_groups_of_a_task(opt):
    new, old = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    groups = [
        {"params": list(new.parameters()), "weight_decay": 0.5, "lr_scale": 5.0},
        {"params": list(old.parameters()), "weight_decay": 0.0},
    ]
    args = run_options(opt=opt, skip_scheduler=False, lr_scheduler="const")
    found = create_optimizer(groups, args)
    assert [group["params"] for group in found.param_groups] == [group["params"] for group in groups]
    assert [(group["lr"], group["weight_decay"]) for group in found.param_groups] == [(5e-3, 0.5), (1e-3, 0.0)]
    assert create_schedule(found, args, total_steps=10, warmup_steps=2)(0) == 5e-4
    assert [group["lr"] for group in found.param_groups] == [2.5e-3, 5e-4]


def test_timm_makes_its_own_groups_without_layer_decay():
    from timm.optim import create_optimizer_v2

    model = two_towers()
    ours = create_optimizer(model, run_options(opt="timm/lamb"))
    theirs = create_optimizer_v2(model, "lamb", lr=1e-3, weight_decay=0.1, eps=1e-6, betas=(0.9, 0.98))
    assert type(ours) is type(theirs)
    assert [g["params"] for g in ours.param_groups] == [g["params"] for g in theirs.param_groups]
    assert not any("lr_scale" in g for g in ours.param_groups)


def test_what_cannot_be_optimized_is_refused_in_a_sentence():
    model = two_towers()
    with pytest.raises(UserError, match="timm cannot create the optimizer 'timm/nosuch'"):
        create_optimizer(model, run_options(opt="timm/nosuch"))
    with pytest.raises(UserError, match="--layer-decay scales the learning rate, so it needs --lr"):
        create_optimizer(model, run_options(opt="timm/lamb", lr=None, layer_decay=0.5))
    with pytest.raises(UserError, match="nothing to train"):
        create_optimizer(model.requires_grad_(False), run_options())


# ---------------------------------------------------------------------- schedule


def schedule_args(name: str, **changes) -> argparse.Namespace:
    values = {"lr": 3e-4, "lr_scheduler": name, "lr_cooldown_power": 1.5, "lr_cooldown_end": 1e-5}
    return run_options(skip_scheduler=False, **(values | changes))


def two_group_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=1.0)


SCHEDULES = {"cosine": scheduler.cosine_lr, "const": scheduler.const_lr, "const-cooldown": scheduler.const_lr_cooldown}


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
@pytest.mark.parametrize("name", SCHEDULES)
def test_whole_steps_are_openclips(name, warmup):
    total, cooldown = 40, 13
    ours, theirs = two_group_optimizer(), two_group_optimizer()
    schedule = create_schedule(
        ours, schedule_args(name), total_steps=total, warmup_steps=warmup, cooldown_steps=cooldown
    )
    more = (cooldown, 1.5, 1e-5) if name == "const-cooldown" else ()
    reference = SCHEDULES[name](theirs, 3e-4, warmup, total, *more)
    for step in range(total):
        assert schedule(step) == reference(step)
        assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # warm-up 4, total 12, cooldown 4 to 0, squared
        ("cosine", {0: 1 / 4, 1.5: 2.5 / 4, 3: 1, 3.5: 1, 4: 1, 8: 1 / 2, 10: (1 - 2**-0.5) / 2, 12: 0, 13.5: 0}),
        ("const", {0: 1 / 4, 2.5: 3.5 / 4, 3.9: 1, 7.3: 1, 20: 1}),
        ("const-cooldown", {3.5: 1, 8: 1, 9: 0.5625, 10: 0.25, 10.5: 0.140625, 12: 0, 12.5: 0}),
    ],
)
def test_fractions_of_a_step_and_beyond_the_end(name, values):
    args = schedule_args(name, lr=1.0, lr_cooldown_power=2, lr_cooldown_end=0.0)
    schedule = create_schedule(two_group_optimizer(), args, total_steps=12, warmup_steps=4, cooldown_steps=4)
    for step, value in values.items():
        assert schedule(step) == pytest.approx(value, abs=1e-12), step


def test_resuming_does_not_bring_the_old_layer_decay_back():
    model = two_towers()
    old = create_optimizer(model, run_options(layer_decay=0.5))
    args = run_options(layer_decay=0.75, skip_scheduler=False, lr_scheduler="const")
    new = create_optimizer(model, args)
    schedule = create_schedule(new, args, total_steps=10, warmup_steps=0)
    new.load_state_dict(old.state_dict())
    schedule(5)
    assert new.param_groups[-1]["lr"] == 1e-3 * 0.75**4


