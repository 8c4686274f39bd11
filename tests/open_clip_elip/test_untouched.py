"""Whatever was changed about a tower, or hangs on it, runs as OpenCLIP runs it, in both towers; or one sentence."""
from __future__ import annotations

import io
import types
from collections.abc import Callable

import open_clip
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, weight_norm
from torch.utils.flop_counter import FlopCounterMode

from open_clip_elip import cut_text, with_shortcuts, with_token_reduction
from open_clip_elip.blocks import is_adapted, is_untouched
from open_clip_elip.text import can_cut

from . import reference
from .tiny import REDUCTION, assert_one_sentence, contrastive_loss, pairs, plain_model, seeded, step

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
STAGES = {key: tuple(value) for key, value in REDUCTION.items() if key != "method"}
METHODS = {"elip": STAGES, "evit": {}, "tome": {"r": 3}, "random": {}}


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


class Averaging(nn.Module):
    """Stands in for `nn.MultiheadAttention`, a block or a norm; mixes the tokens."""

    def forward(self, x, *attended, attn_mask=None, need_weights=False):
        mixed = 2 * x - x.mean(dim=1, keepdim=True)
        return mixed if not attended or attended[0] is None else (mixed, None)


def replace(name: str, function: Callable) -> Callable:
    return lambda module: setattr(module, name, types.MethodType(function, module))


def parametrized(attn: nn.Module) -> None:
    parametrize.register_parametrization(attn, "in_proj_weight", Double())


def add(name: str, hook: Callable, **options) -> Callable:
    return lambda module: getattr(module, f"register_{name}")(hook, **options)


HOOK = add("forward_hook", lambda m, args, out: 2 * out)
PRE_HOOK = add("forward_pre_hook", lambda m, args: (args[0] * 1.5,))
KEYWORDS = add("forward_hook", lambda m, args, keywords, out: out * (2 + len(keywords)), with_kwargs=True)
MIXING = add("forward_hook", lambda m, args, out: out + out.sum(dim=1, keepdim=True))
# What happens to which part of a tower; "" is the tower itself.
CHANGES = {
    "hook on the tower": ("", add("forward_hook", lambda m, args, out: out + 1)),
    "forward of the tower": ("", replace("forward", lambda self, x: 1 + type(self).forward(self, x))),
    "pre-hook on the stack": ("transformer", PRE_HOOK),
    "hook on the stack": ("transformer", HOOK),
    "forward of the stack": ("transformer", replace("forward", lambda self, x, attn_mask=None: 2 * x)),
    "hook on the last norm": ("NORM", MIXING),
    "another last norm": ("", lambda tower: setattr(tower, tower.norm, Averaging())),
    "hook on a block": ("BLOCK", HOOK),
    "pre-hook on the last block": ("LAST", PRE_HOOK),
    "hook with keywords on a block": ("BLOCK", KEYWORDS),
    "backward hook on a block": ("BLOCK", add("full_backward_hook", lambda m, given, out: (given[0] * 3, *given[1:]))),
    "forward of a block": ("BLOCK", replace("forward", lambda self, q_x, *_, **__: q_x * 2)),
    "attention of a block": ("BLOCK", replace("attention", lambda self, q_x, **_: q_x * 2)),
    "forward of attn": ("BLOCK.attn", replace("forward", lambda self, q, k, v, **_: (q * 2, None))),
    "hook on attn": ("BLOCK.attn", add("forward_hook", lambda m, args, out: (out[0] * 2, out[1]))),
    "hook on out_proj": ("BLOCK.attn.out_proj", HOOK),  # which nn.MultiheadAttention never calls
    "hook on ln_1": ("BLOCK.ln_1", HOOK),
    "hook on ls_1 of the last block": ("LAST.ls_1", MIXING),
    "hook on c_fc of the last block": ("LAST.mlp.c_fc", MIXING),
    "another attention": ("BLOCK", lambda block: setattr(block, "attn", Averaging())),
    "another norm": ("LAST", lambda block: setattr(block, "ln_2", Averaging())),
    "an adapter behind the MLP": ("LAST", lambda block: block.mlp.append(Averaging())),
    "another block": ("transformer.resblocks", lambda blocks: blocks.__setitem__(-1, Averaging())),
    "parametrized weights": ("BLOCK.attn", parametrized),
    "weight norm": ("BLOCK.attn", lambda attn: weight_norm(attn, "in_proj_weight")),
}  # fmt: skip
NO_CHANGE = ("hook on out_proj", "weight norm")  # of any number


def change(tower: nn.Module, name: str) -> None:
    """Does to a tower what `name` says, in place."""
    tower.norm = "ln_post" if hasattr(tower, "ln_post") else "ln_final"
    short = {"BLOCK": "transformer.resblocks.1", "LAST": "transformer.resblocks.-1", "NORM": tower.norm}
    path, action = CHANGES[name]
    head, _, rest = path.partition(".")
    part = tower
    for name in filter(None, [*short.get(head, head).split("."), *rest.split(".")]):
        part = part[int(name)] if name.lstrip("-").isdigit() else getattr(part, name)
    action(part)


