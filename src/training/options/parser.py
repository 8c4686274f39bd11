"""One parser for all commands. Options are dataclasses, put together from sections; a command adds and never refuses.

    @dataclass
    class DataOptions(Section, title="training data"):
        train_data: str | None = option(None, "Shards, or a CSV file.", metavar="FILE", path=True)

    @dataclass
    class PretrainingOptions(DataOptions, ..., command="training.main"):
        epochs: int = 32  # another default than its section's

    options = parse(PretrainingOptions, ["--train-data", "x.tar"])

Flags and the settings of config files are both brought to (option, words), and read from there; a flag wins.
"""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import logging
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

from ..errors import UserError
from . import config_file
from .kinds import FILE, SWITCH, TEXT, Kind

COMMANDS: dict[str, type[Section]] = {}  # by module, of those that were imported
# Imported to say where a flag belongs.
MODULES = ("main", "finetune", "downstream", "zero_shot", "linear_probe", "retrieval", "caption")


@dataclass
class Section:
    """Options that belong together, under a `title` of the help page; or all options of the module `command`.

    Attributes:
        gone: flags that are known only to say, behind their name, what to use instead. "{value}" is what was given.
        declared: all options by name, those that are gone too.
    """

    command: ClassVar[str] = ""
    gone: ClassVar[Mapping[str, str]] = {}
    declared: ClassVar[dict[str, Option]] = {}

    def __init_subclass__(cls, title: str = "", command: str = "", needs: str = ""):
        cls.command = command
        bases = [getattr(base, "declared", {}) for base in cls.__bases__]
        cls.declared = {name: option for declared in bases for name, option in declared.items()}
        for name, value in vars(cls).items():
            inherited = cls.declared.get(name)
            if isinstance(value, dataclasses.Field):
                option = value.metadata["option"]
                section, need = (inherited.title, inherited.needs) if inherited else (title, needs)
                need = need if option.needs is None else option.needs
                cls.declared[name] = replace(option, name=name, title=section, needs=need)
            elif inherited:  # another default
                cls.declared[name] = replace(inherited, default=value)
        for name, reason in vars(cls).get("gone", {}).items():
            cls.declared[name] = Option(None, "", nargs="*", name=name, gone=reason)
        if command:
            COMMANDS[command] = cls

    def check(self) -> None:
        """Raises UserError for what one option alone cannot tell. `parse` calls that of each section."""


@dataclass(frozen=True)
class Option:
    """What a section says of one of its options."""

    default: Any
    help: str
    kind: Kind = TEXT
    metavar: str | None = None
    nargs: tuple[int, ...] | str | None = None  # as argparse has it, or the numbers of words that it may take
    path: bool = False  # names files or folders: in a config file, `~` and environment variables are expanded
    joined: str = ""  # what makes one text of the several that a config file may list
    spellings: tuple[str, ...] = ()  # other flags for the same
    needs: str | None = None  # what it has no effect without, see `_holds`; None: what its section says
    name: str = ""
    title: str = ""
    gone: str = ""

    @property
    def flags(self) -> dict[str, list[str]]:
        """Its flags, each with the words that it brings along: those of a switch say true or false."""
        flags = [_flag(self.name), *self.spellings]
        switch = self.kind is SWITCH or "{value}" in self.gone
        off = {"--no-" + flag[2:]: ["false"] for flag in flags if switch and not self.name.startswith("no_")}
        return dict.fromkeys(flags, ["true"] if self.kind is SWITCH else []) | off

    @property
    def counts(self) -> Sequence[int]:
        """How many words it may take."""
        least = int(self.nargs == "+" and self.default != [])  # a list may be told to be empty, as it is without a flag
        return {None: (1,), "+": range(least, sys.maxsize), "*": range(sys.maxsize)}.get(self.nargs, self.nargs)

    def words(self, value: Any) -> list[str]:
        """The words of a command line that say the same as a value of a config file."""
        mapping, several = self.kind.gather is not list, self.nargs or self.joined
        if mapping and isinstance(value, dict):
            return [f"{key}={item}" for key, item in value.items()]
        if mapping and isinstance(value, str):
            value = value.split()
        texts = value if several and isinstance(value, list) else [value]
        if not all(isinstance(text, (str, int, float)) for text in texts):
            takes = "a value or a list of values" if several else "a single value"
            raise UserError(f"{self.name} cannot be {value!r}: it takes {takes}.")
        texts = [self.joined.join(map(str, texts))] if self.joined else map(str, texts)
        return [config_file.expand(text) if self.path else text for text in texts]

    def read(self, words: list[str], flag: str = "") -> Any:
        """The value that words say; else UserError, which begins with the flag."""
        flag = flag or _flag(self.name)
        if self.gone:
            raise UserError(f"{flag} {self.gone.format(value=','.join(words) or 'true')}.")
        if self.path and self.default is None and words == [""]:
            return None  # as a script leaves it whose variable is empty
        if len(words) not in self.counts:
            several = isinstance(self.nargs, tuple)
            raise UserError(f"{flag} needs {' or '.join(map(str, self.nargs)) + ' values' if several else 'a value'}.")
        try:
            values = [self.kind(word) for word in words]
            return self.kind.gather(values) if self.nargs else values[0]
        except ValueError as error:
            raise UserError(f"{flag} {error}.") from None


