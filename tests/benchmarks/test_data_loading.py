"""The loader benchmark at its smallest. Nothing here depends on speed."""
from __future__ import annotations

import json
import os

import data_loading as script
import pytest
import torch

from training.data import images


def test_all_loaders_take_turns_and_are_told(tmp_path, capsys):
    cores = getattr(os, "sched_getaffinity", lambda pid: None)  # Linux has it
    before = torch.get_num_threads(), cores(0)
    words = ["--quick", "--sizes", "64", "--rounds", "2"]
    assert script.main([*words, "--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]) == 0
    assert (torch.get_num_threads(), cores(0)) == before
    report = json.loads((tmp_path / "a.json").read_text())
    (result,) = report["results"]
    names = ["open_clip_train", "plain", "fast", "reduced", "fast + normalise"]
    if images.simplejpeg is not None:
        names.insert(4, "fast (Pillow)")
    assert list(result["images_per_second"]) == names and list(result["ratio"]) == names[1:]
    assert (result["long_side"], result["images"]) == (64, 64)
    rates = {name: rate["rounds"] for name, rate in result["images_per_second"].items()}
    for name, ratio in result["ratio"].items():
        expected = [mine / other for mine, other in zip(rates[name], rates["open_clip_train"], strict=True)]
        assert len(expected) == 2 and ratio["rounds"] == pytest.approx(expected, abs=2e-3)
    shown = (tmp_path / "a.md").read_text()
    assert shown.count("| 64 px") == len(names) and report["machine"]["device"] in shown
    assert shown.splitlines()[2] in capsys.readouterr().out


def test_photographs_are_as_large_as_asked_and_always_the_same():
    picture = script.photograph(5, 96)
    assert max(picture.size) == 96 and picture.mode == "RGB"
    assert script.jpeg(picture) == script.jpeg(script.photograph(5, 96)) != script.jpeg(script.photograph(6, 96))
