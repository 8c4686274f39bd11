"""Mixup, cutmix and the transforms: against timm's and known answers, repeatable from torch's random state."""
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.mixup import Mixup, mixup_target

from training.data.randomness import seed_globals
from training.errors import UserError
from training.options.finetune import AugmentationOptions
from training.tasks import augment
from training.tasks.augment import Mix, cutmix, train_transform


def mix_of(classes, **options):
    return Mix(AugmentationOptions(**options), classes)


def batch(size=6, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(size, 3, 8, 10, generator=g), torch.randint(classes, (size,), generator=g)


def test_mixup_and_smoothed_targets_are_timms_for_the_same_weight(monkeypatch):
    images, labels = batch()
    monkeypatch.setattr(augment, "_beta", lambda alpha: 0.3)
    ours = mix_of(5, mixup=0.8, label_smoothing=0.1)(images, labels)
    theirs = Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=5)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (0.3, False))
    expected = theirs(images.clone(), labels)
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1])
    torch.testing.assert_close(mix_of(5, label_smoothing=0.2).one_hot(labels), mixup_target(labels, 5, smoothing=0.2))


def test_cutmix_exchanges_a_rectangle_and_counts_it():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 10).clone()
    sizes = set()
    for _ in range(50):
        mixed, kept = cutmix(images, 0.6)
        other = mixed != images
        for row, partner in ((0, 3.0), (1, 2.0)):
            assert set(mixed[row].unique().tolist()) <= {float(row), partner}
        assert 1 - other[0, 0].float().mean().item() == pytest.approx(kept)
        where = other[0, 0].nonzero()
        if len(where):
            (top, left), (bottom, right) = where.amin(0).tolist(), where.amax(0).tolist()
            assert len(where) == (bottom - top + 1) * (right - left + 1)
            assert torch.equal(other[0], other[3]) and torch.equal(other[1], other[2])
        sizes.add(kept)
    assert torch.equal(images[1], torch.ones(3, 8, 10))  # as it was
    assert len(sizes) > 3 and min(sizes) >= 0.6 - 1e-9  # sides are rounded down, and cut off at the border


def test_cutmix_targets_have_the_share_of_the_area():
    images = torch.stack([torch.zeros(3, 8, 10), torch.ones(3, 8, 10)])
    labels = torch.tensor([0, 1])
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, target = mix_of(2, cutmix=1.0)(images, labels)
        assert target[0, 1].item() == pytest.approx(mixed[0].mean().item(), abs=1e-6)
        assert target[1, 1].item() == pytest.approx(mixed[1].mean().item(), abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_same_random_state_gives_the_same_mix_for_any_length_of_batch(size):
    images, labels = batch(size)
    before, state = images.clone(), torch.get_rng_state()
    mix = mix_of(5, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    first = [mix(images, labels) for _ in range(10)]
    random.random(), np.random.rand()
    torch.set_rng_state(state)
    for mixed, target in first:
        again = mix(images, labels)
        assert torch.equal(again[0], mixed) and torch.equal(again[1], target)
        assert mixed.shape == images.shape and torch.equal(images, before)
        torch.testing.assert_close(target.sum(1), torch.ones(size))
    assert size == 1 or not torch.equal(first[0][0], first[1][0])


def test_how_often_what_is_done():
    images, labels = batch(2)
    images[0], images[1], labels = 0, 1, torch.tensor([0, 1])

    def kinds(mix, count=300):
        found = {"none": 0, "mixup": 0, "cutmix": 0}
        for _ in range(count):
            mixed, _ = mix(images, labels)
            whole = set(mixed.unique().tolist()) <= {0.0, 1.0}
            found["none" if torch.equal(mixed, images) else "cutmix" if whole else "mixup"] += 1
        return {kind: number / count for kind, number in found.items()}

    assert kinds(mix_of(5)) == {"none": 1, "mixup": 0, "cutmix": 0}
    assert kinds(mix_of(5, mixup=1, mixup_prob=0))["none"] == 1
    assert kinds(mix_of(5, mixup=1))["mixup"] > 0.97
    assert kinds(mix_of(5, cutmix=1))["mixup"] == 0
    share = kinds(mix_of(5, mixup=1, cutmix=1, mixup_prob=0.5, mixup_switch_prob=0.25))
    assert share["none"] == pytest.approx(0.5, abs=0.1) and share["mixup"] == pytest.approx(0.375, abs=0.1)


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
PLAIN = AugmentationOptions(crop_scale=(1, 1), crop_ratio=(1, 1), hflip=0)


def transformed(augmentation, seed=0, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), picture=PICTURE):
    seed_globals(seed)
    return train_transform(augmentation, {"size": (16, 24), "mean": mean, "std": std})(picture)


def test_a_plain_transform_resizes_and_normalises():
    gray = Image.new("RGB", (40, 60), (51, 102, 204))
    out = transformed(PLAIN, picture=gray)
    expected = [(51 / 255 - 0.5) / 0.2, (102 / 255 - 0.4) / 0.25, (204 / 255 - 0.3) / 0.3]
    assert out.shape == (3, 16, 24)
    torch.testing.assert_close(out, torch.tensor(expected)[:, None, None].expand(3, 16, 24))


@pytest.mark.parametrize(
    "augmentation",
    [
        AugmentationOptions(),
        AugmentationOptions(auto_augment="rand-m9-mstd0.5-inc1", train_interpolation="random"),
        AugmentationOptions(color_jitter=0.4, random_erasing=0.5),
        AugmentationOptions(auto_augment="augmix-m3-w2"),
    ],
    ids=["crop", "rand", "jitter", "augmix"],
)
def test_the_loaders_seeding_repeats_a_transform(augmentation):
    outputs = [transformed(augmentation, seed) for seed in (1, 1, 2)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_mirror_images_and_erasing():
    plain = transformed(PLAIN)
    assert torch.equal(transformed(AugmentationOptions([1, 1], [1, 1], hflip=1)), plain.flip(2))
    erased = transformed(AugmentationOptions([1, 1], [1, 1], hflip=0, random_erasing=1, erasing_mode="const"))
    share = (erased != plain).any(0).float().mean().item()
    assert 0.01 < share < 0.45 and (erased[:, (erased != plain).any(0)] == 0).all()


def test_an_unknown_policy_is_refused():
    for policy in ("nonsense", "rand-x9", "rand-m9-msdt0.5"):
        with pytest.raises(UserError, match=f"timm knows no augmentation policy '{policy}'"):
            transformed(AugmentationOptions(auto_augment=policy))


def test_posterizing_to_no_bits_is_black_on_any_pillow():
    """`rand-m9-mstd0.5-inc1` asks for it now and then."""
    transform = train_transform(
        AugmentationOptions(auto_augment="rand-m10-inc1"), {"size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    )
    policy = next(step for step in transform.transforms if hasattr(step, "ops"))
    op = next(op for op in policy.ops if "Posterize" in op.name)
    for op.prob, op.magnitude, brightest in ((1.0, 10, 0), (1.0, 5, 192)):  # no bits, two bits
        assert op(PICTURE).getextrema() == ((0, brightest),) * 3
    for seed in range(60):
        transformed(AugmentationOptions(auto_augment="v0"), seed)
