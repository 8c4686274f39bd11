"""Lengths in steps, epochs, samples and percent; and a run's plan in them."""
from __future__ import annotations

from dataclasses import asdict

import pytest

from training import durations
from training.errors import UserError
from training.plan import Plan

from .tiny import run_options


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("1e4", 10000, "steps"),
        ("0", 0, "steps"),
        ("10000steps", 10000, "steps"),
        ("1 step", 1, "steps"),
        ("3epochs", 3, "epochs"),
        (".5 ep", 0.5, "epochs"),
        ("1E+3Samples", 1000, "samples"),
        (" 2.5 percent ", 2.5, "%"),
        ("100%", 100, "%"),
    ],
)
def test_reads(text, amount, unit):
    assert durations.parse(text) == (amount, unit)
    assert durations.parse(f"{amount}", unit) == (amount, unit)  # a bare number has the default unit


NONE = ["", "ep", "-1", "nan", "inf", "1e999", "three", "3 hours", "3e", "3epps", "3eps2", "1,000", "1_000", "%"]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (NONE, "is not a duration: write a number of at least 0 with steps, epochs"),
        (["1.5", "1.5steps", "0.1samples"], "must be whole"),
        (["101%"], "more than the whole run"),
    ],
)
def test_refuses_in_a_sentence(texts, sentence):
    for text in texts:
        with pytest.raises(ValueError, match=sentence):
            durations.parse(text)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("12steps", 12),
        ("3ep", 300),
        ("0.125ep", 13),  # halves go up
        ("0.124ep", 12),
        ("0.29ep", 29),  # 0.29 * 100 is 28.999999999999996
        ("641samples", 10),
        ("672samples", 11),
        ("2.25%", 5),
        ("1samples", 1),  # not nothing
        ("0.0001%", 1),
        ("0ep", 0),
    ],
)
def test_in_steps(text, steps):
    found = durations.steps(text, "steps", 100, 64, 200)
    assert found == steps and type(found) is int


def test_a_percentage_needs_the_length_of_the_run():
    with pytest.raises(ValueError, match="^5% is a share of the run, whose length must be given in another unit.$"):
        durations.steps("5%", "steps", 100, 64, None)


# ---------------------------------------------------------------------- the plan of a run


def plan(reference=None, **changes) -> Plan:
    """100 steps of 64 samples in an epoch, on 2 processes."""
    options = {"epochs": "2", "batch_size": 16, "accum_freq": 2, "warmup": "5%", "epochs_cooldown": "0.5"}
    return Plan.of(run_options(**options | changes), 200, 2, reference)


def test_plan():
    found = plan()
    assert (found.global_batch, found.steps_per_epoch, found.epochs, found.total_steps) == (64, 100, 2, 200)
    assert (found.warmup_steps, found.cooldown_steps, found.total_samples) == (10, 50, 200 * 64)
    assert plan(duration="150", warmup="320samples", epochs_cooldown=None).epochs == 2
    assert [found.steps_of(text) for text in ("7%", "0.5ep", "640samples", "12", 12)] == [14, 50, 10, 12, 12]
    assert plan(epochs="0").total_steps == 0
    for changes in ({"duration": "5%"}, {"warmup": "soon"}, {"accum_freq": 201}):
        with pytest.raises(UserError):
            plan(**changes)


def test_an_older_plan_is_continued_with_another_batch():
    old = asdict(plan()) | {"full_token_steps": 0}  # an attribute of earlier versions
    new = plan(batch_size=8)
    assert new.change_from(old, mid_epoch=True) == "16 samples in a batch (now 8)"
    new = plan(batch_size=8, epochs_cooldown=None, reference=old)
    assert (new.global_batch, new.reference_batch, new.total_samples) == (32, 64, 200 * 64)
    assert (new.steps_of("7%"), new.steps_of("640samples")) == (14, 10)
