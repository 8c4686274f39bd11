"""Adapters take part in everything that a block does, against blocks written out plainly, in float64."""
from __future__ import annotations

import copy
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_elip import cut_text, with_shortcuts, with_token_reduction
from open_clip_elip.adapters import adapt, is_adapter
from open_clip_elip.blocks import is_untouched, run_block, run_block_at_cls
from open_clip_elip.identity import ModelError, create, describe
from open_clip_elip.loading import load
from open_clip_elip.profile.flops import count_flops
from open_clip_elip.profile.models import Candidate, ProfileError
from open_clip_elip.reduction.elip import cls_attention
from open_clip_elip.text import can_cut

from .adapted import CLOSE, adapted, assert_same_step
from .tiny import REDUCTION, assert_one_sentence, contrastive_loss, pairs, plain_model, random_blocks, seeded

COUNT = {"lora": (4, 2), "bottleneck": (8, 0)}  # of a block's adapters, and of those that scores hang on
STAGES = {key: tuple(value) for key, value in REDUCTION.items() if key != "method"}
METHODS = {"none": {}, "elip": STAGES, "evit": {}, "tome": {"r": 3}, "random": {}}


def written_out(state: dict[str, Tensor], x: Tensor, heads: int, causal: bool = False) -> tuple[Tensor, Tensor]:
    """A pre-norm block with adapters, by its state dict, for (B, L, D): its output, and the attention's weights."""

    def weight(name: str) -> Tensor:
        place = name.removesuffix(".weight").removesuffix(".in_proj_weight")
        down, up = (state.get(f"{place}.lora_{one}.default.weight") for one in "AB")
        return state[name] if down is None else state[name] + up @ down

    def adapter(place: str, x: Tensor) -> Tensor:
        down, up = (partial(F.linear, weight=state[f"{place}.adapter_{one}.weight"],
                            bias=state[f"{place}.adapter_{one}.bias"]) for one in ("down", "up"))  # fmt: skip
        return x + up(F.gelu(down(x)))

    adapter = adapter if "ls_1.adapter_down.weight" in state else lambda place, x: x
    h = F.layer_norm(x, x.shape[-1:], state["ln_1.weight"], state["ln_1.bias"])
    packed = F.linear(h, weight("attn.in_proj_weight"), state["attn.in_proj_bias"])
    q, k, v = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        logits = logits.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
    weights = logits.softmax(dim=-1)
    attended = (weights @ v).transpose(1, 2).flatten(2)
    x = x + adapter("ls_1", F.linear(attended, weight("attn.out_proj.weight"), state["attn.out_proj.bias"]))
    h = F.layer_norm(x, x.shape[-1:], state["ln_2.weight"], state["ln_2.bias"])
    h = F.gelu(F.linear(h, state["mlp.c_fc.weight"], state["mlp.c_fc.bias"]))
    return x + adapter("ls_2", F.linear(h, state["mlp.c_proj.weight"], state["mlp.c_proj.bias"])), weights


class Towers(nn.Module):
    """Blocks where adapters look for them."""

    def __init__(self):
        super().__init__()
        self.visual, self.text = nn.Module(), nn.Module()
        self.visual.resblocks, self.text.resblocks = random_blocks(1), random_blocks(1)


def named_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace("base_layer.", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}


def leaves(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_(is_adapter(f".{name}")) for name, value in state.items()}


@pytest.mark.parametrize("run", ["forward", "block", "row", "scores"])
def test_a_block_is_what_is_written_out(kind, run):
    torch.manual_seed(0)
    model, x = adapted(Towers(), kind), torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    block = model.visual.resblocks[0]
    state = leaves(block.state_dict())
    expected, weights = written_out(state, x, 2)
    found = {
        "forward": block, "block": partial(run_block, block), "row": partial(run_block_at_cls, block),
        "scores": partial(cls_attention, block),
    }[run](x)  # fmt: skip
    expected = {"row": expected[:, :1], "scores": weights[:, :, 0, 1:].mean(dim=1)}.get(run, expected)
    torch.testing.assert_close(found, expected, **CLOSE)
    direction, moved = torch.randn_like(found), []
    for out in (found, expected):
        (out * direction).sum().backward()
        moved.append(x.grad.clone())
        x.grad = None
    own = named_gradients(block)
    reached = {name: value.grad for name, value in state.items() if value.grad is not None}
    assert own.keys() == reached.keys() and len(own) == COUNT[kind][run == "scores"]
    torch.testing.assert_close([own, moved[0]], [reached, moved[1]], **CLOSE)
    assert is_untouched(block)  # so all shortcuts go on
    for inner in block.attn.modules() if kind == "lora" else block.ls_1.modules():
        handle = inner.register_forward_hook(lambda m, args, out: out)
        assert not is_untouched(block)
        handle.remove()