CONFIG = Option(
    None, "Read options from a YAML file, or a recipe by name. Flags win over it; of several files, later ones win.",
    FILE, "FILE.yaml|RECIPE", name="config", title="configuration")  # fmt: skip


def option(default: Any, help: str, kind: Kind | None = None, **more: Any) -> Any:
    """A field of a section, and a flag: an `Option`; without `kind` a switch if the default is a bool, else text."""
    found = Option(default, help, kind or (SWITCH if isinstance(default, bool) else TEXT), **more)
    mutable = isinstance(default, (list, dict))
    start = {"default_factory": partial(copy, default)} if mutable else {"default": default}
    return dataclasses.field(**start, metadata={"option": found})


T = TypeVar("T", bound=Section)


def parse(options: type[T], argv: Sequence[str], *, given: Mapping[str, Any] | None = None, about: str = "") -> T:
    """Options of one run, complete and checked, or UserError; nothing is read but the config files.

    Args:
        given: settings by name, over which config files and flags win.
        about: the command, for its help page.
    """
    if "--help" in argv or "-h" in argv:
        print(_help(options, about), end="")
        raise SystemExit(0)
    # The command line first: its own mistakes are then never blamed on a config file.
    line = [(option, option.read(words, flag)) for option, flag, words in _line(options, argv)]
    settings = {name: ("What was given", value) for name, value in (given or {}).items()}
    names = {_key(flag): option.name for flag, (option, words) in _flags(options).items() if words != ["false"]}
    for file in (value for option, value in line if option is CONFIG):
        for origin, key, value in config_file.read(config_file.find(file)):
            if _key(key) not in names:
                raise _unknown(options, key, [*names, "include"], f" in {origin}")
            if settings.get(names[_key(key)], (None,))[0] is origin:
                raise UserError(f"{origin}: {key} is given twice, once by another spelling.")
            settings[names[_key(key)]] = origin, value
    values = {}
    for name, (origin, value) in settings.items():
        option = options.declared[name]
        try:
            values |= {name: option.read(option.words(value))} if value is not None else {}
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None
    complete = options(**values | {option.name: value for option, value in line if option is not CONFIG})
    for section in options.__mro__:
        if "check" in vars(section):
            section.check(complete)
    _tell_idle(complete, [*values, *(option.name for option, _ in line if option is not CONFIG)])
    return complete


def resolved(options: Section) -> dict[str, Any]:
    """All options as YAML's own types; written to a file and given to `--config`, they make the same options."""
    shown = [option for option in options.declared.values() if not option.gone]
    return {option.name: config_file.plain(getattr(options, option.name), option.path) for option in shown}


