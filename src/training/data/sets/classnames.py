"""Files that name classes and prompts."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

from ...errors import UserError
from .folders import check_folders, check_numbers
from .labelled import LabelledImages

_CODE = re.compile(r"""\[.*|lambda\b.*|(["']).*\1,?""")  # a list, a function or a text of a program


def named(data: LabelledImages, path: Path) -> LabelledImages:
    """`data` with the class names of a file: one a line in the order of the classes, or lines `folder<TAB>name`.

    Raises: UserError if there are not as many as classes, or it is not clear which line is for which class.
    """
    lines, folders = read_lines(path), list(data.folders)
    words = [re.split(r"[\s,;:|]", line)[0] for line in lines]
    known = [sorted(folders), *(sorted(map(str, range(first, first + len(lines)))) for first in (0, 1))]
    if any("\t" in line for line in lines):
        if not folders:
            what = f"but the classes of {data.name} are no folders: write one name a line, in the order of the classes"
            raise UserError(f"{path} has tabs, as between a folder and its name, {what}.")
        lines = _by_folder(lines, folders, path, data.name)
    elif folders and _plain(lines) != _plain(folders) and sorted(_plain(lines)) == sorted(_plain(folders)):
        what = f"in another order than theirs, which starts with {folders[0]}: write lines of folder<TAB>name"
        raise UserError(f"{path} has the names of the class folders {what}.")
    elif words != lines and sorted(words) in known and all(re.search("[0-9]", word) for word in words):
        what = "a folder or a number and no tab: write lines of folder<TAB>name, or the names alone"
        raise UserError(f"{path} has lines that begin with {what}.")
    classes = len(folders or data.classnames)
    if classes and len(lines) != classes:
        kind = "class folders" if folders else "classes"
        raise UserError(f"{path} names {len(lines)} classes; {data.name} has {classes} {kind}.")
    check_numbers(data.images, data.labels, len(lines), path.name)
    if twice := [name for place, name in enumerate(lines) if name in lines[:place]]:
        logging.warning(f"{path} has {twice[0]!r} for two classes: all pictures are taken for the first of them.")
    return replace(data, classnames=lines)


def _by_folder(lines: list[str], folders: list[str], path: Path, data: str) -> list[str]:
    names: dict[str, str] = {}
    for line in lines:
        folder, name, *more = [part.strip() for part in f"{line}\t".split("\t")]
        if not name or any(more):
            raise UserError(f"{path} has lines of folder<TAB>name, but {line!r} is none.")
        if folder in names:
            raise UserError(f"{path} names the folder {folder} twice; leave one line for each.")
        names[folder] = name
    check_folders(data, folders, list(names), path.name)
    return [names[folder] for folder in folders]


def _plain(names: list[str]) -> list[str]:
    return [re.sub(r"[\W_]+", " ", name).strip().lower() for name in names]


def read_lines(path: Path) -> list[str]:
    """Stripped lines of UTF-8; blank ones are allowed at the end only, since a line's place says which class it is."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    if lines == [""]:
        raise UserError(f"{path} is empty; write one entry a line.")
    if "" in lines:
        raise UserError(f"{path} has nothing on line {lines.index('') + 1}; write one entry a line.")
    return lines


def read_templates(path: Path) -> list[str]:
    """Prompts with {} for the class name and nothing else in braces, one a line; CLIP_benchmark's {c} is the same."""
    templates = []
    for line in read_lines(path):
        template = line.replace("{c}", "{}")
        template = template if template.count("{}") < 2 else template.replace("{}", "{0}")
        try:
            works = template.format("a") != template.format("b")
        except (IndexError, KeyError, ValueError, AttributeError):
            works = False
        if _CODE.fullmatch(line):
            raise UserError(f"{path}: the template {line!r} is code; write prompts as they are, one a line.")
        if not works:
            raise UserError(f"{path}: the template {line!r} must have {{}} where the class name goes.")
        templates.append(template)
    return templates


def packaged_lines(name: str) -> list[str]:
    """The entries of a file in `names/` of this package: its lines, without those that start with #."""
    text = resources.files(__package__).joinpath("names", name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]
