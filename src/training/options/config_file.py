"""YAML files of options: their settings, the words of a command line that say the same, and back."""
from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, reason

SOURCE_SEPARATOR = "::"


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars stay text, but for null.

    The options know their own types, and YAML's guesses harm: it takes 1e-3 for text and 2024_01_01 for a number.
    """

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = str(key.value).replace("-", "_")
            if name in seen:
                raise yaml.constructor.ConstructorError(problem=f"{name} is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^(|~|null|Null|NULL)$"), ["", *"~nN"])


RECIPES = Path(__file__).parents[1] / "configs"


def find(given: Path) -> Path:
    """The file, or a recipe by its name, with its folder or without: `albef/vqa`, `cc3m_plus_vit_s_16_elip`."""
    if given.suffix not in ("", ".yaml") or (given.exists() and not given.is_dir()):
        return given
    given = given.with_suffix("")
    files = (file.relative_to(RECIPES) for file in sorted(RECIPES.glob("**/*.yaml")))
    names = [file.with_suffix("") for file in files if "parts" not in file.parts]
    found = [name for name in names if name.parts[-len(given.parts) :] == given.parts]
    if len(found) == 1:
        return RECIPES / found[0].with_suffix(".yaml")
    close = difflib.get_close_matches(str(given), {word for name in names for word in (str(name), name.name)})
    near = found or [name for name in names if {str(name), name.name} & {*close}]
    hint = f"did you mean {' or '.join(map(str, near))}?" if near else f"the recipes are in {RECIPES}."
    raise UserError(f"There is neither a file nor a recipe {given}; {hint}")


def read(file: Path, includers: tuple[Path, ...] = ()) -> Iterator[tuple[Path, str, Any]]:
    """File, key and value of each setting of a config file, behind those of the files it includes."""
    if file.resolve() in includers:
        raise UserError(f"The config files include each other in a circle: {includers[-1]} includes {file} again.")
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or reason(error)
        raise UserError(f"Cannot read the config file {file}{where}: {problem}.") from None
    if not isinstance(content, dict):
        raise UserError(f"The config file {file} must be a mapping of options to values (batch-size: 64).")
    includes = content.pop("include", None) or []
    for other in includes if isinstance(includes, list) else [includes]:
        if not isinstance(other, str):
            raise UserError(f"{file}: include must be a file name or a list of file names.")
        yield from read(file.parent / expand(other, f"{file}: "), (*includers, file.resolve()))
    yield from ((file, str(key), value) for key, value in content.items())


_VARIABLE = re.compile(r"\$(?:([$~])|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expand(text: str, where: str = "") -> str:
    """Put in environment variables, and the home folder for `~` at the start of a source; `$$` and `$~` are literal."""

    def value(match: re.Match) -> str:
        name = match[2] or match[3]
        if name is not None and name not in os.environ:
            advice = "which is not set: export it (a plain $ is written $$)"
            raise UserError(f"{where}{text!r} uses the variable {name}, {advice}.")
        return match[1] or os.environ[name]

    sources = (os.path.expanduser(source) for source in text.split(SOURCE_SEPARATOR))
    return _VARIABLE.sub(value, SOURCE_SEPARATOR.join(sources))


def plain(value: Any, path: bool) -> Any:
    """What a config file has to hold for an option to get this value."""
    if isinstance(value, list):
        return [plain(item, path) for item in value]
    if not isinstance(value, (str, Path)):
        return copy.deepcopy(value)
    # The text of which `expand` makes this one.
    parts = (re.sub("^~", "$~", part.replace("$", "$$")) for part in str(value).split(SOURCE_SEPARATOR))
    return SOURCE_SEPARATOR.join(parts) if path else str(value)
