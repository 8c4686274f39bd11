"""The schedule: its numbers, its default for other depths, and what it refuses."""

import json

import pytest

from open_clip_elip.reduction import Elip, ElipConfig


def test_the_papers_schedule_at_224_by_16():
    reducer = Elip(ElipConfig(depths=(2, 2, 6, 2), keep_ratio=(1.0, 0.9, 0.65, 0.4)), 12)
    assert reducer.token_counts(196) == [197] * 2 + [178] * 2 + [129] * 6 + [80] * 2
    assert reducer.rrt(196) == pytest.approx(1 - 1684 / 2364)
    assert 0.28 <= reducer.rrt(196) <= 0.30


def test_the_papers_stages():
    stages = ElipConfig(depths=(2, 2, 6, 2), keep_ratio=(1.0, 0.9, 0.65, 0.4)).stages(12)
    assert [(stage.first, stage.depth) for stage in stages] == [(0, 2), (2, 2), (4, 6), (10, 2)]
    assert [stage.keep(196) for stage in stages] == [196, 176, 127, 78]
    assert [stage.keep(256) for stage in stages] == [256, 230, 166, 102]
    assert [stage.keep(1) for stage in stages] == [1, 1, 1, 1]


def test_absolute_counts():
    config = ElipConfig(depths=(2, 2), keep_ratio=None, keep_count=(50, 20))
    assert [stage.keep(196) for stage in config.stages(4)] == [50, 20]
    assert Elip(config, 4).token_counts(196) == [52, 52, 22, 22]
    assert Elip(config, 4).token_counts(30) == [31, 31, 22, 22]
    pruning = ElipConfig(depths=[2, 2], keep_ratio=[0.5, 0.25], merge=False)  # lists, as from JSON
    assert Elip(pruning, 4).token_counts(196) == [99, 99, 50, 50]
    meter = Elip(ElipConfig(keep_ratio=(1.0, 0.9, 0.7, 0.45)), 11)
    assert meter.token_counts(196) == [197] * 2 + [178] * 2 + [139] * 5 + [90] * 2


@pytest.mark.parametrize(
    ("depth", "depths"),
    [(12, (2, 2, 6, 2)), (11, (2, 2, 5, 2)), (24, (4, 4, 12, 4)), (6, (1, 1, 3, 1)), (48, (8, 8, 24, 8))],
)
def test_the_default_schedule_scales_with_the_depth(depth, depths):
    stages = ElipConfig().stages(depth)
    assert tuple(stage.depth for stage in stages) == depths
    assert [stage.keep(196) for stage in stages] == [196, 176, 127, 78]


@pytest.mark.parametrize("depth", range(1, 60))
def test_the_default_schedule_covers_any_depth(depth):
    stages = ElipConfig().stages(depth)
    assert all(stage.depth >= 1 for stage in stages)
    assert sum(stage.depth for stage in stages) == depth
    assert [stage.first for stage in stages] == [sum(s.depth for s in stages[:i]) for i in range(len(stages))]
    kept = [stage.keep(196) for stage in stages]
    assert kept == sorted(kept, reverse=True)
    assert set(kept) <= {196, 176, 127, 78}
    assert len(stages) == 4 or depth < 6  # few layers cannot have every stage
    assert 0.2 < Elip(ElipConfig(), depth).rrt(196) < 0.4


def one_sentence(error):
    text = str(error.value)
    return len(text) > 10 and "\n" not in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"depths": (2, 2, 8), "keep_ratio": (1.0, 0.5, 0.9)}, "keep_ratio"),
        ({"depths": (6, 6), "keep_ratio": (1.0, 0.0)}, "keep_ratio"),
        ({"depths": (6, 6), "keep_ratio": (1.0, -0.5)}, "keep_ratio"),
        ({"depths": (6, 6), "keep_ratio": (1.2, 0.5)}, "keep_ratio"),
        ({"depths": (6, 6), "keep_ratio": (float("nan"), 0.5)}, "keep_ratio"),
        ({"depths": (6, 6), "keep_ratio": ()}, "keep_ratio"),
        ({"depths": (6, 6), "keep_ratio": (1.0, 0.9, 0.5)}, "keep_ratio"),
        ({"depths": (6, 6), "keep_ratio": None}, "keep_ratio"),
        ({"depths": (6, 6), "keep_ratio": (1.0, 0.5), "keep_count": (100, 50)}, "keep_count"),
        ({"depths": (6, 6), "keep_ratio": None, "keep_count": (50, 100)}, "keep_count"),
        ({"depths": (6, 6), "keep_ratio": None, "keep_count": (50, 0)}, "keep_count"),
        ({"depths": (6, 6), "keep_ratio": None, "keep_count": (50,)}, "keep_count"),
        ({"depths": (6, 6), "keep_ratio": None, "keep_count": (50, 20.5)}, "keep_count"),
        ({"depths": (12, 0), "keep_ratio": (1.0, 0.5)}, "depths"),
        ({"depths": (13, -1), "keep_ratio": (1.0, 0.5)}, "depths"),
        ({"depths": (6, 5), "keep_ratio": (1.0, 0.5)}, "depths"),
        ({"depths": (6, 7), "keep_ratio": (1.0, 0.5)}, "depths"),
        ({"depths": ()}, "depths"),
        ({"lam": -0.1}, "lam"),
        ({"lam": 1.1}, "lam"),
        ({"lam": float("nan")}, "lam"),
        ({"text_scale": "norm"}, "text_scale"),
        ({"scoring_depth": 0}, "scoring_depth"),
        ({"scoring_depth": -1}, "scoring_depth"),
    ],
)
def test_what_is_refused(options, names):
    with pytest.raises(ValueError, match=names) as error:
        ElipConfig(**options).stages(12)
    assert one_sentence(error)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("keep_ratios", "keep_ratio"), ("lambda", "lam"), ("depth", "depths"), ("text_scaling", "text_scale")],
)
def test_an_unknown_key_names_the_nearest_known_one(wrong, right):
    with pytest.raises(ValueError, match=rf"\b{right}\b") as error:
        ElipConfig.from_dict({wrong: 1})
    assert wrong in str(error.value)
    assert one_sentence(error)


@pytest.mark.parametrize(
    "config",
    [
        ElipConfig(),
        ElipConfig(depths=(2, 10), keep_ratio=(1.0, 0.5), lam=0.3, merge=False, text_scale="none", scoring_depth=1),
        ElipConfig(depths=(2, 10), keep_ratio=None, keep_count=(100, 50)),
    ],
)
def test_a_configuration_survives_json(config):
    assert ElipConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
