"""Lengths in steps, epochs, samples and percent."""
from __future__ import annotations

import pytest

from training.durations import Duration


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("10000", 10000, "steps"),
        ("1e4", 10000, "steps"),
        ("0", 0, "steps"),
        ("10000steps", 10000, "steps"),
        ("1 step", 1, "steps"),
        ("3ep", 3, "epochs"),
        ("3epochs", 3, "epochs"),
        ("1epoch", 1, "epochs"),
        (".5 ep", 0.5, "epochs"),
        ("2.5e6samples", 2_500_000, "samples"),
        ("1E+3Samples", 1000, "samples"),
        ("5%", 5, "%"),
        (" 2.5 percent ", 2.5, "%"),
        ("100%", 100, "%"),
    ],
)
def test_reads(text, amount, unit):
    assert Duration.parse(text, "steps") == Duration(amount, unit)


def test_a_bare_number_has_the_default_unit():
    assert Duration.parse("2.5", "epochs") == Duration(2.5, "epochs")
    assert Duration.parse("7", "samples") == Duration(7, "samples")
    assert Duration.parse("7steps", "samples") == Duration(7, "steps")


@pytest.mark.parametrize(
    "text",
    ["", "ep", "-1", "-3ep", "nan", "inf", "1e999", "three", "3 hours", "3e", "3epps", "3eps2", "1,000", "1_000", "%"],
)
def test_refuses_in_a_sentence(text):
    with pytest.raises(ValueError, match="is not a duration: write a number of at least 0 with steps, epochs"):
        Duration.parse(text, "steps")


@pytest.mark.parametrize("text", ["1.5", "1.5steps", "0.1samples"])
def test_steps_and_samples_are_whole(text):
    with pytest.raises(ValueError, match="must be whole"):
        Duration.parse(text, "steps")


def test_no_more_than_the_whole_run():
    with pytest.raises(ValueError, match="more than the whole run"):
        Duration.parse("101%", "steps")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("12steps", 12),
        ("3ep", 300),
        ("0.5ep", 50),
        ("0.126ep", 13),
        ("0.125ep", 13),  # halves go up
        ("0.124ep", 12),
        ("0.29ep", 29),  # 0.29 * 100 is 28.999999999999996
        ("640samples", 10),
        ("641samples", 10),
        ("672samples", 11),
        ("7%", 14),
        ("2.25%", 5),
        ("100%", 200),
        ("1samples", 1),  # not nothing
        ("0.001ep", 1),
        ("0.0001%", 1),
        ("0ep", 0),
        ("0", 0),
        ("0%", 0),
    ],
)
def test_in_steps(text, steps):
    found = Duration.parse(text, "steps").steps(100, 64, total_steps=200)
    assert found == steps and type(found) is int


def test_a_percentage_needs_the_length_of_the_run():
    with pytest.raises(ValueError, match="^5% is a share of the run, whose length must be given in another unit.$"):
        Duration.parse("5%", "steps").steps(100, 64)


@pytest.mark.parametrize("text", ["12steps", "3epochs", "0.1epochs", "2500000samples", "5%", "0.001%"])
def test_text_and_back(text):
    duration = Duration.parse(text, "samples")
    assert str(duration) == text
    assert Duration.parse(str(duration), "steps") == duration
