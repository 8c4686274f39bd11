"""Every resolution, patch size and tower of open_clip's registry: reduced rightly, or refused in one sentence."""

import functools

import open_clip
import pytest
import torch

from open_clip_elip import with_token_reduction
from open_clip_elip.reduction import METHODS

from . import reference
from .tiny import TEXT, VISION, contrastive_loss, pairs, plain_model, seen_lengths

RATIOS = (1.0, 0.9, 0.65, 0.4)


def expected_lengths(patches, layers_of_stages):
    """Sequence lengths with merging, straight from the method's table: a stage with N <= K does nothing."""
    lengths, tokens = [], patches
    for layers, ratio in zip(layers_of_stages, RATIOS, strict=True):
        keep = max(1, int(ratio * patches))
        tokens = keep + 1 if tokens > keep else tokens
        lengths += [1 + tokens] * layers
    return lengths


def in_mlps(model, batch):
    """Sequence lengths that the layers' second halves see, and the output."""
    lengths, output = seen_lengths(model, batch)
    return [mlp for _, mlp in lengths], output


@pytest.mark.parametrize(
    ("size", "patch"),
    [
        (112, 16),  # 49 patches: fewer than the 176 that the paper's stage II keeps at 224 px
        (224, 16),
        (384, 16),
        ((160, 224), 16),
        ((48, 16), 16),
        (224, 14),
        (336, 14),
        (224, 32),
        (64, 8),
        (32, 16),
        (32, 32),  # one patch
    ],
)
def test_resolutions_and_patch_sizes(size, patch):
    plain = plain_model(vision={"image_size": size, "patch_size": patch, "layers": 6, "width": 16, "head_width": 8})
    model = with_token_reduction(plain)
    rows, columns = model.visual.grid_size
    expected = expected_lengths(rows * columns, (1, 1, 3, 1))
    assert model.tower.token_counts() == expected
    image, text = pairs(2, size)
    lengths, output = in_mlps(model, (image, text))
    assert lengths == expected
    loss = contrastive_loss(output)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    if rows * columns <= 70:
        run = functools.partial(reference.run, depths=(1, 1, 3, 1), keep_ratio=RATIOS)
        by_reference = reference.output(plain, image, text, lambda *given: run(*given)[0])
        torch.testing.assert_close(output, by_reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [112, 224, (160, 224), 288])
def test_force_image_size_of_a_registered_model(size):
    with torch.device("meta"):
        model = open_clip.create_model("ViT-S-16-ELIP", device="meta", force_image_size=size)
    rows, columns = model.visual.grid_size
    assert rows * columns == (size // 16) ** 2 if isinstance(size, int) else size[0] // 16 * (size[1] // 16)
    assert model.tower.token_counts() == expected_lengths(rows * columns, (2, 2, 6, 2))


def vision_configs():
    """The own ViTs of all registered models, with few and narrow layers, equal ones once: (model name, vision_cfg)."""
    seen = {}
    for name in open_clip.list_models():
        model_cfg = open_clip.get_model_config(name)
        vision = model_cfg["vision_cfg"]
        if "multimodal_cfg" in model_cfg or "timm_model_name" in vision or not isinstance(vision["layers"], int):
            continue
        vision = {**vision, "layers": 4, "width": vision.get("head_width", 64)}
        seen.setdefault(str(sorted(vision.items())), (name, vision))
    return list(seen.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("vision", [pytest.param(vision, id=name) for name, vision in vision_configs()])
def test_every_registered_vit_by_every_method(vision, method):
    options = {"depths": (1, 1, 1, 1)} if method == "elip" else {}
    model = with_token_reduction(open_clip.CLIP(16, vision, TEXT, output_dict=True).train(), method, **options)
    lengths, output = in_mlps(model, pairs(1, model.visual.image_size, torch.float32))
    assert output["image_features"].isfinite().all()
    patches, (rows, columns) = model.tower.num_patches(), model.visual.grid_size
    assert patches == rows * columns or vision.get("patch_dropout")
    assert lengths == [layer.mlp for layer in model.reduction.layers(patches)]
    assert method != "elip" or lengths == expected_lengths(patches, (1, 1, 1, 1))
    assert 0 < model.tower.rrt() < 1 and len(vision_configs()) > 15


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", [1, 2, 3, 5, 7])
def test_few_layers(layers, method):
    model = with_token_reduction(plain_model(vision={**VISION, "layers": layers}), method=method)
    lengths, output = in_mlps(model, pairs())
    contrastive_loss(output).backward()
    assert lengths == [layer.mlp for layer in model.reduction.layers(16)]
    assert 0 < model.tower.rrt() < 1
