"""The short form of the chaos run: killed with SIGKILL at random moments, it ends as if nobody had touched it."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*flags):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, str(ROOT / "scripts" / "chaos.py"), *flags]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=400)


def test_killed_and_resumed_equals_undisturbed():
    result = run("--kills", "4", "--epochs", "2", "--seed", "3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "kills: 4," in result.stdout and "survived 4, lost 0" in result.stdout
    assert "bit-equal to the undisturbed run: yes" in result.stdout
