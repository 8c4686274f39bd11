"""What a step of BLIP's pre-training costs, counted on shapes."""
from __future__ import annotations

import pytest
import torch

from open_clip_elip.identity import create, describe
from open_clip_elip.profile.fusion import count_fusion, words


@pytest.mark.parametrize(
    "name, shortcuts, tokens, giga",
    [
        ("BLIP-B-16", False, 30, 153.3),  # the paper's 11.03 T multiply-adds at batch 36 are 153.2 G
        ("BLIP-B-16-ELIP", True, 15, 89.2),  # 0.58
    ],
)
def test_operations(name, shortcuts, tokens, giga):
    model = create(describe(name), device="meta").train()
    model.tower.shortcuts = shortcuts
    found = count_fusion(model, torch.empty(2, 3, 224, 224, device="meta"), words([tokens, tokens]))
    assert found.total / 2 / 2 / 1e9 == pytest.approx(giga, rel=0.005)
