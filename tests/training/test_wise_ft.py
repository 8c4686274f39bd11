"""Weights between two models: exact at the ends, and what is written of the curve."""
import json

import pytest
import torch
from torch import nn

from training.errors import UserError
from training.wise_ft import ALPHAS, curve, describe, interpolate, whole_weights, write


def test_the_ends_are_exact_and_the_middle_is_between():
    torch.manual_seed(0)
    a, b = ({"w": torch.randn(50), "h": torch.randn(50).bfloat16(), "n": torch.tensor(k)} for k in (3, 7))
    for alpha, end in ((0.0, a), (1.0, b)):
        got = interpolate(a, b, alpha)
        assert torch.equal(got["w"], end["w"]) and torch.equal(got["h"], end["h"])
    got = interpolate(a, b, 0.3)
    torch.testing.assert_close(got["w"], 0.7 * a["w"] + 0.3 * b["w"])
    assert torch.equal(got["h"], (0.7 * a["h"].float() + 0.3 * b["h"].float()).bfloat16())
    assert got["n"] == 7  # a counter


def test_the_curve_evaluates_each_mixture_and_leaves_the_model_as_it_was():
    model = nn.Linear(1, 1)
    before = whole_weights(model)
    start, end = ({"weight": torch.full((1, 1), v), "bias": torch.full((1,), 2 * v)} for v in (1.0, 5.0))
    rows = curve(model, start, end, lambda m: {"weight": m.weight.item(), "bias": m.bias.item()})
    assert [row["alpha"] for row in rows] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1] == list(ALPHAS)
    for row in rows:
        assert row["weight"] == pytest.approx(1 + 4 * row["alpha"])
        assert row["bias"] == pytest.approx(2 * row["weight"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def fail(model):
        raise UserError("no")

    with pytest.raises(UserError):
        curve(model, start, end, fail)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


ROWS = [
    {"alpha": 0.0, "cifar10-top1": 0.5, "cifar10-top5": 0.9, "other-set-top1": 0.25},
    {"alpha": 0.5, "cifar10-top1": 0.75, "cifar10-top5": 0.9, "other-set-top1": 0.375},
    {"alpha": 1.0, "cifar10-top1": 0.875, "cifar10-top5": 0.9, "other-set-top1": 0.125},
]


def test_the_table_stars_the_best_of_each_data_set_and_is_written(tmp_path):
    assert describe(ROWS).splitlines() == [
        "alpha  cifar10   other-set",
        "0.00    50.00%      25.00%",
        "0.50    75.00%      37.50%*",
        "1.00    87.50%*     12.50%",
    ]
    write(ROWS, tmp_path, {0.25: {"state_dict": {"w": torch.ones(2)}}})
    assert json.loads((tmp_path / "wise_ft.json").read_text()) == ROWS
    assert (tmp_path / "wise_ft.txt").read_text() == describe(ROWS) + "\n"
    assert torch.load(tmp_path / "wise_ft_0.25.pt", weights_only=True)["state_dict"]["w"].sum() == 2
    with pytest.raises(UserError, match="cannot be written"):
        write(ROWS, tmp_path / "missing", {})
