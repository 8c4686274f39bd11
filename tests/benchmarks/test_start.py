"""The benchmark of starting at its smallest. Nothing here depends on speed."""
from __future__ import annotations

import start as script


def test_starts_are_told(tmp_path, capsys):
    assert script.main(["--shards", "2", "4", "--samples", "150", "--markdown", str(tmp_path / "a.md")]) == 0
    shown = (tmp_path / "a.md").read_text()
    assert "| 2 shards, 300 samples |" in shown and "| 4 shards, 600 samples |" in shown
    assert "imports" in capsys.readouterr().out
