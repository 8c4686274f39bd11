"""METER's data against what the release makes of them, where `ELIP_ORACLE` names a folder that has that."""
from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from training.data.fusion_augment import METER_LEVEL, METER_OPERATIONS
from training.evaluation.vqa_accuracy import normalised, soft_scores

from .oracle import folder_of_tensors

FOLDER = folder_of_tensors("meter", "augment.pt")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="ELIP_ORACLE names no folder with the tensors")


def test_pictures():
    found = torch.load(FOLDER / "augment.pt", weights_only=True)
    picture = Image.fromarray(found["image"].numpy())
    operations = {one["name"].removesuffix("abs"): one for one in found["ops"]}
    assert operations.keys() == METER_OPERATIONS.keys() and found["m"] / 30 == METER_LEVEL
    for name, expected in operations.items():
        for level, result in ((METER_LEVEL, expected["plus"]), (-METER_LEVEL, expected.get("minus", expected["plus"]))):
            ours = np.array(METER_OPERATIONS[name](picture, level))
            assert torch.equal(torch.from_numpy(ours), result), (name, level)
    transform = open_clip.image_transform(32, is_train=False)
    torch.testing.assert_close(transform(picture), found["clip_opaque"], rtol=0, atol=1e-6)


def test_answers():
    found = torch.load(FOLDER / "vqa_answers.pt", weights_only=True)
    assert [normalised(answer) for answer in found["raw"]] == found["normalized"]
    assert [soft_scores(["yes"] * count).get("yes", 0.0) for count in range(11)] == found["score_of_count"]
