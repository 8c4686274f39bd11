"""What is not imported: torch and all that needs it, before a command's options are read and right."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import open_clip_elip

HEAVY = {"torch", "open_clip", "transformers", "timm", "pandas", "numpy", "PIL", "wandb", "tensorboard", "matplotlib"}
ASKED = """
import contextlib, importlib, json, sys
main = importlib.import_module({module!r}).main
try:
    code = main({argv!r})
except SystemExit as end:
    code = end.code
json.dump([code, sorted(name for name in {heavy!r} if name in sys.modules)], sys.stderr)
"""
COMMANDS = [f"training.{name}" for name in "main finetune downstream zero_shot linear_probe retrieval caption".split()]
OTHERS = ["training.count_shards", "training.summary"]
OTHERS += [f"open_clip_elip.{name}.command" for name in ("profile", "visualize", "export")]


def python(code: str) -> subprocess.CompletedProcess:
    source = str(Path(open_clip_elip.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {source!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", [*COMMANDS, *OTHERS])
@pytest.mark.parametrize("argv", [["--help"], ["--no-such-flag", "1"], ["--config", "no_such_file.yaml"]], ids=" ".join)
def test_a_help_page_and_a_mistake_need_no_torch(module, argv):
    done = python(ASKED.format(module=module, argv=argv, heavy=HEAVY))
    assert json.loads(done.stderr.splitlines()[-1]) == [0 if argv == ["--help"] else 2, []]


def test_neither_do_right_options(monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    recipes = Path(__file__).parents[1] / "configs"
    done = python(f"""
from training.options import parse
from training.options.main import PretrainingOptions
from training.options.finetune import FinetuningOptions
from training.options.zero_shot import ZeroShotOptions
data = ["--train-data", "x.tar", "--aug-cfg", "scale=1"]
parse(PretrainingOptions, ["--config", "{recipes}/pretrain/cc3m_plus_vit_s_16_elip.yaml", *data])
parse(FinetuningOptions, ["--data", "x", "--model", "ViT-S-16", "--pretrained", "x", "--mixup", "0.8"])
parse(ZeroShotOptions, ["--data", "x", "--model", "ViT-S-16"])
print([name for name in {HEAVY!r} if name in sys.modules])
""")
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import open_clip_elip; from importlib.util import find_spec; find_spec('open_clip')\nimport open_clip",
        "from open_clip_elip.clip import TextFirstCLIP; import open_clip",
    ],
)
def test_models_are_registered_once_open_clip_is_imported(imports):
    done = python(f"{imports}\nprint(type(open_clip.create_model('ViT-Nano-8-64-ELIP')).__name__)")
    assert done.stdout == "TextFirstCLIP\n", done.stderr


def test_work_needs_no_reporter():
    commands = ", ".join(name.replace("training.", "training.work.") for name in COMMANDS)
    # timm imports wandb wherever it is installed.
    found = "{'tensorboard', 'matplotlib'} & {*sys.modules}"
    done = python(f"sys.modules['wandb'] = None\nimport {commands}\nprint({found})")
    assert done.stdout == "set()\n", done.stderr


def test_the_package_has_what_it_names():
    for name in open_clip_elip.__all__:
        assert getattr(open_clip_elip, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Elipse'"):
        open_clip_elip.Elipse  # noqa: B018
