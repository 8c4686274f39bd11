"""One parser for all commands. Options are dataclasses, put together from sections; a command adds and never refuses.

    @dataclass
    class DataOptions(Section, title="training data"):
        train_data: str | None = option(None, "Shards, or a CSV file.", metavar="FILE", path=True)

    @dataclass
    class PretrainingOptions(DataOptions, ..., command="training.main"):
        epochs: int = 32  # another default than its section's

    options = parse(PretrainingOptions, ["--train-data", "x.tar"])

Every setting of a config file goes through the same parser as a flag, so both are checked alike and a flag wins.
"""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from ..errors import UserError
from . import config_file

COMMANDS: dict[str, type[Section]] = {}  # by module, of those that were imported
MODULES = ("main", "finetune", "zero_shot", "linear_probe", "retrieval")  # imported to say where a flag belongs


@dataclass
class Section:
    """Options that belong together, under a `title` of the help page; or all options of the module `command`.

    Attributes:
        gone: flags that are known only to say, behind their name, what to use instead. "{value}" is what was given.
    """

    title: ClassVar[str] = ""
    gone: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, title: str = "", command: str = ""):
        cls.title, cls.command = title, command
        if command:
            COMMANDS[command] = cls

    def check(self) -> None:
        """Raises UserError for what one option alone cannot tell. `parse` calls that of each section."""


@dataclass(frozen=True)
class Kind:
    """What an option takes.

    Attributes:
        convert: from a word to a value; ArgumentTypeError says what it must be.
        metavar: a word, on the help page.
        gather: from the values of several words to that of the option; None takes the list as it is.
    """

    convert: Callable[[str], Any] = str
    metavar: str = "TEXT"
    gather: Callable[[list], Any] | None = None


