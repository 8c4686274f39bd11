"""The benchmark of resuming at its smallest. Nothing here depends on speed."""
from __future__ import annotations

import resume as script


def test_positions_are_resumed_and_told(tmp_path, capsys):
    words = ["--samples", "1500", "--shards", "3", "--batch-size", "50", "--folder", str(tmp_path)]
    assert script.main([*words, "--markdown", str(tmp_path / "a.md")]) == 0
    shown = (tmp_path / "a.md").read_text()
    assert [line.split(" |")[0] for line in shown.splitlines()[-3:]] == ["| 0%", "| 50%", "| 90%"]
    assert "1,500 samples in 3 shards" in shown and "90%" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]
