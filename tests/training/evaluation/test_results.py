import csv

import pytest
import torch

from training.distributed import Ranks
from training.errors import UserError
from training.evaluation.results import Results

ONE = Ranks(torch.device("cpu"))
WHAT = {
    "command": "zero_shot", "model": "hf-hub:some/Model", "pretrained": "a/b.pt", "data": "pets", "split": "test",
    "weights": "0123", "data_fingerprint": "abcd", "settings": {"precision": "fp32", "prompts": ["a|b"]},
}  # fmt: skip


def test_round_trip(tmp_path):
    results = Results(tmp_path / "new" / "results", ONE)
    assert results.find(WHAT) is None
    record = results.add(WHAT, {"top1": 0.25, "skipped": 0}, {"names": ["x"]})
    assert results.find(WHAT) == record
    assert record["metrics"] == {"top1": 0.25, "skipped": 0} and record["names"] == ["x"]
    assert {**record, **WHAT} == record
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]
    (path,) = results.folder.glob("*.json")
    assert path.name.startswith("zero_shot-Model-pets-test-")


def test_what_differs_is_other_work(tmp_path):
    results = Results(tmp_path, ONE)
    results.add(WHAT, {"top1": 0.25})
    assert results.find({**WHAT, "weights": "4567"}) is None
    assert results.find({**WHAT, "settings": {**WHAT["settings"], "precision": "bf16"}}) is None
    assert results.find(dict(reversed(WHAT.items()))) is not None  # the order does not matter
    assert Results(tmp_path, ONE, redo=True).find(WHAT) is None


def test_summaries_have_every_result(tmp_path):
    results = Results(tmp_path, ONE)
    results.add(WHAT, {"top1": 0.25})
    results.add({**WHAT, "command": "retrieval", "data": "a|b"}, {"image_to_text_R@1": 0.5})
    results.add(WHAT, {"top1": 0.75})  # done again: replaced
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [(row["command"], row["top1"], row["image_to_text_R@1"]) for row in rows] == [
        ("retrieval", "", "0.5"), ("zero_shot", "0.75", ""),
    ]  # fmt: skip
    assert all((tmp_path / row["file"]).is_file() for row in rows)
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert len(lines) == 4 and "0.7500" in lines[3] and "a\\|b" in lines[2]


def test_damaged_files_are_no_results(tmp_path):
    results = Results(tmp_path, ONE)
    results.add(WHAT, {"top1": 0.25})
    (path,) = tmp_path.glob("*.json")
    path.write_text(path.read_text()[:50])
    (tmp_path / "other.json").write_text("[1, 2]")
    assert results.find(WHAT) is None
    results.add({**WHAT, "data": "cars"}, {"top1": 0.5})
    assert len(list(csv.DictReader((tmp_path / "summary.csv").open()))) == 1


def test_nowhere():
    results = Results(None, ONE)
    assert results.find(WHAT) is None
    assert results.add(WHAT, {"top1": 0.25})["metrics"] == {"top1": 0.25}


def test_only_the_main_process_writes(tmp_path):
    results = Results(tmp_path, Ranks(torch.device("cpu"), rank=1))
    results.add(WHAT, {"top1": 0.25})
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        Results(tmp_path / "results", ONE)
