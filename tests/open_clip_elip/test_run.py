"""Programs that know nothing of this package, run with its models."""
from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from open_clip_elip import run
from open_clip_elip.identity import create, describe

NAME = "ViT-Nano-8-64-ELIP"


def test_open_clips_own_trainer(tmp_path):
    flags = f"--model {NAME} --dataset-type synthetic --train-num-samples 8 --batch-size 8 --epochs 1 --workers 0"
    where = f"--logs {tmp_path} --name run --device cpu --precision fp32"
    words = [sys.executable, "-m", "open_clip_elip.run", "open_clip_train.main", *flags.split(), *where.split()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    trained = torch.load(tmp_path / "run" / "checkpoints" / "epoch_1.pt", weights_only=True)["state_dict"]
    assert trained.keys() == create(describe(NAME)).state_dict().keys()
    assert "TextFirstCLIP" in done.stderr + done.stdout


def test_clip_benchmark(tmp_path, monkeypatch):
    pytest.importorskip("clip_benchmark")
    webdataset = pytest.importorskip("webdataset")
    data = tmp_path / "data"
    (data / "test").mkdir(parents=True)
    with webdataset.TarWriter(str(data / "test" / "0.tar")) as shard:
        for i in range(6):
            shard.write({"__key__": f"s{i}", "png": Image.new("RGB", (64, 64), (40 * i, 9, 200)), "txt": f"{i} dogs"})
    for name, text in {"test/nshards": "1", "dataset_type": "retrieval"}.items():
        (data / f"{name}.txt").write_text(f"{text}\n")
    torch.save(create(describe(NAME)).state_dict(), weights := tmp_path / "w.pt")
    flags = "eval --dataset wds/x --num_workers 0 --no_amp --task zeroshot_retrieval --recall_k 6"
    where = f"--model {NAME} --pretrained {weights} --dataset_root {data} --output {tmp_path / 'out.json'}"
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as ended:
        run.main(["clip_benchmark.cli", *flags.split(), *where.split()])
    assert not ended.value.code
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["model"] == NAME and found["metrics"]["image_retrieval_recall@6"] == 1


@pytest.mark.parametrize("module", ["no.such.module", "open_clip_elip.no_such", "open_clip_elip.reduction", "--model"])
def test_what_cannot_be_run_is_one_sentence(module, capsys):
    assert run.main([module, "eval"]) == 2
    assert f"There is no module {module} to run" in capsys.readouterr().err


def test_a_file_is_not_run_in_search_of_a_module(tmp_path, monkeypatch, capsys):
    (tmp_path / "never_run.py").write_text("print('it ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run.main(["never_run.py"]) == 2
    told = capsys.readouterr()
    assert "There is no module never_run.py to run" in told.err and not told.out


def test_help(capsys):
    assert run.main([]) == run.main(["-h"]) == 0
    assert "clip_benchmark.cli eval" in capsys.readouterr().out
