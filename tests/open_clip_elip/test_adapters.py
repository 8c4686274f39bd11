"""Adapters take part in everything that a block does, against blocks written out plainly, in float64."""
from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from open_clip_elip import cut_text, with_shortcuts, with_token_reduction
from open_clip_elip.adapters import KINDS, Bottleneck, adapt, is_adapter, merged, train_new
from open_clip_elip.blocks import is_untouched, run_block, run_block_at_cls
from open_clip_elip.fusion.bert import Tokens
from open_clip_elip.fusion.momentum import Queue, follow, twin_of
from open_clip_elip.fusion.objectives import mask_tokens, places_to_write
from open_clip_elip.fusion.steps import albef_losses, blip_losses, meter_losses, teach
from open_clip_elip.identity import Identity, ModelError, create, describe
from open_clip_elip.reduction.elip import cls_attention
from open_clip_elip.text import can_cut
from open_clip_elip.weights import load, tensors

from ..training.fusion_runs import ALBEF, BLIP, METER
from .tiny import REDUCTION, assert_one_sentence, contrastive_loss, pairs, plain_model, random_blocks, seeded

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
STAGES = {key: tuple(value) for key, value in REDUCTION.items() if key != "method"}
METHODS = {"none": {}, "elip": STAGES, "evit": {}, "tome": {"r": 3}, "random": {}}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    if request.param == "lora":
        pytest.importorskip("peft")
    return request.param


def adapted(model: nn.Module, kind: str) -> nn.Module:
    """With adapters of rank 3 that are not zero, and all the same for the same model."""
    adapt(model, kind, 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if is_adapter(name):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


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
    model, x = adapted(Towers(), kind), torch.randn(2, 5, 16, dtype=torch.float64)
    block = model.visual.resblocks[0]
    state = leaves(block.state_dict())
    expected, weights = written_out(state, x, 2)
    found = {
        "forward": block, "block": partial(run_block, block), "row": partial(run_block_at_cls, block),
        "scores": partial(cls_attention, block),
    }[run](x)  # fmt: skip
    expected = {"row": expected[:, :1], "scores": weights[:, :, 0, 1:].mean(dim=1)}.get(run, expected)
    torch.testing.assert_close(found, expected, **CLOSE)
    direction = torch.randn_like(found)
    for out in (found, expected):
        (out * direction).sum().backward(retain_graph=True)
    own = named_gradients(block)
    reached = {name: value.grad for name, value in state.items() if value.grad is not None}
    assert own.keys() == reached.keys() and (kind == "bottleneck" and run == "scores" or own)
    torch.testing.assert_close(own, reached, **CLOSE)
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


def reference(plain: nn.Module, model: nn.Module, kind: str):
    """`plain` with `model`'s adapters, which get the gradients: its own weights with B A added to them, or hooks."""
    parameters = dict(model.named_parameters())
    with_names = {name.replace("base_layer.", ""): p for name, p in parameters.items()}
    if kind == "lora":
        effective = merged({name: p for name, p in with_names.items()})
        return lambda function: functional_call(Calls(plain, function), {f"m.{k}": v for k, v in effective.items()}, ())
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Bottleneck):

            def put(m, args, down=module.adapter_down, up=module.adapter_up):
                return args[0] + up(F.gelu(down(args[0])))

            place = plain.get_submodule(name)
            if not place._forward_pre_hooks:
                place.register_forward_pre_hook(put)
    plain.load_state_dict(model.state_dict(), strict=False)
    return lambda function: function(plain)


class Calls(nn.Module):
    def __init__(self, m: nn.Module, function):
        super().__init__()
        self.m, self.function = m, function

    def forward(self):
        return self.function(self.m)


