"""A run's folder: one writer, no two default names alike, and what may go wrong without ending a run."""
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from training import run_folder
from training.errors import UserError

SRC = Path(run_folder.__file__).parents[1]
HOLD = """
import sys
from pathlib import Path
from training.run_folder import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """A process that has claimed `tmp_path/logs/run`."""
    argv = [sys.executable, "-c", HOLD, str(tmp_path / "logs" / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": str(SRC)}, **pipes)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("end", ["ends", "is killed"])
def test_two_processes_never_write_into_one_folder(other, end, tmp_path):
    folder = tmp_path / "logs" / "run"
    with pytest.raises(UserError, match=rf"run is being written by process {other.pid} on .*; wait for its end, or"):
        with run_folder.claimed(folder):
            pass
    with run_folder.claimed(folder.with_name("another")):
        pass
    if end == "ends":
        other.communicate("")
        assert not folder.exists()  # nothing came into it
    else:
        other.kill()
        other.wait()
        assert (folder / ".lock").exists()
    with run_folder.claimed(folder):
        run_folder.create(folder, {"epochs": 2})
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "params.txt", "checkpoints"}


def test_a_claim_that_comes_to_nothing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), run_folder.claimed(tmp_path / "logs" / "a" / "run"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with run_folder.claimed(None):
        pass


def test_default_names_differ_within_a_second():
    options = Namespace(model="hf-hub:a/b", lr=1e-3, batch_size=8, workers=1, precision="fp32")
    names = {run_folder.default_name(options) for _ in range(3)}
    assert len(names) == 3 and all("-model_hf-hub-a-b-lr_0.001-b_8-j_1-p_fp32-" in name for name in names)


@pytest.mark.parametrize("left", ["train.csv", "checkpoints/results.jsonl"])
def test_a_name_is_free_until_there_are_figures_or_checkpoints(left, tmp_path):
    run_folder.create(tmp_path, {"epochs": 2})
    (tmp_path / "out.log").touch()
    run_folder.check_unused(tmp_path, Namespace(resume=None))
    (tmp_path / left).touch()
    run_folder.check_unused(tmp_path, Namespace(resume="latest"))
    with pytest.raises(UserError, match="exists already; choose another --name"):
        run_folder.check_unused(tmp_path, Namespace(resume=None))


def test_a_full_disk_keeps_the_old_configuration(tmp_path, monkeypatch, caplog):
    run_folder.create(tmp_path, {"epochs": 2})
    monkeypatch.setattr("training.files.os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left")))
    run_folder.create(tmp_path, {"epochs": 3})
    assert (tmp_path / "config.yaml").read_text() == "epochs: 2\n"
    assert caplog.text.count("config.yaml could not be updated (No space left); the run goes on") == 1
    with pytest.raises(UserError, match="Cannot write to the folder"):
        run_folder.create(tmp_path / "new", {"epochs": 2})


def test_the_codebase_is_the_two_packages(tmp_path, monkeypatch):
    """After a plain install they lie among all others."""
    for name in ("training/run_folder.py", "training/__pycache__/a.pyc", "open_clip_elip/clip.py", "torch/big.bin"):
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).touch()
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "site" / "training" / "run_folder.py"))
    run_folder.create(tmp_path / "run", {}, copy_codebase=True)
    code = tmp_path / "run" / "code"
    copied = {path.relative_to(code).as_posix() for path in code.rglob("*") if path.is_file()}
    assert copied == {"training/run_folder.py", "open_clip_elip/clip.py"}