def numbers(kind: type, allowed: Callable[[Any], bool], phrase: str) -> Kind:
    """Finite numbers for which `allowed` holds."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (abs(value) < math.inf and allowed(value)):
            raise argparse.ArgumentTypeError(f"must be {phrase}, not {text!r}")
        return value

    return Kind(convert, "N" if kind is int else "X")


COUNT = numbers(int, lambda v: v >= 0, "a whole number of at least 0")
POSITIVE_COUNT = numbers(int, lambda v: v >= 1, "a whole number of at least 1")
SEED = numbers(int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 2**32 - 1")
NUMBER = numbers(float, lambda v: True, "a number")
NOT_NEGATIVE = numbers(float, lambda v: v >= 0, "a number of at least 0")
POSITIVE = numbers(float, lambda v: v > 0, "a number above 0")
FRACTION = numbers(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
FRACTION_BELOW_1 = numbers(float, lambda v: 0 <= v < 1, "a number from 0 to 1, below 1")
FRACTION_ABOVE_0 = numbers(float, lambda v: 0 < v <= 1, "a number from 0 to 1, above 0")
TEXT, FILE, SWITCH = Kind(), Kind(Path, "FILE"), Kind(metavar="")  # a switch is --x and --no-x


def one_of(*names: str) -> Kind:
    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, not {text!r}")
        return text

    return Kind(convert, "{" + ",".join(names) + "}")


def key_values(words: list[str]) -> dict[str, Any]:
    """`a=1 b=[2,3] c=word` as {"a": 1, "b": [2, 3], "c": "word"}."""
    pairs = [word.partition("=") for word in words]
    for word, (key, equals, _) in zip(words, pairs, strict=True):
        if not (key and equals):
            raise argparse.ArgumentTypeError(f"must be given as key=value, not {word!r}")
    return {key: config_file.literal(text) for key, _, text in pairs}


@dataclass(frozen=True)
class Option:
    """What a section says of one of its options.

    Attributes:
        metavar, nargs: as argparse has them.
        path: names files or folders: in a config file, `~` and environment variables are expanded.
        joined: what makes one text of the several that a config file may list.
        spellings: other flags for the same.
    """

    help: str
    kind: Kind
    metavar: str | None = None
    nargs: int | str | None = None
    path: bool = False
    joined: str = ""
    spellings: tuple[str, ...] = ()

    @property
    def is_switch(self) -> bool:
        return self.kind is SWITCH


def option(default: Any, help: str, kind: Kind | None = None, **more: Any) -> Any:
    """A field of a section, and a flag: an `Option`; without `kind` a switch if the default is a bool, else text."""
    metadata = {"option": Option(help, kind or (SWITCH if isinstance(default, bool) else TEXT), **more)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=partial(copy, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


T = TypeVar("T", bound=Section)


def parse(options: type[T], argv: Sequence[str], *, given: Mapping[str, Any] | None = None, about: str = "") -> T:
    """Options of one run, complete and checked; nothing is read but the config files.

    Args:
        given: settings by name, over which config files and flags win.
        about: the command, for its help page.

    Raises:
        UserError: an unknown option, a value out of range, options that exclude each other, a bad config file.
    """
    parser = _Parser(options, about)
    # Alone first: the command line's own mistakes are then never blamed on a config file.
    files = getattr(parser.read(argv, argparse.Namespace()), "config", [])
    given = given or {}
    settings = {name: config_file.Setting(parser.named[name], given[name], "What was given") for name in given}
    for file in files:
        settings |= config_file.read(Path(file), parser.named, parser.unknown)
    values = argparse.Namespace()
    for setting in settings.values():
        try:
            parser.read(setting.words(), values)
        except UserError as error:
            raise UserError(f"{setting.file}: {error}") from None
    parser.read(argv, values)
    vars(values).pop("config", None)
    complete = options(**vars(values))
    for section in options.__mro__:
        if "check" in vars(section):
            section.check(complete)
    return complete


def resolved(options: Section) -> dict[str, Any]:
    """All options as plain types (None, bool, int, float, str, list, dict).

    Written as YAML and given to `--config`, it makes `parse` return the same options.
    """
    found = _declared(type(options))
    return {name: config_file.plain(getattr(options, name), option.path) for name, option, _, _ in found}


def forbid(wrong: bool, sentence: str) -> None:
    if wrong:
        raise UserError(sentence)


def _declared(options: type[Section]) -> Iterator[tuple[str, Option, Any, str]]:
    """Name, option, default and section's title of each option, in the order of the help page."""
    sections = [section for section in options.__mro__ if issubclass(section, Section)]
    lineage = {section: {field.name: field for field in dataclasses.fields(section)} for section in sections}
    for section in sections:
        for name in lineage[section] if section.title else ():
            having = [other for other in sections if name in lineage[other]]
            if having[-1] is section:
                fields = [lineage[other][name] for other in having]
                default = fields[0].default
                default = fields[0].default_factory() if default is dataclasses.MISSING else default
                yield name, next(f.metadata["option"] for f in fields if f.metadata), default, section.title


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Action(argparse.Action):
    """Takes the words of an option; or, where that is None, says what to use instead of a flag that is gone."""

    option: Option | None = None
    gone: str = ""

    def __call__(self, parser, namespace, values, option_string=None):
        if self.option is None:
            value = ",".join(values) or str(not option_string.startswith("--no-")).lower()
            raise UserError(f"{option_string} {self.gone.format(value=value)}.")
        if self.option.is_switch:
            values = option_string == self.option_strings[0] or not option_string.startswith("--no-")
        elif self.option.kind.gather is not None:
            try:
                values = self.option.kind.gather(values)
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """Every complaint is a `UserError`."""

    def __init__(self, options: type[Section], about: str = ""):
        self.command = options.command
        super().__init__(
            usage=f"torchrun --nproc_per_node N -m {self.command} [options]\n       python -m {self.command} [options]",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="docs/flags.md: what differs from OpenCLIP's options, and what a config file may hold.",
            allow_abbrev=False,  # a shortened flag could change its meaning whenever a new flag is added
            argument_default=argparse.SUPPRESS,  # the dataclass has the defaults
        )
        self.named: dict[str, _Action] = {}  # what a config file may set
        self.flags: dict[str, str] = {}  # the section's title of each
        help = "Read options from a YAML file. Flags win over it; of several files, later ones win."
        groups = {"": self.add_argument_group("configuration")}
        groups[""].add_argument("--config", metavar="FILE.yaml", action="append", help=help)
        for name, option, default, title in _declared(options):
            groups[title] = groups.get(title) or self.add_argument_group(title)
            self._add(groups[title], name, option, default)
            self.flags |= dict.fromkeys(self.named[name].option_strings, title)
        for section in reversed(options.__mro__):
            for name, reason in vars(section).get("gone", {}).items():
                flags = [_flag(name), _flag("no_" + name)] if "{value}" in reason else [_flag(name)]
                action = self.add_argument(*flags, dest=name, action=_Action, nargs="*", help=argparse.SUPPRESS)
                self.named[name], action.gone = action, reason

    def _add(self, group, name: str, option: Option, default: Any) -> None:
        help, flags, kwargs = option.help, [_flag(name), *option.spellings], {"nargs": 0}
        if default is True:
            help += " Default: on."
        elif default not in (None, "", [], {}) and default is not False:
            help += f" Default: {default!r}." if isinstance(default, str) else f" Default: {default}."
        if not option.is_switch:
            kind = option.kind
            kwargs = {"metavar": option.metavar or kind.metavar, "type": kind.convert, "nargs": option.nargs}
        elif not name.startswith("no_"):
            flags += ["--no-" + flag.removeprefix("--") for flag in flags]
        action = group.add_argument(*flags, dest=name, action=_Action, help=help.replace("%", "%%"), **kwargs)
        action.option = option
        for spelling in (name, *option.spellings):
            self.named[spelling.removeprefix("--").replace("-", "_")] = action

    def read(self, words: Sequence[str], into: argparse.Namespace) -> argparse.Namespace:
        """Parse into a namespace, whose attributes lose to `words`."""
        args, rest = self.parse_known_args(words, into)
        for flag in (word.partition("=")[0] for word in rest if word.startswith("-")):
            raise self.unknown(flag, flag, [*self.flags, "--config", "--help"])
        if rest:
            raise UserError(f"Unexpected word {rest[0]!r} on the command line: every option starts with --.")
        return args

    def unknown(self, name: str, flag: str, known: Iterable[str], where: str = "") -> UserError:
        """The error for a `flag` that this command does not have; `name` and `known` are as they are written there."""
        for module in MODULES:
            importlib.import_module(f"training.{module}")
        others = {command: _Parser(other).flags for command, other in COMMANDS.items() if command != self.command}
        owners = [f"{command} ({flags[flag]})" for command, flags in others.items() if flag in flags]
        if owners:
            return UserError(f"{flag}{where} is an option of {', '.join(owners)}, not of {self.command}.")
        close = difflib.get_close_matches(name, list(known), n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists all options."
        return UserError(f"Unknown option {name}{where}; {hint}")

    def error(self, message: str) -> NoReturn:
        about = re.fullmatch(r"argument (--[\w-]+)\S*: (.*)", message, re.DOTALL)
        if about is None:
            raise UserError(message)
        flag, problem = about.groups()
        problem = problem.replace("expected one argument", "needs a value")
        problem = problem.replace("expected at least one argument", "needs at least one value")
        problem = problem.replace("ignored explicit argument", "takes no value, but was given")
        raise UserError(f"{flag} {problem}.")