def assert_same_step(model: nn.Module, plain: nn.Module, kind: str, loss) -> None:
    """`loss` of the adapted model, and its gradients, are the reference's."""
    run = reference(plain, model, kind)
    expected = seeded(lambda: run(loss))
    expected.backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if is_adapter(name) and p.grad is not None}
    model.zero_grad()
    found = seeded(loss, model)
    found.backward()
    torch.testing.assert_close(found, expected, **CLOSE)
    own = {name: p.grad for name, p in model.named_parameters() if is_adapter(name) and p.grad is not None}
    assert own.keys() == wanted.keys() == {name for name in trained if is_adapter(name) and name in own}
    assert all(gradient.any() for gradient in own.values()) and len(own) > 8
    torch.testing.assert_close(own, wanted, **CLOSE)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


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


def fusion(config: dict, task: str = "pretraining", reduces: bool = True) -> nn.Module:
    config = json.loads(json.dumps(config)) | {"task": task}
    config["text_cfg"]["bert"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if "fusion" in config["text_cfg"]:
        config["text_cfg"]["fusion"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if not reduces:
        del config["token_reduction"]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = create(Identity(config["family"], "x", config, {"size": (32, 32)})).double()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.mul_(8)  # BERT's own are so small that nothing hangs on attention
    return model.train()


def texts(*lengths: int) -> Tensor:
    ids = torch.randint(5, 62, (len(lengths), max(lengths)))
    ids[:, 0] = 2
    return ids * (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None])


def pretraining_loss(config: dict):
    torch.manual_seed(1)
    image, text, order = torch.randn(4, 3, 32, 32, dtype=torch.float64), texts(6, 4, 9, 5), torch.arange(4).roll(1)
    masked, chosen, labels = mask_tokens(text, 4, 64, torch.tensor([0, 2]))
    queues = nn.ModuleDict({name: Queue(16, 8) for name in ("image", "text")}).double()
    twin = None if config is METER else twin_of(fusion(config))

    def loss(model: nn.Module) -> Tensor:
        tokens = model.tokens_in(text)
        if config is METER:
            seen, matches = torch.tensor([0, 1, 3, 2]), torch.tensor([1, 1, 0, 0])
            words = {"masked": masked, "chosen": chosen, "labels": labels}
            return sum(meter_losses(model, image, text, **words, seen=seen, matches=matches, tokens=tokens).values())
        more = {"negatives": [order, order], "alpha": 0.4, "tokens": tokens}
        if config is BLIP:
            places = places_to_write(model.mask(text))
            taught = teach(twin, image, text, tokens=tokens)
            return sum(blip_losses(model, taught, queues, image, text, chosen=places, **more).values())
        taught = teach(twin, image, text, tokens=tokens, masked=masked, chosen=chosen)
        words = {"masked": masked, "chosen": chosen, "labels": labels}
        return sum(albef_losses(model, taught, queues, image, text, **words, **more).values())

    return loss


@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("config", [ALBEF, BLIP, METER], ids=["albef", "blip", "meter"])
def test_pretraining_of_fusion_models(kind, config, shortcuts, float64):
    model, plain = adapted(fusion(config), kind), fusion(config)
    model.tower.shortcuts = plain.tower.shortcuts = shortcuts
    assert_same_step(model, plain, kind, pretraining_loss(config))


@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("config", [ALBEF, BLIP, METER], ids=["albef", "blip", "meter"])
def test_tasks_of_fusion_models(kind, config, shortcuts, float64):
    """One sentence about two images, whose layers share weights, and a question whose states a decoder looks at."""
    torch.manual_seed(1)
    image, text = torch.randn(4, 3, 32, 32, dtype=torch.float64), texts(6, 4)

    def answer(m: nn.Module) -> Tensor:
        memory = m.read_questions(image[:2], text)
        return m.answer_states(text, memory).square().sum()

    losses = {"nlvr2": lambda m: m(image, text).square().sum()} | ({} if config is METER else {"vqa": answer})
    for task, loss in losses.items():
        model, plain = (fusion(config, task, reduces=False) for _ in range(2))
        model.tower.shortcuts = plain.tower.shortcuts = shortcuts
        assert_same_step(adapted(model, kind), plain, kind, loss)


def test_layers_that_share_weights_share_adapters(kind):
    model = adapted(fusion(ALBEF, "nlvr2", reduces=False), kind)
    first, second = (layer.crossattention for layer in model.fusion[:2])
    assert first.self.key is second.self.key and first.output is not second.output
    model = adapted(fusion(BLIP), kind)
    one, other = model.text.encoder.layer[0], model.decoder.bert.encoder.layer[0]
    assert one.crossattention is other.crossattention and one.attention is not other.attention


# ---------------------------------------------------------------------- what trains, and what is kept


def test_new_adapters_change_nothing_and_a_state_dict_has_the_plain_models_keys(kind):
    plain, batch = seeded(plain_model), pairs()
    model = with_shortcuts(copy.deepcopy(plain))
    adapt(model, kind, 3)
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
    model = fusion(ALBEF)
    adapt(model, kind, 3)
    parts = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad and not is_adapter(name)}
    assert parts == {"vision_proj", "text_proj", "itm_head", "temp", "mlm_head"}
    train_new(model)
    parts = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad and not is_adapter(name)}
    assert parts == {"vision_proj", "text_proj", "itm_head", "temp", "mlm_head", "fusion"}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and name.startswith("fusion.")]
    assert not any("crossattention" in name for name in frozen)


