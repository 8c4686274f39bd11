"""Counts against torch's own: operations exactly, kept activations to a few percent."""
from __future__ import annotations

import argparse

import open_clip
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import open_clip_elip
from open_clip_elip import TextParts, cost, cut_text
from open_clip_elip.profile.flops import _WithoutGradient
from open_clip_elip.reduction import LayerWork
from open_clip_elip.text import can_cut
from training.cost import StepCost, activation_bytes, memory_estimate, peak_flops, step_cost, summary

BATCH = 2
VISION = {"image_size": 16, "patch_size": 4, "layers": 6, "width": 32, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 48, "heads": 3, "layers": 3}
ELIP = {"method": "elip"}


def build(reduction=ELIP, custom_text=False, vision=None, text=None, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    names = ("CLIP", "CustomTextCLIP") if reduction is None else ("TextFirstCLIP", "TextFirstCustomTextCLIP")
    kind = getattr(open_clip if reduction is None else open_clip_elip, names[custom_text])
    options = {} if reduction is None else {"token_reduction": reduction}
    config = {"embed_dim": 24, "vision_cfg": VISION | (vision or {}), "text_cfg": TEXT | (text or {})}
    return kind(**config, **changes, **options, output_dict=True).train()


def batch(model, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor | TextParts]:
    """Images, and captions as long as the context."""
    image = torch.randn(BATCH, 3, *model.visual.image_size, dtype=dtype)
    text = torch.randint(1, model.vocab_size, (BATCH, model.context_length))
    cuts = getattr(model, "shortcuts", False) and can_cut(model)
    return image, TextParts((text,), torch.arange(BATCH)) if cuts else text


def measured(model, image=None, text=None) -> tuple[int, int]:
    """Operations of forward and backward on one pair, and those of scoring within them, as torch counts them."""
    if image is None:
        image, text = batch(model)
    # torch's counter knows the plain products; fused attention kernels of some devices it does not know.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with _WithoutGradient(counter) as scoring:
            out = model(image, text)
        (out["image_features"].sum() + out["text_features"].square().mean() + out["logit_scale"]).backward()
    return counter.get_total_flops() // len(image), scoring.flops // len(image)


def lock_image(groups: int):
    return lambda model: model.lock_image_tower(unlocked_groups=groups)


def lock_text(layers: int):
    return lambda model: model.lock_text_tower(unlocked_layers=layers)


MODELS = {
    "plain": {"reduction": None},
    "plain custom text": {"reduction": None, "custom_text": True},
    "text first": {},
    "text first custom text": {"custom_text": True},
    "pruning only": {"reduction": ELIP | {"merge": False}},
    "counts": {"reduction": ELIP | {"depths": [1, 3, 2], "keep_count": [12, 7, 2]}},
    "scoring depth": {"reduction": ELIP | {"scoring_depth": 1}},
    "nothing to remove": {"reduction": ELIP | {"keep_ratio": [1, 1, 1, 1]}},
    "not square": {"vision": {"image_size": [16, 26]}},
    "patch dropout": {"vision": {"patch_dropout": 0.4}},
    "plain patch dropout": {"reduction": None, "vision": {"patch_dropout": 0.4}},
    "layer scale": {"vision": {"ls_init_value": 0.1}, "text": {"ls_init_value": 0.1}},
    "wide mlp": {"vision": {"mlp_ratio": 3}, "text": {"mlp_ratio": 2.5}},
    "mean pool": {"vision": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}},
    "text bias, class token": {
        "custom_text": True, "text": {"proj_bias": True, "embed_cls": True, "pool_type": "last"},
    },
    "evit": {"reduction": {"method": "evit", "keep_rate": 0.6}},
    "evit without fusing": {"reduction": {"method": "evit", "target_rrt": 0.4, "fuse": False, "layers": [1, 3, 6]}},
    "tome": {"reduction": {"method": "tome", "r": 2}},
    "tome without proportional attention": {"reduction": {"method": "tome", "target_rrt": 0.3, "prop_attn": False}},
    "random": {"reduction": {"method": "random", "keep_ratio": 0.6}},
    "adaptive": {"reduction": {"method": "adaptive"}},
    "adaptive, scoring depth": {"reduction": {"method": "adaptive", "scoring_depth": 1, "spread": 0.5}},
    "evit mean pool": {"reduction": {"method": "evit", "layers": [2, 6]}, "vision": {"pool_type": "avg"}},
    "tome mean pool": {"reduction": {"method": "tome", "r": 1}, "vision": {"pool_type": "avg"}},
    "custom blocks": {"reduction": None, "custom_text": True, "text": {"qk_norm": True, "scale_attn": True}},
}  # fmt: skip
CHANGES = {
    "": lambda model: None,
    "checkpointed": lambda model: model.set_grad_checkpointing(),
    "image locked": lock_image(0),
    "image partly locked": lock_image(4),
    "text locked": lock_text(0),
    "text partly locked": lock_text(2),
}