def equal(a, b) -> bool:
    both = [(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x]
    return all(torch.allclose(x, y) for x, y in both if x is not None and y is not None)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tower", ["visual", "text"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_tower_runs_as_openclip_runs_it(name, tower, checkpointing):
    plain = plain_model(True, text={"layers": 3})
    plain.set_grad_checkpointing(checkpointing)
    image, text = pairs()
    parts = cut_text(text, with_shortcuts(plain))  # while nothing was changed yet
    before = step(plain, image, text)
    change(getattr(plain, tower), name)
    expected = step(plain, image, text)
    if name not in NO_CHANGE:
        assert expected[1].keys() != before[1].keys() or not equal(expected, before)
    model = with_shortcuts(plain)
    for given in (text, cut_text(text, model), parts):
        torch.testing.assert_close(step(model, image, given), expected, **CLOSE)


def test_the_text_tower_inside_of_clip_too():
    for part in ("token_embedding", "transformer", "ln_final", "transformer.resblocks.0.mlp"):
        plain = plain_model()
        model, (image, text) = with_shortcuts(plain), pairs()
        assert can_cut(model)
        plain.get_submodule(part).register_forward_hook(lambda m, args, out: out + out.flatten(0, -2).sum(dim=0))
        assert not can_cut(model) and cut_text(text, model) is text
        torch.testing.assert_close(step(model, image, text), step(plain, image, text), **CLOSE)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-S-16-ELIP", "ViT-B-16-SigLIP"])
def test_what_openclip_builds_is_untouched(name, precision):
    with torch.device("meta"):
        model = open_clip.create_model(name, precision=precision, device="meta")
    blocks = [*model.visual.transformer.resblocks] if hasattr(model.visual, "transformer") else []
    blocks += getattr(model, "text", model).transformer.resblocks
    assert blocks and all(map(is_untouched, blocks))
    assert name == "ViT-B-16-SigLIP" or (is_untouched(model.visual) and can_cut(model))


def test_a_method_replaced_on_the_class(monkeypatch):
    plain = plain_model()
    kind, model, (image, text) = type(plain.transformer.resblocks[0]), with_shortcuts(plain), pairs()
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, attn_mask=None: forward(self, x, None, None, attn_mask) * 2)
    torch.testing.assert_close(model(image, text), plain(image, text), **CLOSE)


def test_hooks_on_all_modules_are_obeyed_but_for_those_of_torchs_counter():
    plain = plain_model(True)
    model, batch, block = with_shortcuts(plain), pairs(), plain.visual.transformer.resblocks[0]
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: (out[0] * 2, out[1]) if isinstance(m, nn.MultiheadAttention) else None
    )
    try:
        assert not is_untouched(block)
        torch.testing.assert_close(step(model, *batch), step(plain, *batch), **CLOSE)
    finally:
        hook.remove()
    with FlopCounterMode(display=False):
        assert is_untouched(block)


def test_tokens_asked_for_later_are_there():
    plain, image = plain_model(), pairs()[0]
    model = with_shortcuts(plain)
    plain.visual.output_tokens = True
    torch.testing.assert_close(model.encode_image(image), plain.encode_image(image), **CLOSE)


def widen(tower) -> None:
    tower.attn_mask[5, 2:9] = 0.5


@pytest.mark.parametrize("edit", [widen, lambda tower: setattr(tower, "attn_mask", tower.attn_mask.clamp(min=-3))])
@pytest.mark.parametrize("custom_text", [False, True])
def test_a_mask_edited_at_any_time_is_obeyed(custom_text, edit):
    plain = plain_model(custom_text)
    model, text = with_shortcuts(plain), pairs()[1]
    before, parts = model.encode_text(text), cut_text(text, model)
    for one in (plain, model):
        edit(getattr(one, "text", one))
    expected = plain.encode_text(text)
    assert not can_cut(model) and not torch.allclose(expected, before)
    for given in (text, parts):
        torch.testing.assert_close(model.encode_text(given), expected, **CLOSE)


def test_a_last_block_that_is_an_earlier_one_too():
    plain = plain_model()
    for blocks in (plain.visual.transformer.resblocks, plain.transformer.resblocks):
        blocks[0] = blocks[-1]
    model, batch = with_shortcuts(plain), pairs()
    assert can_cut(model)
    torch.testing.assert_close(step(model, *batch), step(plain, *batch), **CLOSE)


@pytest.mark.parametrize("custom_text", [False, True])
def test_gradients_of_each_sample_and_whole_models_in_files(custom_text):
    plain = plain_model(custom_text).eval()
    expected, (image, text) = None, pairs()
    for model in (plain, with_shortcuts(plain), with_token_reduction(plain, **REDUCTION)):

        def product(parameters, image, text, model=model):
            out = torch.func.functional_call(model, parameters, (image[None], text[None]))
            return (out["image_features"] * out["text_features"]).sum()

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        found = torch.func.vmap(torch.func.grad(product), in_dims=(None, 0, 0))(parameters, image, text)
        expected = expected or found
        torch.testing.assert_close(found, expected, **CLOSE)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        torch.testing.assert_close(torch.load(file, weights_only=False)(image, text), model(image, text))


