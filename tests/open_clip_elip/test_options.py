"""The options of all methods: what they are by default, the numbers they give, and what they refuse."""
from __future__ import annotations

import json

import pytest

from open_clip_elip.reduction import METHODS, Elip, ElipConfig, Evit, RandomDrop, Tome, resolve
from open_clip_elip.reduction.evit import EvitConfig
from open_clip_elip.reduction.random_drop import RandomDropConfig
from open_clip_elip.reduction.tome import TomeConfig

from .tiny import assert_one_sentence


def test_the_papers_schedule_at_224_by_16():
    reducer = Elip(ElipConfig(depths=(2, 2, 6, 2), keep_ratio=(1.0, 0.9, 0.65, 0.4)), 12)
    assert reducer.token_counts(196) == [197] * 2 + [178] * 2 + [129] * 6 + [80] * 2
    assert reducer.rrt(196) == pytest.approx(1 - 1684 / 2364)


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
    assert [stage.keep(256) for stage in stages] == [256, 230, 166, 102]
    assert [stage.keep(1) for stage in stages] == [1, 1, 1, 1]


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


# ---------------------------------------------------------------------- target_rrt


def rrt_of(work, patches):
    return 1 - sum(layer.attention + layer.mlp for layer in work) / (2 * len(work) * (1 + patches))


TARGETS = [0.0, 0.05, 0.2877, 0.5, 0.8, 0.95]


@pytest.mark.parametrize("patches", [1, 16, 49, 196, 576])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layers", [1, 4, 12])
def test_no_keep_rate_is_nearer_to_the_target(target, patches, layers):
    evit = Evit(EvitConfig(target_rrt=target), layers)
    rates = (i / 5000 for i in range(1, 5001))
    schedules = {tuple(evit._layers(patches, rate)) for rate in rates}
    nearest = min(abs(rrt_of(work, patches) - target) for work in schedules)
    assert abs(evit.rrt(patches) - target) <= nearest + 1e-12

    random = RandomDrop(RandomDropConfig(target_rrt=target), layers)
    nearest = min(abs(1 - (1 + keep) / (1 + patches) - target) for keep in range(1, patches + 1))
    assert abs(random.rrt(patches) - target) == pytest.approx(nearest, abs=1e-12)


@pytest.mark.parametrize("patches", [1, 16, 49, 196])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layers", [1, 4, 12])
def test_no_r_is_nearer_to_the_target(target, patches, layers):
    """Of one r for all layers, and of all that are even to within one in the way of a line drawn in pixels."""
    tome = Tome(TomeConfig(target_rrt=target), layers)
    r = [layer.attention - layer.mlp for layer in tome.layers(patches)]
    distance = abs(tome.rrt(patches) - target)
    for total in range(layers * ((patches + 1) // 2) + 1):
        even = [total * (i + 1) // layers - total * i // layers for i in range(layers)]
        assert distance <= abs(rrt_of(tome._layers(patches, tuple(even)), patches) - target) + 1e-12
    for r in range(patches // 2 + 1):
        assert distance <= abs(rrt_of(tome._layers(patches, (r,) * layers), patches) - target) + 1e-12


# ---------------------------------------------------------------------- what is taken and what is refused


NAN = float("nan")
# method, option that the sentence names, wrong values of it, and what else is given
REFUSED = [
    ("elip", "keep_ratio", [(1, 0.0), (1, -0.5), (1.2, 0.5), (NAN, 0.5), (), (1, 0.9, 0.5)], {"depths": (6, 6)}),
    ("elip", "keep_ratio", [(1, 0.5, 0.9)], {"depths": (2, 2, 8)}),
    ("elip", "keep_ratio", [None], {"depths": (6, 6)}),
    ("elip", "keep_count", [(100, 50)], {"depths": (6, 6), "keep_ratio": (1, 0.5)}),
    ("elip", "keep_count", [(50, 100), (50, 0), (50,), (50, 20.5)], {"depths": (6, 6)}),
    ("elip", "depths", [(12, 0), (13, -1), (6, 5), (6, 7)], {"keep_ratio": (1, 0.5)}),
    ("elip", "depths", [()], {}),
    ("elip", "lam", [-0.1, 1.1, NAN], {}),
    ("elip", "text_scale", ["norm"], {}),
    ("elip", "scoring_depth", [0, -1], {}),
    ("evit", "keep_rate", [0, 1.1, NAN, True, "0.5"], {}),
    ("evit", "target_rrt", [-0.1, 1], {}),
    ("evit", "target_rrt", [0.3], {"keep_rate": 0.5}),
    ("evit", "layers", [(2, 5), (), (0, 2), (2, 2), (3, 2), (1.5,)], {}),
    ("evit", "fuse", [1], {}),
    ("tome", "r", [-1, 1.5, True, "13", [1, 2, 3], [1, 2, -3, 1], []], {}),
    ("tome", "target_rrt", [2], {}),
    ("tome", "target_rrt", [0.3], {"r": 3}),
    ("tome", "prop_attn", ["yes"], {}),
    ("random", "keep_ratio", [0, [0.5, 0.4], []], {}),
    ("random", "target_rrt", [0.99], {}),
    ("random", "target_rrt", [0.3], {"keep_ratio": 0.5}),
]


@pytest.mark.parametrize(
    ("method", "options", "names"),
    [(method, {name: value} | more, name) for method, name, values, more in REFUSED for value in values]
    + [(method, {wrong: 1}, rf"{wrong}.*\b{right}\b") for method, wrong, right in (
        ("elip", "keep_ratios", "keep_ratio"), ("elip", "lambda", "lam"), ("elip", "text_scaling", "text_scale"),
        ("evit", "keep_rat", "keep_rate"), ("tome", "R", "r"), ("random", "keep_rate", "keep_ratio"),
    )] + [("evti", {}, "evit")],
)  # fmt: skip
def test_what_is_refused(method, options, names):
    with pytest.raises(ValueError, match=names) as error:
        name, config = resolve({"method": method, **options})
        METHODS[name](config, 12 if method == "elip" else 4)
    assert_one_sentence(error)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("elip", {}),
        ("elip", {"depths": (2, 2), "keep_ratio": (1.0, 0.5), "lam": 0.3, "text_scale": "none", "scoring_depth": 1}),
        ("elip", {"depths": (2, 2), "keep_count": (100, 50), "merge": False}),
        ("evit", {}),
        ("evit", {"target_rrt": 0.3, "layers": [2, 3], "fuse": False}),
        ("tome", {}),
        ("tome", {"r": [1, 2, 3, 4], "prop_attn": False}),
        ("tome", {"target_rrt": 0.3}),
        ("random", {"keep_ratio": [0.4]}),
        ("random", {"target_rrt": 0.3}),
    ],
)
def test_a_configuration_survives_json(method, options):
    kind = METHODS[method]
    config = kind.Config.from_dict(options)
    assert kind.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert kind(config, 4).token_counts(16)


def test_an_option_replaces_its_alternatives_and_one_number_is_a_list():
    def options(given, own):
        return resolve(given, own)[1].to_dict()

    own = {"method": "evit", "keep_rate": 0.7, "fuse": False}
    assert options({"target_rrt": 0.3, "layers": 3}, own) == {"target_rrt": 0.3, "layers": [3], "fuse": False}
    assert options({"fuse": True}, own) == {"keep_rate": 0.7, "fuse": True}
    assert options({"method": "tome", "r": 3}, own) == {"r": 3, "prop_attn": True}