@pytest.mark.parametrize("name", MODELS)
def test_operations_equal_torch_count(name):
    model = build(**MODELS[name])
    found = step_cost(model)
    assert (found.total, found.scoring) == measured(model)


@pytest.mark.parametrize("change", list(CHANGES)[1:])
@pytest.mark.parametrize(
    "name",
    ["plain", "text first", "text first custom text", "layer scale", "evit", "evit without fusing", "tome", "adaptive"],
)
def test_operations_of_locked_and_checkpointed_models_equal_torch_count(name, change):
    model = build(**MODELS[name])
    CHANGES[change](model)
    found = step_cost(model)
    assert (found.total, found.scoring) == measured(model)


def test_operations_checkpointed_behind_a_locked_part_equal_torch_count():
    model = build()
    model.lock_image_tower(unlocked_groups=4)
    model.lock_text_tower()
    model.set_grad_checkpointing()
    found = step_cost(model)
    assert found.recompute > 0
    assert (found.total, found.scoring) == measured(model)


@pytest.mark.parametrize("name", ["ViT-S-16", "ViT-S-16-ELIP"])
def test_operations_of_a_real_shape_equal_torch_count(name):
    config = open_clip.get_model_config("ViT-S-16-ELIP")
    config["text_cfg"]["vocab_size"] = 100  # an embedding costs nothing
    reduction = config.pop("token_reduction")
    model = build(reduction if "ELIP" in name else None, vision=config["vision_cfg"], text=config["text_cfg"])
    found = step_cost(model)
    assert (found.total, found.scoring) == measured(model)
    assert (found.image_tokens, found.text_tokens) == (196, 77)


def test_recompute_of_accumulation_is_a_pass_without_gradient():
    model = build()
    image, text = batch(model)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image, text)
    assert step_cost(model, accumulate=True).recompute == counter.get_total_flops() // BATCH
    assert step_cost(model, accumulate=True).model == step_cost(model).total


