"""`pip install .` (not editable) brings everything that the package reads."""
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_carries_the_model_configs(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "configs"):
        ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    argv = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    inside = set(archive.namelist())
    expected = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*") if p.suffix in (".py", ".json")}
    assert expected <= inside
    assert "open_clip_elip/model_configs/ViT-B-16-ELIP.json" in inside
    assert "training/data/sets/names/mnist-classes.txt" in inside
    assert {"open_clip_elip/py.typed", "training/py.typed"} <= inside
    recipes = {f"training/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert recipes <= inside and len(recipes) > 50
    (metadata,) = (name for name in inside if name.endswith("entry_points.txt"))
    (command,) = (line for line in archive.read(metadata).decode().splitlines() if "=" in line)
    assert command == "open-clip-elip = training.__main__:console"
    archive.extractall(tmp_path / "installed")
    argv = [sys.executable, "-m", "training", "train", "--config", "no_such_recipe"]
    result = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path / "installed", env={"PYTHONPATH": "."})
    assert f"the recipes are in {tmp_path}/installed/training/configs." in result.stderr