def _tell_idle(options: Section, given: Collection[str]) -> None:
    """Warns of options that were given another value than their default, and have no effect beside the others."""
    idle: dict[str, list[str]] = {}
    for option in (option for name, option in options.declared.items() if name in given):
        unmet = next((need for need in option.needs.split() if not _holds(options, need)), None)
        default = replace(options, **{option.name: option.default})
        if unmet and getattr(options, option.name) != getattr(default, option.name):
            idle.setdefault(unmet, []).append(_flag(option.name))
    for need, flags in idle.items():
        names, _, values = need.removeprefix("!").partition("=")
        words = [_flag(name) if name in options.declared else name.replace("_", " ") for name in names.split("|")]
        there = f"{' or '.join(words)} {values.replace('|', ' or ')}".strip().replace("trains", "training")
        logging.warning(f"{', '.join(flags)}: no effect {'with' if need[0] == '!' else 'without'} {there}.")


def _holds(options: Section, need: str) -> bool:
    """Whether options have what is needed: "one|other" has a value, "name=this|that" is one of them, "!..." neither."""
    names, equals, values = need.removeprefix("!").partition("=")
    found = [getattr(options, name, True) for name in names.split("|")]
    holds = bool({*str(found[0]).lower().split(",")} & {*values.split("|")}) if equals else any(found)
    return holds != need.startswith("!")


def forbid(wrong: bool, sentence: str) -> None:
    if wrong:
        raise UserError(sentence)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _key(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _flags(options: type[Section]) -> dict[str, tuple[Option, list[str]]]:
    """Option by flag, with the words that the flag brings along."""
    return {flag: (option, words) for option in options.declared.values() for flag, words in option.flags.items()}


def _line(options: type[Section], argv: Sequence[str]) -> list[tuple[Option, str, list[str]]]:
    """What a command line says: option, flag and words, in its order."""
    flags = _flags(options) | {"--config": (CONFIG, [])}
    said: list[tuple[Option, str, list[str]]] = []
    room = 0  # for more words of the last flag
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag in flags:
            option, words = flags[flag]
            if equals and option.kind is SWITCH:
                raise UserError(f"{flag} takes no value, but was given {value!r}.")
            said.append((option, flag, [*words, value] if equals else [*words]))
            room = 0 if equals or words else option.counts[-1]
        elif re.fullmatch(r"-[^\d.\s]\S*", word):
            raise _unknown(options, flag, [*flags, "--help"])
        elif room:
            said[-1][2].append(word)
            room -= 1
        else:
            raise UserError(f"Unexpected word {word!r} on the command line: every option starts with --.")
    return said


def _unknown(options: type[Section], name: str, known: Sequence[str], where: str = "") -> UserError:
    """The error for a name that is none of the `known`."""
    for module in MODULES:
        importlib.import_module(f"{__package__}.{module}")
    flag = _flag(_key(name))
    others = {command: _flags(other) for command, other in COMMANDS.items() if other is not options}
    titles = {command: flags[flag][0].title for command, flags in others.items() if flag in flags}
    owners = [f"{command} ({title})" for command, title in titles.items() if title]  # those that are gone have none
    if owners:
        return UserError(f"{flag}{where} is an option of {', '.join(owners)}, not of {options.command}.")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "--help lists all options."
    return UserError(f"Unknown option {name}{where}; {hint}")


def _help(options: type[Section], about: str) -> str:
    """The help page, which argparse lays out."""
    command = options.command
    page = argparse.ArgumentParser(
        usage=f"torchrun --nproc_per_node N -m {command} [options]\n       python -m {command} [options]",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="docs/flags.md: what differs from OpenCLIP's options, and what a config file may hold.",
    )
    shown = [CONFIG, *(option for option in options.declared.values() if not option.gone)]
    groups = {title: page.add_argument_group(title) for title in dict.fromkeys(option.title for option in shown)}
    for option in shown:
        default, text = option.default, option.help.replace("%", "%%")
        if default not in (None, "", [], {}) and default is not False:
            text += f" Default: {'on' if default is True else repr(default)}."
        several = "+" if isinstance(option.nargs, tuple) else option.nargs
        words = {"metavar": option.metavar or option.kind.metavar, "nargs": several}
        takes = {"action": "store_true"} if option.kind is SWITCH else words
        groups[option.title].add_argument(*option.flags, help=text, **takes)
    return page.format_help()
