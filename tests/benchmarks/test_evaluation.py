"""The evaluation benchmark at its smallest. Nothing here depends on speed."""
from __future__ import annotations

import json

import evaluation


def test_both_sides_agree_and_are_told(tmp_path, capsys):
    words = ["--model", "ViT-Ti-8-64-ELIP", "--device", "cpu", "--images", "6", "--pixels", "80", "--classes", "5"]
    words += ["--batch-size", "4", "--workers", "0", "--rounds", "2", "--results", str(tmp_path)]
    assert evaluation.main(words) == 0
    found = json.loads((tmp_path / "evaluation_cpu.json").read_text())
    checks = found["checks"]
    assert checks["feature_difference"] < 1e-5
    assert checks["classifier_difference"] < 1e-5
    assert checks["top1"]["ours"] == checks["top1"]["open_clip"]
    assert [result["unit"] for result in found["results"]] == ["prompts/s", "images/s", "images/s"]
    for result in found["results"]:
        assert result["ratio"]["count"] == 2
        assert all(rate["median"] > 0 for rate in result["rate"].values())
    assert "JPEG files to accuracy" in capsys.readouterr().out
    assert "prompts to classifier" in (tmp_path / "evaluation_cpu.md").read_text()


def test_an_unknown_model_is_told(tmp_path, capsys):
    assert evaluation.main(["--model", "ViT-Q", "--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: There is no model named")