def test_lora_is_merged_where_it_is_read():
    pytest.importorskip("peft")
    batch, plain = pairs(), with_shortcuts(seeded(plain_model))
    model = adapted(with_shortcuts(seeded(plain_model)), "lora")
    load(plain, {"state_dict": model.state_dict()})
    torch.testing.assert_close(plain(*batch), model(*batch), **CLOSE)
    model, plain = adapted(fusion(BLIP), "lora"), fusion(BLIP)
    plain.load_state_dict(tensors({"state_dict": model.state_dict()}, "here"))
    loss = pretraining_loss(BLIP)
    torch.testing.assert_close(seeded(loss, plain), seeded(loss, model), **CLOSE)


def test_a_bottleneck_is_no_plain_models():
    model = adapted(with_shortcuts(plain_model()), "bottleneck")
    with pytest.raises(ModelError, match="add --adapter bottleneck") as error:
        load(with_shortcuts(plain_model()), model.state_dict(), source="a.pt")
    assert_one_sentence(error)


def test_a_twin_follows(kind):
    model = adapted(fusion(ALBEF), kind)
    twin = twin_of(model)
    before = {name: p.clone() for name, p in twin.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_adapter(name):
                p.add_(1)
    follow(twin, model, 0.75)
    for name, p in twin.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.25 * is_adapter(name), **CLOSE)
    twin.load_state_dict(model.state_dict())
    assert all(value.equal(model.state_dict()[name]) for name, value in twin.state_dict().items())


def test_depth_is_stochastic_behind_the_adapter():
    plain, model = fusion(ALBEF), adapted(fusion(ALBEF), "bottleneck")
    for one in (plain, model):
        one.set_drop_path(0.9)
    image, blocks = torch.randn(2, 3, 32, 32, dtype=torch.float64), model.visual.transformer.resblocks
    assert all(isinstance(block.ls_1, Bottleneck) for block in blocks)
    x = torch.randn(64, 3, 32, dtype=torch.float64)
    out = seeded(blocks[-1].ls_1, x)
    dropped = (out == 0).flatten(1).all(dim=1)
    assert 0.6 < dropped.double().mean() < 1 and model.image_states(image).shape == plain.image_states(image).shape


def test_a_tower_of_another_kind_is_refused_in_one_sentence(kind):
    with pytest.raises(ModelError, match="image tower") as error:
        create(describe("RN50").with_adapter(kind), device="meta")
    assert_one_sentence(error)
