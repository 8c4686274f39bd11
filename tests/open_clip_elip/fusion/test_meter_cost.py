"""What a step of METER's pre-training costs, counted on shapes; and profiled, on a tiny one."""
from __future__ import annotations

import json

import pytest
import torch

from open_clip_elip.identity import create, describe
from open_clip_elip.profile import command
from open_clip_elip.profile.fusion import count_fusion, words
from open_clip_elip.profile.models import caption_lengths

from ...training.fusion_runs import METER, write_fusion


@pytest.mark.parametrize(
    "name, size, shortcuts, giga",
    [
        ("METER-B-32", 224, False, 87.4),
        ("METER-B-32-ELIP", 224, True, 40.5),  # 0.46
    ],
)
def test_operations(name, size, shortcuts, giga):
    model = create(describe(name), device="meta").train()
    model.tower.shortcuts = shortcuts
    found = count_fusion(model, torch.empty(2, 3, size, size, device="meta"), words([15, 15], model))
    assert found.total / 2 / 2 / 1e9 == pytest.approx(giga, rel=0.005)


def test_profile_takes_a_real_step_of_which_the_count_on_shapes_is_the_same(tmp_path):
    name, out = write_fusion(tmp_path / "model", METER), tmp_path / "cost.json"
    argv = [f"{name}:method=none", f"{name}:shortcuts=true", name, "--rounds", "1", "--caption-lengths", "9"]
    assert command.main([*argv, "--device", "cpu", "--batch-size", "4", "--json", str(out)]) == 0
    released, saved, elip = json.loads(out.read_text())["models"]
    assert released["text_tokens"] == 12 > saved["text_tokens"] == elip["text_tokens"]
    assert released["flops"]["scoring"] == 0 < elip["flops"]["scoring"] and elip["flops"]["teacher"] == 0
    assert elip["saved"] < released["saved"] and elip["seconds"]["count"] == 1
    model = create(describe(name)).train()
    found = count_fusion(model, torch.randn(4, 3, 32, 32), words(caption_lengths("9", 4, 12), model))
    assert found.total == sum(elip["flops"][part] for part in ("forward", "backward", "scoring"))
