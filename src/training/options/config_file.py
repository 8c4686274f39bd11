"""YAML files of options: from a file to the words of a command line that say the same, and back."""
from __future__ import annotations

import argparse
import ast
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

SOURCE_SEPARATOR = "::"


@dataclass(frozen=True)
class Setting:
    """One value of a config file, as it stands there, and the parser's action that it is for."""

    action: argparse.Action
    value: Any
    file: Path | str

    def words(self) -> list[str]:
        """The words of a command line that say the same; none for null."""
        action, option, value = self.action, self.action.option, self.value
        flag = action.option_strings[0]
        off = "--no-" + flag.removeprefix("--")
        off = [off] if off in action.option_strings else []
        if value is None:
            return []
        if option is None:  # a flag that is gone
            values = value if isinstance(value, list) else [] if value in (True, False) else [value]
            return off if value is False else [flag, *map(str, values)]
        if option.is_switch:
            return [flag] if self._truth() else off
        if option.kind.gather is not None:
            if isinstance(value, dict):
                method = [str(value["method"])] if "method" in value else []
                pairs = {key: item for key, item in value.items() if key != "method"}
                return [flag, *method, *(f"{key}={_revive(item)!r}" for key, item in pairs.items())]
            return [flag, *(self._text(item) for item in (value if isinstance(value, list) else str(value).split()))]
        if isinstance(value, list) and option.joined:
            value = option.joined.join(self._text(item) for item in value)
        elif isinstance(value, list) and option.nargs is not None:
            return [flag, *(self._expanded(item) for item in value)]
        return [f"{flag}={self._expanded(value)}"]

    def _expanded(self, value: Any) -> str:
        text = self._text(value)
        return _expand(text) if self.action.option.path else text

    def _truth(self) -> bool:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        truth = words.get(str(self.value).lower())
        if truth is None:
            raise UserError(f"{self.action.dest} must be true or false, not {self.value!r}.")
        return truth

    def _text(self, value: Any) -> str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        several = self.action.option.joined or self.action.option.nargs is not None
        single = "a single value (true, false and null need quotes where they are text)"
        expected = "a value or a list of values" if several else single
        raise UserError(f"{self.action.dest} cannot be {value!r}: it takes {expected}.")


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars stay text, but for true, false and null.

    The options know their own types, and YAML's guesses harm: it takes 1e-3 for text and 2024_01_01 for a number.
    """

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = _key(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(problem=f"{name} is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_PLAIN = {"bool": ("true|True|TRUE|false|False|FALSE", "tTfF"), "null": ("|~|null|Null|NULL", "~nN")}
for _tag, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), ["", *_first])


def read(
    file: Path,
    named: Mapping[str, argparse.Action],
    unknown: Callable[..., UserError],
    includers: tuple[Path, ...] = (),
) -> dict[str, Setting]:
    """Settings of a config file by option; its own win over those of the files it includes.

    A file may use the names in `named`; `unknown` makes the error for another one (`_Parser.unknown`).
    """
    if file.resolve() in includers:
        raise UserError(f"The config files include each other in a circle: {includers[-1]} includes {file} again.")
    content = _load(file)
    settings: dict[str, Setting] = {}
    includes = content.pop("include", None)
    for other in includes if isinstance(includes, list) else [includes] if includes else []:
        if not isinstance(other, str):
            raise UserError(f"{file}: include must be a file name or a list of file names.")
        try:
            path = file.parent / _expand(other)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        settings |= read(path, named, unknown, (*includers, file.resolve()))

    for key, value in content.items():
        if _key(key) not in named:
            raise unknown(str(key), "--" + str(key).replace("_", "-"), [*named, "include"], f" in {file}")
        action = named[_key(key)]
        settings[action.dest] = Setting(action, value, file)
    return settings


def _load(file: Path) -> dict[Any, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"Cannot read the config file {file}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"Cannot read the config file {file}: it is not UTF-8 text.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", "")
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"The config file {file} is not valid{where}: {problem}.") from None
    if not isinstance(content, (dict, type(None))):
        raise UserError(f"The config file {file} must be a mapping of options to values (batch-size: 64).")
    return content or {}


def _key(name: Any) -> str:
    return str(name).replace("-", "_")


_VARIABLE = re.compile(r"\$(?:([$~])|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def _expand(text: str) -> str:
    """Put in environment variables, and the home folder for `~` at the start of a source; `$$` and `$~` are literal."""

    def value(match: re.Match) -> str:
        name = match[2] or match[3]
        if name is not None and name not in os.environ:
            raise UserError(
                f"{text!r} uses the variable {name}, which is not set: export it (a plain $ is written $$)."
            )
        return match[1] or os.environ[name]

    sources = (os.path.expanduser(source) for source in text.split(SOURCE_SEPARATOR))
    return _VARIABLE.sub(value, SOURCE_SEPARATOR.join(sources))


def literal(text: str) -> Any:
    """A Python literal if the text is one, or true or false; else the text itself, so that words need no quotes."""
    try:
        return {"true": True, "false": False}[text] if text in ("true", "false") else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _revive(value: Any) -> Any:
    """A value of a key=value mapping in a config file, read as it would be on the command line."""
    if isinstance(value, list):
        return [_revive(item) for item in value]
    if isinstance(value, dict):
        return {key: _revive(item) for key, item in value.items()}
    return literal(value) if isinstance(value, str) else value


def plain(value: Any, path: bool) -> Any:
    """What a config file has to hold for an option to get this value."""
    if isinstance(value, dict):
        return {key: _plain_literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, path) for item in value]
    if not isinstance(value, (str, Path)):
        return value
    # The text of which `_expand` makes this one.
    parts = (re.sub("^~", "$~", part.replace("$", "$$")) for part in str(value).split(SOURCE_SEPARATOR))
    return SOURCE_SEPARATOR.join(parts) if path else str(value)


def _plain_literal(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain_literal(item) for item in value]
    if isinstance(value, str):
        return value if literal(value) == value else repr(value)
    # What YAML has no type for (a tuple, mostly) is written as Python writes it, which `_revive` reads.
    return value if isinstance(value, (bool, int, float, type(None))) else repr(value)
