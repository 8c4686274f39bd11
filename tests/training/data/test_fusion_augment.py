"""METER's augmentation of pictures; its operations are held against the release in `test_meter_data_oracle.py`."""
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from training.data import fusion_augment
from training.data.fusion_augment import METER_LEVEL, METER_OPERATIONS, ClipRandAugment
from training.data.pixels import picture_to_tensor
from training.data.transforms import with_decoding

from .sets import layout_files

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
RESIZE = tv.Resize(8, tv.InterpolationMode.BICUBIC)
STEPS = [RESIZE, tv.CenterCrop(8), tv.ToTensor(), tv.Normalize([0.5] * 3, [0.5] * 3)]


@pytest.mark.parametrize("decoding", ["plain", "fast"])
def test_two_operations_on_the_whole_picture_then_the_evaluations_transform(decoding, monkeypatch):
    done = []
    for name, operation in METER_OPERATIONS.items():

        def noted(picture, level, name=name, operation=operation):
            done.append((name, level, picture.size))
            return operation(picture, level)

        monkeypatch.setitem(fusion_augment.METER_OPERATIONS, name, noted)
    plain = with_decoding(tv.Compose(STEPS), decoding)
    augmented, encoded = ClipRandAugment(plain), layout_files.encode(PICTURE, "png")
    for seed in range(80):
        random.seed(seed)
        found = picture_to_tensor(encoded, augmented)
        picture = PICTURE
        for name, level, _ in done[-2:]:
            picture = METER_OPERATIONS[name](picture, level)
        assert torch.equal(found, plain(picture))
        del done[-2:]
    names, levels, sizes = map(Counter, zip(*done, strict=True))
    assert len(done) == 160 and names.keys() == METER_OPERATIONS.keys() and sizes.keys() == {PICTURE.size}
    assert levels.keys() == {METER_LEVEL, -METER_LEVEL} and 50 < levels[METER_LEVEL] < 110


def test_one_bit_a_colour():
    assert set(np.asarray(METER_OPERATIONS["Posterize"](PICTURE, METER_LEVEL)).flatten()) == {0, 128}
