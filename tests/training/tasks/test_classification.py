"""The classifier and its task, on a model small enough for exact arithmetic."""
import math

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from open_clip_elip.clip import with_shortcuts
from training.data.sets.labelled import ArrayImages, LabelledImages
from training.distributed import Ranks
from training.errors import UserError
from training.evaluation.scores import score
from training.optim import create_optimizer, parameter_groups
from training.tasks.augment import AugmentationOptions, Mix
from training.tasks.classification import (
    ClassificationTask,
    FinetuningOptions,
    add_drop_path,
    random_classifier,
    zero_shot_head,
)
from training.trainer import Trainer

from ..tiny import MemoryData, run_options, tiny_clip

CLASSES = 5


def images(count=6, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled(count=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "image": images(count, seed),
        "label": torch.randint(CLASSES, (count,), generator=g),
        "key": [str(i) for i in range(count)],
    }


def task(mix=None, data=(), **changes):
    options = run_options(FinetuningOptions, workers=0, **changes)
    mix = mix or Mix(options, CLASSES)
    return ClassificationTask(options, Ranks(torch.device("cpu")), mix, dict(data), lambda image: image)


def trainer(model, batches, mix=None, **changes):
    options = run_options(FinetuningOptions, batch_size=len(batches[0]["label"]), **changes)
    optimizer = create_optimizer(model, options)
    return Trainer(options, Ranks(torch.device("cpu")), model, model, task(mix), MemoryData(batches), optimizer)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------- the model


def test_a_random_head_is_on_the_features_before_the_projection():
    clip = tiny_clip()
    tower_keys = [k for k in clip.state_dict() if k.startswith("visual.") and k != "visual.proj"]
    x = images()
    clip.eval()
    with torch.no_grad():
        visual = clip.visual
        pooled, _ = visual._pool(visual.transformer(visual._embeds(x)))
    model = random_classifier(clip, CLASSES).eval()
    assert list(model.state_dict()) == [*tower_keys, "head.weight", "head.bias"]
    assert model.head.weight.shape == (CLASSES, 32) and 0 < model.head.weight.abs().max() < 1e-4
    model.head.weight.data.normal_()
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)


def test_a_random_head_begins_at_chance():
    model = random_classifier(tiny_clip(), CLASSES).train()
    loss = task().losses(model, labelled(), None)["loss"]
    assert loss.item() == pytest.approx(math.log(CLASSES), abs=1e-3)


def test_a_zero_shot_head_begins_as_the_zero_shot_classifier():
    clip = tiny_clip().eval()
    x, weights = images(), F.normalize(torch.randn(16, CLASSES, dtype=torch.float64), dim=0)
    with torch.no_grad():
        expected = clip.logit_scale.exp() * clip.encode_image(x, normalize=True) @ weights
    model = zero_shot_head(clip, CLASSES, weights).eval()
    assert "visual.proj" in model.state_dict()
    torch.testing.assert_close(model(x), expected)
    assert zero_shot_head(clip, CLASSES).head.weight.abs().max() == 0


def test_the_head_is_not_computed_in_half_precision():
    clip = tiny_clip(dtype=torch.float32).eval()
    model = zero_shot_head(clip, CLASSES, F.normalize(torch.randn(16, CLASSES), dim=0)).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.visual(images().float())
        logits = model(images().float())
    assert features.dtype == torch.bfloat16 and logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.head(F.normalize(features.float(), dim=-1)))


def test_half_precision_towers_have_a_float32_head():
    clip = tiny_clip(dtype=torch.bfloat16)
    assert random_classifier(clip, CLASSES).head.weight.dtype == torch.float32


@pytest.mark.parametrize("proj", ["linear", "mlp", ""])
def test_timm_towers_lose_their_projection(proj):
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": proj, "timm_pool": "token", "image_size": 224}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1}
    clip = with_shortcuts(open_clip.CustomTextCLIP(16, vision, text))
    with torch.no_grad():
        assert clip.visual(torch.zeros(1, 3, 224, 224)).shape == (1, 16)
    model = random_classifier(clip, CLASSES)
    assert model.head.weight.shape == (CLASSES, 192)
    assert all(p.grad is not None for p in _backward(model, torch.randn(1, 3, 224, 224)).parameters())


