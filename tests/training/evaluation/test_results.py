import csv
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from training.distributed import Ranks
from training.errors import UserError
from training.evaluation.results import Results, described_model

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


def test_where_nothing_is_written(tmp_path, caplog):
    for results in (Results("none", ONE), Results(tmp_path, Ranks(torch.device("cpu"), rank=1))):
        assert results.add(WHAT, {"top1": 0.25})["metrics"] == {"top1": 0.25}
    assert Results("none", ONE).find(WHAT) is None and list(tmp_path.iterdir()) == []
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        Results(tmp_path / "results", ONE)
    full = Results(tmp_path / "full", ONE)
    (tmp_path / "full").write_text("")
    with pytest.raises(UserError, match="cannot be written"), caplog.at_level("INFO"):
        full.add(WHAT, {"top1": 0.25})
    assert '{"top1": 0.25}' in caplog.text  # what took hours is at least shown
    with pytest.raises(UserError, match="--results /proc/results cannot be written to .*; name another folder"):
        Results("/proc/results", ONE)


def test_a_model_is_known_by_its_tokenizers_vocabulary_too():
    """Which a folder of transformers' may change under the same name."""
    options = SimpleNamespace(model="local-dir:x", precision="fp32", vision_guided_reduction=False)
    identity = SimpleNamespace(to_dict=lambda: {"name": "local-dir:x"})
    made = [SimpleNamespace(tokenizer=SimpleNamespace(backend_tokenizer=Tokenizer(WordLevel({w: 0})))) for w in "aab"]
    first, same, other = (described_model(options, identity, "0", None, tokenizer) for tokenizer in made)
    assert first == same != other
