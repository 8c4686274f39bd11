"""Which module may import which: the arrows of docs/design.md."""
from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
COMMANDS = {f"training.{path.stem}" for path in (SRC / "training" / "work").glob("[a-z]*.py")}
MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path for path in SRC.rglob("*.py")
}


def imported(name: str) -> set[str]:
    """What a module imports anywhere in it: full names, of this project's modules to the module."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            inside = {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inside or {source}
    return found


IMPORTS = {name: imported(name) for name in MODULES}


def test_the_walk_sees_imports():
    assert "open_clip_elip.tower" in IMPORTS["open_clip_elip.clip"]
    assert "training.tasks.base" in IMPORTS["training.trainer"]


@pytest.mark.parametrize(
    ("where", "forbidden"),
    [
        ("open_clip_elip", ("training",)),
        ("open_clip_elip.reduction", ("open_clip", "open_clip_train", "training")),
        ("training.tasks", (*COMMANDS, "training.work")),
        ("training.data", (*COMMANDS, "training.work")),
        ("training.evaluation", (*COMMANDS, "training.work")),
        ("training.options", ("torch", "open_clip", *COMMANDS, "training.work")),
    ],
)
def test_arrows(where, forbidden):
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        if name == where or name.startswith(f"{where}.")
        for other in others
        if any(other == root or other.startswith(f"{root}.") for root in forbidden)
    ]
    assert not wrong


def test_no_command_imports_a_command():
    assert not [name for name in COMMANDS if IMPORTS[name] & COMMANDS]


def test_no_circle():
    """A package counts as what its `__init__` imports."""
    graph = {name: {one for one in others if one in MODULES and one != name} for name, others in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_module_is_long():
    assert not {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > 400}