def test_a_resnet_keeps_its_attention_pool():
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1}
    clip = with_shortcuts(open_clip.CLIP(16, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, text))
    model = random_classifier(clip, CLASSES)
    assert model.head.weight.shape == (CLASSES, 16)
    assert all(p.grad is not None for p in _backward(model, torch.randn(2, 3, 32, 32)).parameters())


def _backward(model, x):
    model.train()(x).square().sum().backward()
    return model


# ---------------------------------------------------------------------- token reduction


def test_without_the_flag_no_token_is_removed():
    clip = tiny_clip().eval()
    expected = clip.visual(images())
    model = zero_shot_head(clip, CLASSES).train()
    assert model.tower.rrt() == 0
    torch.testing.assert_close(model.visual(images()), expected)


def test_vision_guided_reduction_is_elip_without_a_caption():
    clip = tiny_clip().eval()
    x = images()
    with torch.no_grad():
        y, kept = clip.reduction(clip.visual.transformer.resblocks, clip.visual._embeds(x), return_kept=True)
        features = clip.visual._pool(y)[0] @ clip.visual.proj
        everything = clip.visual(x)
    assert any(k is not None for k in kept)
    model = zero_shot_head(clip, CLASSES, torch.randn(16, CLASSES, dtype=torch.float64), reduce=True)
    assert model.tower.rrt() == pytest.approx(clip.tower.rrt()) and model.tower.rrt() > 0.1
    for mode in (True, False):  # in evaluation too
        model.train(mode)
        torch.testing.assert_close(model.tower.features(x), features)
        assert not torch.allclose(model.tower.features(x), everything)
        torch.testing.assert_close(model(x), model.head(F.normalize(features, dim=-1)))


def test_reduction_with_gradient_checkpointing_has_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        clip = tiny_clip()
        clip.set_grad_checkpointing(checkpointing)
        model = random_classifier(clip, CLASSES, reduce=True)
        model.head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        found.append(gradients(_backward(model, images())))
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])


# ---------------------------------------------------------------------- drop path


def test_drop_path_is_off_in_evaluation_and_leaves_the_keys():
    clip = tiny_clip().eval()
    keys, expected = list(clip.visual.state_dict()), clip.visual(images())
    add_drop_path(clip.visual, 0.5)
    assert list(clip.visual.state_dict()) == keys
    assert torch.equal(clip.visual(images()), expected)
    assert not torch.equal(clip.visual.train()(images()), expected)


def test_drop_path_drops_whole_branches_of_samples_at_a_rate_that_grows():
    clip = tiny_clip()
    add_drop_path(clip.visual, 0.5)
    blocks = clip.visual.train().transformer.resblocks
    branch = torch.ones(4000, 3, 2, dtype=torch.float64)
    for i, block in enumerate(blocks):
        rate = 0.5 * i / (len(blocks) - 1)
        for end in (block.ls_1, block.ls_2):
            out = end(branch)
            assert (out == out[:, :1, :1]).all()  # whole branches
            dropped = (out[:, 0, 0] == 0).double().mean().item()
            assert dropped == pytest.approx(rate, abs=0.04)
            kept = out[out != 0]
            torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))


def test_drop_path_goes_with_gradient_checkpointing():
    found = []
    for checkpointing in (False, True):
        clip = tiny_clip()
        clip.set_grad_checkpointing(checkpointing)
        model = random_classifier(clip, CLASSES)
        add_drop_path(model.visual, 0.5)
        model.head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        found.append(gradients(_backward(model, images())))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])


def test_drop_path_needs_a_tower_that_it_knows():
    add_drop_path(nn.Linear(2, 2), 0.0)
    with pytest.raises(UserError, match="--drop-path needs OpenCLIP's own ViT, but this model has a Linear"):
        add_drop_path(nn.Linear(2, 2), 0.1)


# ---------------------------------------------------------------------- the task


def test_losses_known_by_hand():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    target = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0]])
    run = task()
    run.mix = lambda images, labels: (images, labels)
    got = run.losses(lambda images: images, {"image": logits, "label": target}, None)
    first = -(0.7 * (2 - math.log(math.e**2 + 2)) + 0.3 * -math.log(math.e**2 + 2))
    second = math.log(math.e + 2)
    assert got["loss"].item() == pytest.approx((first + second) / 2, rel=1e-6)
    assert got["accuracy"].item() == 0.5


