"""The classifier and its task, on a model small enough for exact arithmetic."""
import math

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor

from open_clip_elip.clip import with_shortcuts
from training.data.sets.labelled import ArrayImages, LabelledImages
from training.distributed import Ranks
from training.evaluation.scores import score
from training.optim import create_optimizer, distances_from_head
from training.options.finetune import AugmentationOptions, FinetuningOptions
from training.tasks.augment import Mix
from training.tasks.classification import ClassificationTask, Classifier, add_drop_path
from training.trainer import Trainer

from ..tiny import MemoryData, gradients, run_options, tiny_clip

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


# ---------------------------------------------------------------------- the model


def test_a_random_head_is_on_the_features_before_the_projection():
    clip = tiny_clip()
    tower_keys = [k for k in clip.state_dict() if k.startswith("visual.") and k != "visual.proj"]
    x = images()
    clip.eval()
    with torch.no_grad():
        visual = clip.visual
        pooled, _ = visual._pool(visual.transformer(visual._embeds(x)))
    model = Classifier(clip, CLASSES).eval()
    assert list(model.state_dict()) == [*tower_keys, "head.weight", "head.bias"]
    assert model.head.weight.shape == (CLASSES, 32) and 0 < model.head.weight.abs().max() < 1e-4
    assert task().losses(model, labelled(), None)["loss"].item() == pytest.approx(math.log(CLASSES), abs=1e-3)
    model.head.weight.data.normal_()
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)


def test_a_zero_shot_head_begins_as_the_zero_shot_classifier():
    clip = tiny_clip().eval()
    x, weights = images(), F.normalize(torch.randn(16, CLASSES, dtype=torch.float64), dim=0)
    with torch.no_grad():
        expected = clip.logit_scale.exp() * clip.encode_image(x, normalize=True) @ weights
    model = Classifier(clip, CLASSES, "zero-shot", weights).eval()
    assert "visual.proj" in model.state_dict()
    torch.testing.assert_close(model(x), expected)
    assert Classifier(clip, CLASSES, "zero-shot").head.weight.abs().max() == 0


def test_the_head_is_not_computed_in_half_precision():
    clip = tiny_clip(dtype=torch.float32).eval()
    model = Classifier(clip, CLASSES, "zero-shot", F.normalize(torch.randn(16, CLASSES), dim=0)).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.visual(images().float())
        logits = model(images().float())
    assert features.dtype == torch.bfloat16 and logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.head(F.normalize(features.float(), dim=-1)))
    open_clip.model.convert_weights_to_lp(clip, dtype=torch.bfloat16)  # --precision bf16: norms stay as they are
    for half in (clip, tiny_clip(dtype=torch.bfloat16)):
        assert Classifier(half, CLASSES).head.weight.dtype == torch.float32


SMALL_TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}  # whose attention pool stays


@pytest.mark.parametrize("tower", ["linear", "mlp", "", "resnet"])
def test_other_towers_lose_the_projection_that_is_their_own(tower):
    if tower == "resnet":
        clip, shape, width = open_clip.CLIP(16, RESNET, SMALL_TEXT), (2, 3, 32, 32), 16
    else:
        vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": tower, "timm_pool": "token"}
        clip = open_clip.CustomTextCLIP(16, vision | {"image_size": 224}, SMALL_TEXT)
        shape, width = (1, 3, 224, 224), 192
        assert clip.visual(torch.zeros(shape)).shape == (1, 16)
    model = Classifier(with_shortcuts(clip), CLASSES)
    assert model.head.weight.shape == (CLASSES, width)
    assert all(p.grad is not None for p in _backward(model, torch.randn(shape)).parameters())


def _backward(model, x):
    model.train()(x).square().sum().backward()
    return model


@pytest.mark.parametrize("drop_path", [0, 0.5])
def test_gradient_checkpointing_with_reduction_and_drop_path_gives_the_same_gradients(drop_path):
    found = []
    for checkpointing in (False, True):
        clip = tiny_clip()
        clip.set_grad_checkpointing(checkpointing)
        model = Classifier(clip, CLASSES, reduce=not drop_path)
        add_drop_path(model.visual, drop_path)
        model.head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        found.append(gradients(_backward(model, images())))
    torch.testing.assert_close(*found)


def test_vision_guided_reduction_is_elip_without_a_caption():
    clip = tiny_clip().eval()
    x = images()
    with torch.no_grad():
        y = clip.reduction(clip.visual.transformer.resblocks, clip.visual._embeds(x))
        features = clip.visual._pool(y)[0] @ clip.visual.proj
        everything = clip.visual(x)
    whole = Classifier(clip, CLASSES, "zero-shot").train()
    assert whole.tower.rrt() == 0
    torch.testing.assert_close(whole.tower.features(x), everything)
    model = Classifier(clip, CLASSES, "zero-shot", torch.randn(16, CLASSES, dtype=torch.float64), reduce=True)
    assert model.tower.rrt() == pytest.approx(clip.tower.rrt()) and model.tower.rrt() > 0.1
    for mode in (True, False):  # in evaluation too
        model.train(mode)
        torch.testing.assert_close(model.tower.features(x), features)
        assert not torch.allclose(model.tower.features(x), everything)
        torch.testing.assert_close(model(x), model.head(F.normalize(features, dim=-1)))


def test_drop_path_drops_whole_branches_of_samples_at_a_rate_that_grows():
    clip = tiny_clip().eval()
    keys, expected = list(clip.visual.state_dict()), clip.visual(images())
    add_drop_path(clip.visual, 0.5)
    assert list(clip.visual.state_dict()) == keys and torch.equal(clip.visual(images()), expected)
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


def test_accumulation_gives_both_passes_the_same_mix_and_the_same_dropped_branches():
    whole = labelled(8)
    parts = [{k: v[i : i + 4] for k, v in whole.items()} for i in (0, 4)]
    mix = Mix(AugmentationOptions(mixup=0.8, cutmix=1.0, label_smoothing=0.1), CLASSES)
    model = Classifier(tiny_clip(), CLASSES)
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
    options = run_options(FinetuningOptions, batch_size=4, accum_freq=2, lr=0.0)
    place, optimizer = Ranks(torch.device("cpu")), create_optimizer(model, options)
    Trainer(options, place, model, model, task(mix), MemoryData(parts), optimizer).step(parts)
    torch.testing.assert_close(gradients(model), expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_layer_decay_counts_from_the_head():
    model = Classifier(tiny_clip(), CLASSES)
    distances, blocks = distances_from_head(model), "visual.transformer.resblocks."
    expected = {"head.weight": 0, "visual.ln_post.weight": 0, f"{blocks}5.mlp.c_fc.weight": 1}
    expected |= {f"{blocks}0.ln_1.weight": 6, "visual.conv1.weight": 7}
    assert distances.keys() == dict(model.named_parameters()).keys() and distances.items() >= expected.items()


# ---------------------------------------------------------------------- evaluation


def test_evaluation_is_of_all_data_sets_in_eval_mode():
    pixels = np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), dtype=np.uint8)
    labels = torch.arange(9) % CLASSES
    first = LabelledImages(ArrayImages(pixels, "memory"), labels, list("abcde"), name="first")
    second = LabelledImages(ArrayImages(pixels[:4], "memory"), labels[:4], list("abcde"), name="second")
    model = Classifier(tiny_clip(dtype=torch.float32), CLASSES)
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
    for frequency, due in ((0, []), (2, [2, 4, 5])):
        run.options.val_frequency = frequency
        assert [epoch for epoch in range(1, 6) if run.evaluate(model, epoch, last=epoch == 5)] == due