def test_frozen_weights_stay_as_they_are(kind):
    block = adapted(Towers(), kind).visual.resblocks[0]
    before = copy.deepcopy(block.state_dict())
    for _ in range(3):
        block(torch.randn(2, 5, 16, dtype=torch.float64)).sum().backward()
    assert all(value.equal(before[name]) for name, value in block.state_dict().items())


# ---------------------------------------------------------------------- whole models


@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("custom_text", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_clip_with_every_method(kind, method, custom_text, shortcuts):
    def make() -> nn.Module:
        model = seeded(partial(plain_model, custom_text))
        model = with_shortcuts(model) if method == "none" else with_token_reduction(model, method, **METHODS[method])
        model.tower.shortcuts = shortcuts
        return model

    batch = pairs()
    model = adapted(make(), kind)
    assert_same_step(model, make(), kind, lambda m: contrastive_loss(m(*batch)))
    assert can_cut(model) and (cut_text(batch[1], model) is not batch[1]) == shortcuts
    model.eval()
    features = model.encode_image(batch[0])
    torch.testing.assert_close(features, adapted(make(), kind).eval().encode_image(batch[0]), **CLOSE)


# ---------------------------------------------------------------------- what trains, and what is kept


def test_new_adapters_change_nothing_and_a_state_dict_has_the_plain_models_keys(kind):
    plain, batch = seeded(plain_model), pairs()
    model = with_shortcuts(copy.deepcopy(plain))
    adapt(model, kind, 3)
    model.requires_grad_()  # torch 2.8 rounds products with a frozen weight in another way
    torch.testing.assert_close(model(*batch), with_shortcuts(plain)(*batch), rtol=0, atol=0)
    state = model.state_dict()
    assert {name for name in state if not is_adapter(name)} == set(plain.state_dict())
    other = with_shortcuts(seeded(plain_model, seed=8))
    adapt(other, kind, 3)
    other.load_state_dict(state)
    assert all(value.equal(state[name]) for name, value in other.state_dict().items())
    whole = with_shortcuts(seeded(plain_model, seed=9))
    adapt(whole, kind, 3)
    report = load(whole, plain.state_dict())  # adapters need not be in a file
    assert not report.unused and not report.new


def test_only_adapters_and_heads_are_trained(kind):
    model = with_shortcuts(plain_model())
    adapt(model, kind, 3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if not is_adapter(name)} == {"logit_scale", "text_projection", "visual.proj"}
    assert trained >= {name for name, _ in model.named_parameters() if is_adapter(name)}


def test_lora_is_merged_where_it_is_read():
    pytest.importorskip("peft")
    batch, plain = pairs(), with_shortcuts(seeded(plain_model))
    model = adapted(with_shortcuts(seeded(plain_model)), "lora")
    load(plain, {"state_dict": model.state_dict()})
    torch.testing.assert_close(plain(*batch), model(*batch), **CLOSE)


def test_a_bottleneck_is_no_plain_models():
    model = adapted(with_shortcuts(plain_model()), "bottleneck")
    with pytest.raises(ModelError, match="add --adapter bottleneck") as error:
        load(with_shortcuts(plain_model()), model.state_dict(), source="a.pt")
    assert_one_sentence(error)


def test_a_tower_of_another_kind_is_refused_in_one_sentence(kind):
    with pytest.raises(ModelError, match="image tower") as error:
        create(describe("RN50").with_adapter(kind), device="meta")
    assert_one_sentence(error)


def test_a_profile_names_adapters(kind):
    one = Candidate.parse(f"ViT-S-16-ELIP:adapter={kind},rank=4,lam=0.5")
    assert one.identity.config["adapter"] == {"kind": kind, "rank": 4} and one.identity.token_reduction["lam"] == 0.5
    model = one.build("meta")
    image, text = torch.empty(2, 3, 224, 224, device="meta"), torch.ones(2, 77, dtype=torch.long, device="meta")
    found, plain = (count_flops(m, image, text) for m in (model, Candidate.parse("ViT-S-16-ELIP").build("meta")))
    assert found.forward > plain.forward and found.backward < plain.backward
    for wrong in ("adapter=prefix", f"adapter={kind},rank=0", f"adapter={kind},rank=x", "rank=4"):
        with pytest.raises(ProfileError, match="An adapter is lora or bottleneck") as error:
            Candidate.parse(f"ViT-S-16-ELIP:{wrong}")
        assert_one_sentence(error)


def test_without_peft_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "open_clip_elip.lora", raising=False)
    with pytest.raises(ModelError, match=r"pip install 'open_clip_elip\[peft\]'") as error:
        create(describe("ViT-S-16-ELIP").with_adapter("lora"), device="meta")
    assert_one_sentence(error)
