"""The same numbers compiled, and sensible ones in low precision."""

import open_clip
import pytest
import torch
import torch.nn.functional as F

from open_clip_elip import with_token_reduction
from open_clip_elip.reduction import Elip, ElipConfig

from .tiny import REDUCTION, TEXT, VISION, contrastive_loss, gradients, pairs, plain_model, random_blocks

# Tracing takes its time for every layer, so: two of them.
TWO_LAYERS = {"vision": {"layers": 2}, "text": {"layers": 1}}
OPTIONS = {"depths": (1, 1), "keep_ratio": (0.6, 0.3)}
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model, image, text):
    """Output and gradients of one training step, from a clean slate."""
    model.zero_grad()
    output = model(image, text)
    contrastive_loss(output).backward()
    return {key: value.detach() for key, value in output.items()}, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("custom_text", "checkpointing", "backend"), [(False, False, "aot_eager"), (True, True, "eager")]
)
def test_compiled_training_and_evaluation_are_the_eager_ones(custom_text, checkpointing, backend):
    model = with_token_reduction(plain_model(custom_text, **TWO_LAYERS), **OPTIONS)
    model.set_grad_checkpointing(checkpointing)
    batch = pairs()
    expected = step(model, *batch)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(step(compiled, *batch), expected, **CLOSE)
    with torch.no_grad():
        model.eval()
        compiled.eval()
        torch.testing.assert_close(compiled(*batch), model(*batch), **CLOSE)


@pytest.mark.parametrize(
    ("options", "guided"),
    [
        ({"merge": False}, True),
        ({"scoring_depth": 1, "depths": (2,), "keep_ratio": (0.5,)}, True),
        ({"text_scale": "none"}, True),
        ({}, False),
    ],
)
def test_the_compiled_reducer_with_its_options(options, guided):
    blocks = random_blocks(2, 8, 1)
    x = torch.randn(2, 1 + 9, 8, dtype=torch.float64, requires_grad=True)
    guidance = torch.randn(2, 8, dtype=torch.float64) if guided else None
    reducer = Elip(ElipConfig(**{**OPTIONS, **options}), 2)
    compiled = torch.compile(reducer, fullgraph=True, backend="eager")
    expected, ours = reducer(blocks, x, guidance), compiled(blocks, x, guidance)
    torch.testing.assert_close(ours, expected, **CLOSE)
    grads = [torch.autograd.grad(y.square().sum(), [x, *blocks.parameters()]) for y in (ours, expected)]
    torch.testing.assert_close(*grads, **CLOSE)


def tower(precision="fp32", **options):
    return open_clip.create_model(
        "ViT-S-16-ELIP",
        embed_dim=20,
        vision_cfg=VISION,
        text_cfg=TEXT,
        token_reduction={**REDUCTION, **options},
        precision=precision,
        output_dict=True,
    ).train()


def assert_close_to_full_precision(output, expected):
    for name in ("image_features", "text_features"):
        assert output[name].isfinite().all()
        similarity = F.cosine_similarity(output[name].float(), expected[name].float(), dim=-1)
        assert similarity.min() > 0.98, name


@pytest.mark.parametrize("options", [{}, {"text_scale": "none"}, {"merge": False}])
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16", torch.bfloat16), ("pure_bf16", torch.bfloat16), ("fp16", torch.float16), ("pure_fp16", torch.float16)],
)
def test_weights_in_low_precision(precision, dtype, options):
    full = tower(**options)
    low = tower(precision, **options)
    low.load_state_dict(full.state_dict())
    image, text = pairs(dtype=torch.float32)
    output = low(image.to(dtype), text)
    assert output["image_features"].dtype == dtype
    assert_close_to_full_precision(output, full(image, text))
    contrastive_loss({**output, "logit_scale": output["logit_scale"].float()}).backward()
    for name, grad in gradients(low).items():
        assert grad is not None and grad.isfinite().all(), name


def test_autocast_compiled():
    model = with_token_reduction(plain_model(**TWO_LAYERS).float(), **OPTIONS)
    image, text = pairs(dtype=torch.float32)
    expected = model(image, text)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        output = compiled(image, text)
    assert_close_to_full_precision(output, expected)
