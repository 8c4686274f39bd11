"""Counting shards from the command line: what is counted, what is written and printed, what is refused."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from tests.training.data_helpers import (
    key_of,
    sample,
    train_data,
    truncate,
    write_damaged_shards,
    write_shard,
    write_shards,
)
from training.count_shards import main
from training.data import counting
from training.errors import UserError


def sizes(folder) -> dict[str, int]:
    return json.loads((Path(folder) / "sizes.json").read_text())


def count(*arguments) -> int:
    return main([*map(str, arguments), "--workers", "2"])


def table(text: str) -> dict[str, list[str]]:
    """Source -> its cells."""
    rows = [re.split("  +", line.strip()) for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in rows}


@pytest.fixture
def old(tmp_path):
    """Makes shards that were written some time ago."""

    def make(name, amounts):
        pattern = write_shards(tmp_path / name, amounts, info=False)
        for file in (tmp_path / name).iterdir():
            os.utime(file, (time.time() - 1000,) * 2)
        return pattern

    return make


def test_training_accepts_what_was_counted(old, tmp_path, capfd):
    patterns = [old("a", [4, 8, 12]), old("b", [8])]
    assert count(tmp_path / "a", patterns[1]) == 0
    assert sizes(tmp_path / "a") == {"00000.tar": 4, "00001.tar": 8, "00002.tar": 12}
    assert sizes(tmp_path / "b") == {"00000.tar": 8}
    assert train_data("::".join(patterns)).num_samples == 32
    rows = table(capfd.readouterr().out)
    assert rows["source"] == ["shards", "read now", "samples", "broken shards", "what is wrong in samples"]
    assert rows[str(tmp_path / "a")] == ["3", "3", "24", "0", "0"]
    assert rows["together"] == ["4", "4", "32", "0", "0"]


def test_what_is_broken_or_unusable_is_told(tmp_path, capfd):
    write_damaged_shards(tmp_path)
    truncate(tmp_path / "00000.tar", keep=2)
    (tmp_path / "00005.tar").write_bytes(b"")
    assert count(tmp_path, "--force") == 0
    text = capfd.readouterr().out
    assert table(text)[str(tmp_path)] == ["6", "6", "19", "3", "1 x empty caption, 1 x no caption, 1 x no image"]
    assert sizes(tmp_path) == {
        "00000.tar": 2, "00001.tar": 4, "00002.tar": 7, "00003.tar": 4, "00004.tar": 2, "00005.tar": 0
    }  # fmt: skip
    assert text.splitlines()[-3:] == [
        f"{tmp_path}/00000.tar breaks off after 2 samples: unexpected end of data",
        f"{tmp_path}/00003.tar breaks off after 4 samples: unexpected end of data",
        f"{tmp_path}/00005.tar breaks off after 0 samples: empty file",
    ]


def test_verify_decodes(tmp_path, capfd):
    write_damaged_shards(tmp_path)
    (tmp_path / "sizes.json").unlink()
    assert count(tmp_path) == 0 and sum(sizes(tmp_path).values()) == 31
    assert count(tmp_path, "--verify") == 0 and sum(sizes(tmp_path).values()) == 29
    assert "2 x unreadable image" in capfd.readouterr().out


def test_captions_that_are_not_utf8_are_counted_and_shown(tmp_path, capfd):
    captions = ("café très", "naïve", "plain")
    samples = {key_of(0, n): sample(n) | {"txt": text.encode("latin-1")} for n, text in enumerate(captions)}
    write_shard(tmp_path / "00000.tar", samples)
    assert count(tmp_path, "--verify") == 0 and sizes(tmp_path) == {"00000.tar": 3}
    told = capfd.readouterr().out
    assert "2 x text that is not UTF-8" in told and f"for example {tmp_path}/00000.tar: {key_of(0, 0)}" in told
    assert "caf\ufffd tr\ufffds" in told


def test_only_what_has_changed_is_read_again(old, tmp_path, capfd):
    old("a", [4, 8, 12])

    def read_now() -> str:
        capfd.readouterr()
        assert count(tmp_path / "a") == 0
        return table(capfd.readouterr().out)[str(tmp_path / "a")][1]

    assert [read_now(), read_now()] == ["3", "0"]
    old("new", [1, 2, 3])
    (tmp_path / "new/00001.tar").replace(tmp_path / "a/00001.tar")
    os.utime(tmp_path / "a/00001.tar")
    assert read_now() == "1" and sizes(tmp_path / "a")["00001.tar"] == 2
    wrong = sizes(tmp_path / "a") | {"00000.tar": 99, "elsewhere.tar": 7}
    (tmp_path / "a/sizes.json").write_text(json.dumps(wrong))
    assert read_now() == "0" and sizes(tmp_path / "a") == wrong
    assert count(tmp_path / "a", "--force") == 0
    assert sizes(tmp_path / "a") == wrong | {"00000.tar": 4}


def test_sources_by_folder_pattern_and_file(old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old("a", [1, 2])
    (tmp_path / "a/notes.txt").touch()
    both = [f"{tmp_path}/a/00000.tar", f"{tmp_path}/a/00001.tar"]
    pattern = "a/{00000..00001}.tar"
    for name, label in (("a/", "a"), (pattern, pattern), (f"file:{tmp_path}/{pattern}", f"file:{tmp_path}/{pattern}")):
        assert counting.find_sources([name]) == {label: both}
    assert counting.find_sources(["a/00000.tar", "a/00001.tar", "a/00000.tar"]) == {"a": both}
    assert counting.find_sources(["a::a/{00000..00001}.tar"]) == {"a": both, "a/{00000..00001}.tar": both}
    assert counting.distinct(counting.find_sources(["a::a/{00000..00001}.tar"])) == both


def test_what_cannot_be_opened_is_named_and_not_noted(old, tmp_path, capfd, monkeypatch):
    old("a", [1, 2])
    (tmp_path / "a/00002.tar").symlink_to(tmp_path / "nowhere")
    assert count(tmp_path / "a") == 0
    text = capfd.readouterr().out
    assert table(text)[str(tmp_path / "a")] == ["3", "2", "3", "1", "0"]
    assert text.splitlines()[-1] == (
        f"{tmp_path}/a/00002.tar cannot be opened and is not noted: No such file or directory"
    )
    assert sizes(tmp_path / "a") == {"00000.tar": 1, "00001.tar": 2}


def test_what_an_interrupted_count_has_found_is_kept(old, tmp_path, capfd, monkeypatch):
    old("a", [1, 2, 3])

    def interrupted(tasks):
        yield next(finished(tasks))
        raise KeyboardInterrupt

    finished = counting.as_completed
    monkeypatch.setattr(counting, "as_completed", interrupted)
    assert count(tmp_path / "a") == 130
    assert len(sizes(tmp_path / "a")) == 1
    assert capfd.readouterr().err.endswith("Interrupted: 2 shards are still to be counted.\n")
    monkeypatch.undo()
    assert count(tmp_path / "a") == 0
    assert sizes(tmp_path / "a") == {"00000.tar": 1, "00001.tar": 2, "00002.tar": 3}


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["{folder}/empty"], "There are no .tar files in the folder {folder}/empty: name the one that holds"),
        (["{folder}/nowhere"], "1 of the 1 shards of '{folder}/nowhere' in the arguments do not exist"),
        (["{folder}/a/{{00000..00005}}.tar"], "4 of the 6 shards of '{folder}/a/{{00000..00005}}.tar'"),
        (["{folder}/a/{{00000..00001.tar"], "The braces of"),
        (["{folder}/a::"], "A source in the arguments"),
        (["{folder}/{{a,empty}}"], "{folder}/a is a folder: name it by itself, or name the shards in it."),
        (["s3://x/{{0..9}}.tar"], "s3://x/{{0..9}}.tar is not on this machine: count its shards where they are"),
        (["pipe:cat {folder}/a/00000.tar"], "is not on this machine"),
        (["{folder}/a", "--workers", "0"], "--workers is 0, but it must be at least 1."),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, problem, old, tmp_path, capfd):
    old("a", [1, 2])
    (tmp_path / "empty").mkdir()
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert problem.format(folder=tmp_path) in captured.err
    assert captured.out == "" and not (tmp_path / "a/sizes.json").exists()


def test_a_damaged_table_or_a_folder_without_permission_is_refused(old, tmp_path, capfd, monkeypatch):
    old("a", [1])
    (tmp_path / "a/sizes.json").write_text("{")
    assert count(tmp_path / "a") == 2
    assert "is not a table of shard names and sample counts" in capfd.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"sizes.json cannot be written in {tmp_path}/a"):
        counting.run([str(tmp_path / "a")], workers=1, force=False, verify=False)