def test_accumulation_is_one_large_batch():
    whole, found = labelled(8), []
    parts = [{k: v[i : i + 4] for k, v in whole.items()} for i in (0, 4)]
    for window in ([whole], parts):
        model = random_classifier(tiny_clip(), CLASSES)
        model.head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        run = trainer(model.train(), window, accum_freq=len(window), lr=0.0)
        losses, _ = run.step(window)
        found.append((losses["loss"], losses["accuracy"], gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    assert found[0][2].keys() == found[1][2].keys()
    for name in found[0][2]:
        torch.testing.assert_close(found[0][2][name], found[1][2][name])


def test_accumulation_gives_both_passes_the_same_mix_and_the_same_dropped_branches():
    whole = labelled(8)
    parts = [{k: v[i : i + 4] for k, v in whole.items()} for i in (0, 4)]
    mix = Mix(AugmentationOptions(mixup=0.8, cutmix=1.0, label_smoothing=0.1), CLASSES)
    model = random_classifier(tiny_clip(), CLASSES)
    add_drop_path(model.visual, 0.3)
    model.head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    model.train()

    torch.manual_seed(5)
    both = []
    for part in parts:  # what a plain pass over the window gives
        mixed, target = mix(part["image"], part["label"])
        both.append((model(mixed), target))
    logits, targets = (torch.cat(values) for values in zip(*both, strict=True))
    F.cross_entropy(logits, targets.double()).backward()
    expected = gradients(model)
    after = torch.get_rng_state()
    model.zero_grad()

    torch.manual_seed(5)
    trainer(model, parts, mix, accum_freq=2, lr=0.0).step(parts)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])
    assert torch.equal(torch.get_rng_state(), after)


def test_layer_decay_counts_from_the_head():
    model = random_classifier(tiny_clip(), CLASSES)
    groups = parameter_groups(model, 0.1, layer_decay=0.5)
    scale = {p: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    assert scale[model.head.weight] == (1, 0.1) and scale[model.head.bias] == (1, 0.0)
    blocks = model.visual.transformer.resblocks
    assert scale[blocks[-1].mlp.c_fc.weight] == (0.5, 0.1) and scale[blocks[0].ln_1.weight] == (0.5**6, 0.0)
    assert scale[model.visual.conv1.weight] == (0.5**7, 0.1) and scale[model.visual.ln_post.weight] == (1, 0.0)


def test_layer_decay_of_an_unknown_tower_is_refused():
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1}
    clip = with_shortcuts(open_clip.CLIP(16, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, text))
    with pytest.raises(UserError, match="--layer-decay needs OpenCLIP's own transformers, but .* ModifiedResNet"):
        parameter_groups(random_classifier(clip, CLASSES), 0.1, layer_decay=0.5)


# ---------------------------------------------------------------------- evaluation


def to_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def test_evaluation_is_of_all_data_sets_in_eval_mode():
    pixels = np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), dtype=np.uint8)
    labels = torch.arange(9) % CLASSES
    first = LabelledImages(ArrayImages(pixels, "memory"), labels, list("abcde"), name="first")
    second = LabelledImages(ArrayImages(pixels[:4], "memory"), labels[:4], list("abcde"), name="second")
    model = random_classifier(tiny_clip(dtype=torch.float32), CLASSES)
    add_drop_path(model.visual, 0.9)
    model.head.weight.data.normal_()
    run = task(data={"first": first, "second": second}, batch_size=4)
    run.transform = to_tensor
    model.train()
    got = run.evaluate(model, epoch=1, last=False)
    assert model.training and model.visual.training
    with torch.no_grad():
        logits = model.eval()(torch.stack([to_tensor(p) for p in pixels]))
    for name, data, rows in (("first", first, logits), ("second", second, logits[:4])):
        expected = score(rows, data, torch.arange(len(rows)))
        assert {k: got[f"{name}-{k}"] for k in expected} == expected
    assert len(got) == 8 and 0 < got["first-top1"] < 1
    assert run.score(got) == got["first-top1"]
    assert run.score(got | {"ema/first-top1": 1.0}) == 1 and run.score({}) is None


def test_evaluation_comes_when_it_is_due():
    run = task(val_frequency=2)
    assert run.evaluate(None, 1, False) == {} and task(val_frequency=0).evaluate(None, 2, True) == {}
    assert run.evaluate(None, 2, False) == {} and run.evaluate(None, 3, True) == {}  # no data set to evaluate on