# ---------------------------------------------------------------------- with token reduction


def reduced(method: str) -> nn.Module:
    return with_token_reduction(plain_model(), method, **METHODS[method])


REFUSED = {
    "forward of the tower": METHODS, "forward of the stack": METHODS,
    **{name: ("elip", "evit", "tome") for name in (
        "forward of a block", "attention of a block", "forward of attn", "another attention", "weight norm",
    )},
    "hook on attn": ("evit", "tome"), "another block": ("elip", "tome"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CHANGES)
def test_reduction_of_a_changed_tower_obeys_or_is_refused(name, method):
    model, batch = reduced(method), pairs()
    before = seeded(step, model, *batch)
    change(model.visual, name)
    if method in REFUSED.get(name, ()):
        with pytest.raises(ValueError, match="changed|replaced") as error:
            model(*batch)
        assert_one_sentence(error)
        assert str(error.value).endswith("without token reduction.")
        return
    found = seeded(step, model, *batch)
    assert name in NO_CHANGE or found[1].keys() != before[1].keys() or not equal(found, before)
    model.tower.shortcuts = False  # so that no row is left out
    torch.testing.assert_close(seeded(step, model, *batch), found, **CLOSE)


@pytest.mark.parametrize("name", ["parametrized weights", "hook on ln_1", "hook on a block", "hook on the stack",
                                  "pre-hook on the stack"])  # fmt: skip
def test_the_right_tokens_of_a_changed_tower(name):
    """By the slow references, whose blocks are called whole in ELIP, and part by part in the others."""
    references = {
        "elip": lambda blocks, x, guidance: reference.run(blocks, x, guidance, **STAGES)[0],
        "evit": lambda blocks, x, _: reference.evit(blocks, x, 0.7, (1, 2, 3))[0],
        "tome": lambda blocks, x, _: reference.tome(blocks, x, 3)[0],
    }
    for method, run in references.items():
        if method != "elip" and name == "hook on a block":  # of which the others' references know nothing
            continue
        model, (image, _) = reduced(method), pairs()
        visual, guidance = model.visual, torch.randn(3, 32, dtype=torch.float64)
        change(visual, name)
        factor_in, factor_out = 1.5 if "pre-hook" in name else 1, 2 if name == "hook on the stack" else 1
        blocks, x = list(visual.transformer.resblocks), visual._embeds(image) * factor_in
        expected = run(blocks, x, guidance) * factor_out
        torch.testing.assert_close(model.tower.tokens(image, guidance, reduce=True), expected, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_hooks_see_the_tokens_that_are_there(method):
    model, seen = reduced(method), []
    for block in model.visual.transformer.resblocks:
        block.register_forward_hook(lambda m, args, out: seen.append((args[0].shape[1], out.shape[1])))
    model.visual.transformer.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    model.visual.register_forward_hook(lambda m, args, out: seen.append((args[0].shape, out.shape)))
    image, text = pairs()
    model.tower.shortcuts = False
    model(image, text)
    layers = model.reduction.layers(16)
    assert seen == [*layers, layers[-1].mlp, (image.shape, (3, 20))]


def adapted(method: str, **options) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["attn", "c_fc"])
    torch.manual_seed(1)
    model = peft.get_peft_model(reduced(method), config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("method", METHODS)
def test_lora_is_in_effect_everywhere(method):
    active, merged = adapted(method), adapted(method).merge_and_unload()
    batch = pairs()
    for training in (True, False):
        expected = seeded(merged.train(training), *batch)
        torch.testing.assert_close(seeded(active.train(training), *batch), expected, rtol=1e-8, atol=1e-10)
    contrastive_loss(active.train()(*batch)).backward()
    block = active.base_model.model.visual.transformer.resblocks[0]
    assert is_adapted(block)  # run as the merged model's blocks are
    block.attn.register_forward_hook(lambda m, args, out: out)
    assert not is_adapted(block)
    adapters = {n: p for n, p in active.named_parameters() if "lora_" in n and "visual" in n}
    assert len(adapters) == 4 * 3 * 2 and all(p.grad.any() for p in adapters.values())


# ---------------------------------------------------------------------- graphs for other inputs


@pytest.mark.parametrize("custom_text", [False, True])
def test_traced_and_exported_models_take_other_captions_and_batches(custom_text):
    plain = plain_model(custom_text).eval()
    example, (image, text) = pairs(2), pairs(7)
    example[1][:, 2:] = 0
    example[1][:, 1] = 63
    expected = plain(image, text)
    for model in (with_shortcuts(plain), with_token_reduction(plain, **REDUCTION)):
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(model, example, dynamic_shapes=({0: batch}, {0: batch})).module()
        torch.testing.assert_close(exported(image, text), expected, **CLOSE)
        traced = torch.jit.trace(model, example, strict=False, check_trace=False)
        torch.testing.assert_close(traced(image, text), expected, **CLOSE)
        assert type(torch.jit.script(model)).__name__ == "RecursiveScriptModule"
