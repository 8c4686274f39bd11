"""The step benchmark: both sides do the same work, and what is told adds up. Nothing here depends on speed."""
from __future__ import annotations

import argparse
import json

import open_clip
import pytest
import torch
import train_step as script

from open_clip_elip.profile.models import Candidate, caption_lengths

from ..training.fusion_runs import METER, write_albef, write_fusion

TINY = "ViT-Ti-8-64-ELIP"
CPU = torch.device("cpu")


def options(**changes) -> argparse.Namespace:
    words = ["--models", TINY, "--batch-size", "4", "--device", "cpu", "--caption-length", "8"]
    args = script._parser().parse_args(words)
    return argparse.Namespace(**(vars(args) | changes))


def sides(ours: str):
    """OpenCLIP's side and ours, of the same weights, and their batch."""
    args = options()
    plain, _ = next(script.by_shape([Candidate.parse(ours)]))
    text = script.captions(plain, plain.build("meta"), args)
    image = torch.randn(4, 3, 64, 64)
    theirs = script.OpenClipSide(plain, image, text, args, CPU)
    own = script.OurSide(Candidate.parse(ours), image, text, args, CPU)
    own.model.load_state_dict(theirs.model.state_dict())
    return theirs, own, text


def test_without_reduction_both_sides_take_the_same_step():
    theirs, own, _ = sides(f"{TINY}:method=none")
    assert type(theirs.model) is open_clip.CLIP
    for expected, found in zip(theirs.optimizer.param_groups, own.optimizer.param_groups, strict=True):
        assert [p.shape for p in expected["params"]] == [p.shape for p in found["params"]]
        for group in (expected, found):
            assert [group[key] for key in ("lr", "betas", "eps")] == [script.LR, script.BETAS, script.EPS]
            group.update(lr=0.1, eps=1.0)  # steps that follow the gradient, not its sign
        assert expected["weight_decay"] == found["weight_decay"]
    before = theirs.model.visual.proj.detach().clone()
    theirs(2)
    own(2)
    assert not torch.allclose(theirs.model.visual.proj, before, atol=1e-4)
    for (name, expected), found in zip(theirs.model.named_parameters(), own.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_options_of_a_model_reach_the_trainer():
    spec = Candidate.parse(f"{TINY}:keep_ratio=1,.8,.6,.2,lam=0.5,merge=false,scoring_depth=1,depths=1,1,2,2")
    side = script.OurSide(spec, torch.randn(4, 3, 64, 64), torch.zeros(4, 24, dtype=torch.long), options(), CPU)
    config = side.model.reduction.config
    assert (config.keep_ratio, config.depths) == ((1, 0.8, 0.6, 0.2), (1, 1, 2, 2))
    assert (config.lam, config.merge, config.scoring_depth) == (0.5, False, 1)


def test_results(tmp_path, capsys):
    names = [TINY, f"{TINY}:scoring_depth=1"]
    words = ["--models", *names, "--batch-size", "4", "--device", "cpu", "--caption-length", "8", "--rounds", "2"]
    assert script.main([*words, "--results", str(tmp_path), "--name", "try"]) == 0
    found = json.loads((tmp_path / "train_step_cpu_try.json").read_text())
    assert [result["model"] for result in found["results"]] == names
    assert found["setting"]["caption_tokens"]["max"] == max(caption_lengths("8", 4))
    plain = script.count(Candidate.parse(f"{TINY}:method=none"), options())
    for result in found["results"]:
        assert result["open_clip"]["flops"] == plain.total
        assert result["flops_ratio"] == result["ours"]["flops"] / plain.total < 1
        assert result["saved_ratio"] == result["ours"]["saved_bytes"] / result["open_clip"]["saved_bytes"] < 0.9
        assert len(result["time_ratio_of_each_round"]) == result["time_ratio"]["count"] == 2
        assert result["ours"]["peak_bytes"] > result["ours"]["saved_bytes"]
        for side in (result["ours"], result["open_clip"]):
            assert list(side["seconds_apart"]) == ["forward", "backward", "optimizer"]
            assert min(side["seconds_apart"].values()) > 0 and side["utilisation"] > 0
            assert 0 < sum(side["busy_shares"].values()) < 1
    exact, shallow = found["results"]
    assert shallow["flops_ratio"] < exact["flops_ratio"]
    assert names[1] in capsys.readouterr().out
    assert f"| {TINY} |" in (tmp_path / "train_step_cpu_try.md").read_text()


def test_a_fusion_model_is_compared_with_itself_as_released(tmp_path):
    name = write_albef(tmp_path / "model")
    words = ["--models", name, "--batch-size", "4", "--device", "cpu", "--caption-length", "8", "--rounds", "1"]
    assert script.main([*words, "--results", str(tmp_path)]) == 0
    (result,) = json.loads((tmp_path / "train_step_cpu.json").read_text())["results"]
    assert result["against"] == f"plain {name} as released"
    assert result["flops_ratio"] < 0.9 and result["saved_ratio"] < 1
    args = options(caption_length="8")
    released, _ = next(script.by_shape([Candidate.parse(name)]))
    text = script.captions(released, None, args)
    both = released, Candidate.parse(name)
    sides: list[script.OurSide] = []
    for one in both:
        sides.append(script.OurSide(one, torch.randn(4, 3, 32, 32), text, args, CPU, like=sides[0] if sides else None))
    assert [side.model.tower.shortcuts for side in sides] == [False, True]
    assert [side.trainer.task.twin.tower.shortcuts for side in sides] == [False, True]
    assert sides[0].model.tower.reduction is None
    assert all(a is b for a, b in zip(*(side.model.parameters() for side in sides), strict=True))
    assert sides[1].trainer.parameters == sides[0].trainer.parameters and sides[1].optimizer is sides[0].optimizer


@pytest.mark.parametrize("pad", [0, 1])  # BERT's, RoBERTa's
def test_words_of_a_meter_are_masked(pad, tmp_path):
    config = METER | {"text_cfg": METER["text_cfg"] | {"bert": METER["text_cfg"]["bert"] | {"pad_token_id": pad}}}
    one = Candidate.parse(write_fusion(tmp_path, config))
    args = options(caption_length="8")
    text = script.captions(one, one.build("meta"), args)
    side = script.OurSide(one, torch.randn(4, 3, 32, 32), text, args, CPU)
    torch.manual_seed(0)
    assert sum(len(side.trainer.task.prepare(side.batch)["labels"]) for _ in range(20))


def test_models_of_one_shape_take_their_turns_together():
    specs = map(Candidate.parse, ("ViT-S-16-ELIP", "ViT-B-16-ELIP", "ViT-S-16:shortcuts=true", "ViT-S-16:method=evit"))
    contests = {plain.label: [one.label for one in ours] for plain, ours in script.by_shape([*specs])}
    assert contests == {
        "open_clip ViT-S-16": ["ViT-S-16-ELIP", "ViT-S-16:shortcuts=true", "ViT-S-16:method=evit"],
        "open_clip ViT-B-16": ["ViT-B-16-ELIP"],
    }


@pytest.mark.parametrize("model", ["ViT-Q", "coca_ViT-B-32"])
def test_models_that_cannot_be_compared_are_told(model, tmp_path, capsys):
    assert script.main(["--models", model, "--device", "cpu", "--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not any(tmp_path.iterdir())