def test_shorter_texts_cost_less():
    model = build(reduction=None, custom_text=True)
    length = 5
    found = step_cost(model, text_length=length)
    model.text.attn_mask = model.text.attn_mask[:length, :length]
    image, text = batch(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(image, text[:, :length])
        (out["image_features"].sum() + out["text_features"].sum()).backward()
    assert found.total == counter.get_total_flops() // BATCH
    assert found.text_tokens == length


@pytest.mark.parametrize("name", ["text first", "text first custom text"])
def test_a_batch_of_cut_texts_costs_what_its_parts_cost(name):
    model = build(**MODELS[name])
    pairs, end = 20, model.vocab_size - 1
    text = torch.zeros(pairs, model.context_length, dtype=torch.long)
    for row in text:
        row[torch.randint(1, model.context_length, ())] = end
    text = cut_text(text, model)
    assert len({part.shape[1] for part in text.parts}) > 1
    columns = [part.shape[1] for part in text.parts for _ in part]
    found = cost.batch_cost(model, columns)
    total, scoring = measured(model, torch.randn(pairs, 3, *model.visual.image_size), text)
    assert (found.total // pairs, found.scoring // pairs) == (total, scoring)
    assert (found.text_tokens, found.image_tokens) == (sum(columns), 16 * pairs)


def test_a_plain_backward_is_twice_the_forward_less_the_gradient_of_the_pixels():
    found = step_cost(build(reduction=None))
    assert found.scoring == found.recompute == 0
    assert found.backward == 2 * found.forward - 2 * 16 * (3 * 4 * 4) * 32
    assert found.tokens == 16 + 8


def test_other_towers_are_not_counted():
    resnet = open_clip.CLIP(24, {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}, TEXT)
    assert step_cost(resnet) is None
    assert memory_estimate(resnet, run_args()) is None
    assert step_cost(build(reduction=None, vision={"attentional_pool": True})) is None


# ---------------------------------------------------------------------- memory


def kept_bytes(model, dtype=torch.float32) -> int:
    """Bytes of all storages but the parameters' that the graph keeps for the backward pass of one pair."""
    image, text = batch(model, dtype)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(image, text)
    assert out["image_features"].requires_grad or out["text_features"].requires_grad
    return sum(storage.nbytes() for storage in kept.values()) // BATCH


@pytest.mark.parametrize("change", [c for c in CHANGES if c != "checkpointed"])
@pytest.mark.parametrize(
    "name",
    [
        "plain", "text first", "text first custom text", "pruning only", "layer scale", "patch dropout", "wide mlp",
        "evit", "tome", "random", "adaptive",
    ],
)
def test_activations_are_estimated(name, change):
    model = build(**MODELS[name])
    CHANGES[change](model)
    assert activation_bytes(model, "fp32") == pytest.approx(kept_bytes(model), rel=0.1)


def test_activations_with_quick_gelu_are_estimated():
    model = build(quick_gelu=True)
    assert activation_bytes(model, "fp32") == pytest.approx(kept_bytes(model), rel=0.1)


@pytest.mark.parametrize("name", ["plain", "text first"])
def test_activations_in_half_precision_are_estimated(name):
    pure = build(**MODELS[name]).bfloat16()
    assert activation_bytes(pure, "pure_bf16") == pytest.approx(kept_bytes(pure, torch.bfloat16), rel=0.1)

    mixed = build(**MODELS[name], cast_dtype=torch.bfloat16)
    open_clip.convert_weights_to_lp(mixed, torch.bfloat16)
    assert activation_bytes(mixed, "bf16") == pytest.approx(kept_bytes(mixed, torch.bfloat16), rel=0.1)


@pytest.mark.parametrize("name", ["plain", "text first"])
def test_activations_with_checkpointing_are_inputs_and_one_block(name):
    model = build(**MODELS[name])
    model.set_grad_checkpointing()
    image_block, text_block = model.visual.transformer.resblocks[0], model.transformer.resblocks[0]
    image, text = cost._block_bytes(image_block, LayerWork(17, 17), 4, 4), cost._block_bytes(
        text_block, LayerWork(8, 8), 4, 4
    )
    insides = image + text
    assert activation_bytes(model, "fp32") - insides == pytest.approx(kept_bytes(model), rel=0.1)


def run_args(**changes) -> argparse.Namespace:
    values = {"batch_size": 10, "accum_freq": 1, "precision": "fp32", "local_loss": True}
    return argparse.Namespace(**(values | changes))


def test_memory_adds_up():
    model = build()
    size = 4 * sum(p.numel() for p in model.parameters())
    found = memory_estimate(model, run_args(), world_size=3)
    assert (found.weights, found.gradients, found.optimizer) == (size, size, 2 * size)
    assert found.activations == 10 * activation_bytes(model, "fp32")
    assert found.loss == 4 * 4 * 10 * 30
    assert found.total == 4 * size + found.activations + found.loss
    assert "GB (weights 0.00, gradients" in str(found)

    assert memory_estimate(model, run_args(), ema=True).weights == 2 * size
    assert memory_estimate(model, run_args(), world_size=2, sharded=True).optimizer == size
    assert memory_estimate(model, run_args(accum_freq=2, local_loss=False), world_size=3).loss == 4 * 4 * 60 * 60


def test_memory_of_what_is_locked():
    model = build()
    model.lock_image_tower()
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = memory_estimate(model, run_args())
    assert (found.gradients, found.optimizer) == (trained, 2 * trained)


def test_mixed_precision_keeps_half_copies_of_weights_and_halves_most_activations():
    model = build(reduction=None)
    full, mixed = memory_estimate(model, run_args()), memory_estimate(model, run_args(precision="amp_bf16"))
    products = 32 * 3 * 4 * 4 + 6 * 12 * 32 * 32 + 32 * 24 + 3 * 12 * 48 * 48 + 48 * 24
    assert mixed.weights - full.weights == 2 * products
    assert 0.5 < mixed.activations / full.activations < 0.65


# ---------------------------------------------------------------------- peak


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "amp", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "amp", None),
        ("NVIDIA H100 80GB HBM3", "amp_bf16", 989e12),
        ("NVIDIA H100 PCIe", "pure_bf16", 756e12),
        ("NVIDIA H200", "fp16", 989e12),
        ("NVIDIA RTX A6000", "amp", 154.8e12),
        ("NVIDIA RTX A5000", "amp_bfloat16", 111.2e12),
        ("NVIDIA GeForce RTX 3090", "bf16", 71.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA L4", "amp", 121e12),
        ("NVIDIA L40S", "amp", 362e12),
        ("NVIDIA L40", "amp", None),
        ("Tesla V100-SXM2-32GB", "amp", 125e12),
        ("Tesla V100-SXM2-32GB", "amp_bf16", None),
        ("Tesla T4", "fp32", 8.1e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("Some other device", "bf16", None),
    ],
)
def test_peak_by_name(name, precision, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision) == peak


@pytest.mark.parametrize(("setting", "peak"), [("highest", 19.5e12), ("high", 156e12)])
def test_peak_of_float32_depends_on_tf32(setting, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert peak_flops(torch.device("cuda"), "fp32") == peak
    finally:
        torch.set_float32_matmul_precision(before)


def test_peak_of_the_cpu_is_not_known():
    assert peak_flops(torch.device("cpu"), "fp32") is None


# ---------------------------------------------------------------------- summary


def test_summary_tells_the_run(tmp_path):
    text = summary(
        seconds=3725.0,
        samples=37250,
        waited=372.5,
        losses=[6.5, 5.0, 2.25],
        evaluations=[
            {"epoch": 1, "step": 10, "image_to_text_R@1": 0.25, "clip_val_loss": 3.0, "num_samples": 64},
            {"epoch": 2, "step": 20, "image_to_text_R@1": 0.5, "clip_val_loss": 2.0, "num_samples": 64},
            {"epoch": 3, "step": 30, "image_to_text_R@1": 0.375, "clip_val_loss": 2.5, "num_samples": 64},
        ],
        cost=StepCost(10**10, 2 * 10**10, 10**10, 0, 196, 77),
        peak=4e12,
        rrt=0.288,
        peak_memory_gb=12.345,
        folder=tmp_path,
    )
    assert text.splitlines() == [
        "trained    37,250 samples in 1:02:05, 10 samples/s, data wait 10.0%",
        "compute    0.4 TFLOP/s, 10.0% of the peak, 2730 tokens/s, 40 GFLOP a pair (25.0% scoring)",
        "memory     12.35 GB at the peak; RRT 28.8%",
        "loss       6.5000 at first, 2.2500 at last",
        "image_to_text_R@1: best 0.5000 (epoch 2), last 0.3750",
        "clip_val_loss: best 2.0000 (epoch 2), last 2.5000",
        f"run        {tmp_path}",
    ]


def test_summary_of_a_run_that_did_nothing():
    nothing = {"losses": [], "evaluations": [], "cost": None, "peak": None, "folder": None}
    text = summary(seconds=0.0, samples=0, waited=0.0, rrt=0.0, peak_memory_gb=0.5, **nothing)
    assert text == "trained    0 samples in 0:00:00, 0 samples/s\nmemory     0.50 GB at the peak; RRT 0.0%"
