"""What a step keeps for its backward pass, counted on shapes: to the byte what a real step on a CPU keeps."""
from __future__ import annotations

import argparse
import json
from itertools import product

import pytest
import torch

from open_clip_elip.profile import compare
from open_clip_elip.profile.command import main
from open_clip_elip.profile.measure import SavedBytes, TrainStep, saved_bytes
from open_clip_elip.profile.models import Candidate

from ..training.fusion_runs import ALBEF, BLIP, METER, write_fusion

TINY = "ViT-Ti-8-64-ELIP"
WAYS = ["method=none", "method=none,shortcuts=true", "shortcuts=true", "shortcuts=false"]
RIVALS = ["method=tome", "method=evit", "method=random", "scoring_depth=1"]
FUSION = {"albef": ALBEF, "blip": BLIP, "meter": METER}
ARGS = argparse.Namespace(batch_size=4, caption_lengths="9", compile=False)


def steps(name: str) -> tuple[TrainStep, TrainStep]:
    """On shapes, and a real one of the same negatives."""
    one, found = Candidate.parse(name), []
    for device in ("meta", "cpu"):
        model = one.build(device)
        found.append(compare._step(model, compare._batch(model, one, ARGS, 4, device), one))
    shapes, real = found
    if hasattr(real, "targets"):
        real.targets["negatives"] = shapes.targets["negatives"]
    return shapes, real


def kept(step: TrainStep) -> int:
    saved = SavedBytes(getattr(step, "resident", step.model))
    with saved:
        step()
    return saved.bytes


@pytest.mark.parametrize(("family", "way"), [*product(["clip"], WAYS + RIVALS), *product(FUSION, WAYS)])
def test_the_count_on_shapes_is_that_of_a_real_step(family, way, tmp_path):
    shapes, real = steps(f"{write_fusion(tmp_path / 'model', FUSION[family]) if family in FUSION else TINY}:{way}")
    before = torch.get_rng_state()
    assert saved_bytes(shapes) == saved_bytes(real) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert saved_bytes(real) == kept(real)


@pytest.mark.parametrize("family", ["albef", "blip"])
def test_negatives_that_are_drawn_change_it_by_the_lengths_of_their_texts(family, tmp_path):
    shapes, real = steps(write_fusion(tmp_path / "model", FUSION[family]))
    lengths = real.model.mask(real.batch[1]).sum(dim=1)
    bounds = []
    for text in (lengths.argmin(), lengths.argmax()):
        shapes.targets["negatives"] = [torch.arange(4).roll(1), text.repeat(4)]
        bounds.append(saved_bytes(shapes))
    real.targets["negatives"] = None
    assert bounds[0] < bounds[1]
    assert all(bounds[0] <= kept(real) <= bounds[1] for _ in range(3))


def test_what_autocast_would_keep_is_not_told(tmp_path):
    out = tmp_path / "cost.json"
    for precision in ("fp32", "amp_bf16"):
        assert main([TINY, "--no-time", "--device", "cpu", "--precision", precision, "--json", str(out)]) == 0
        assert ("saved" in json.loads(out.read_text())["models"][0]) == (precision == "fp32")
