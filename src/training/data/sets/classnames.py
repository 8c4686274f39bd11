"""Files that name classes and prompts."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from importlib import resources
from pathlib import Path

from ...errors import UserError
from .folders import check_folders, check_numbers
from .labelled import LabelledImages


def named(data: LabelledImages, path: Path) -> LabelledImages:
    """`data` with the class names of a file: one a line in the order of the classes, or lines `folder<TAB>name`.

    Raises:
        UserError: there are not as many as classes, or it is not clear which line is for which class.
    """
    lines = read_lines(path)
    folders = list(data.folders)
    words = [line.split(maxsplit=1)[0] for line in lines]
    if any("\t" in line for line in lines):
        if not folders:
            what = f"but the classes of {data.name} are no folders: write one name a line, in the order of the classes"
            raise UserError(f"{path} has tabs, as between a folder and its name, {what}.")
        lines = _by_folder(lines, folders, path, data.name)
    elif folders and _plain(lines) != _plain(folders) and sorted(_plain(lines)) == sorted(_plain(folders)):
        what = f"in another order than theirs, which starts with {folders[0]}: write lines of folder<TAB>name"
        raise UserError(f"{path} has the names of the class folders {what}.")
    elif folders and words != lines and set(words) == set(folders) and all(re.search("[0-9]", word) for word in words):
        raise UserError(f"{path} has lines that begin with a folder and a space: write lines of folder<TAB>name.")
    classes = len(folders or data.classnames)
    if classes and len(lines) != classes:
        kind = "class folders" if folders else "classes"
        raise UserError(f"{path} names {len(lines)} classes; {data.name} has {classes} {kind}.")
    check_numbers(data.images, data.labels, len(lines), path.name)
    return replace(data, classnames=lines)


def _by_folder(lines: list[str], folders: list[str], path: Path, data: str) -> list[str]:
    pairs = [[part.strip() for part in line.split("\t")] for line in lines]
    names = {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and all(pair)}
    if missing := [folder for folder in folders if folder not in names]:
        raise UserError(f"{path} has no line 'folder<TAB>name' for the class folder {missing[0]}.")
    if wrong := [line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2 or not all(pair)]:
        raise UserError(f"{path} has lines of folder<TAB>name, but {wrong[0]!r} is none.")
    check_folders(data, folders, list(names), path.name)
    (twice, count), *_ = Counter(pair[0] for pair in pairs).most_common(1)
    if count > 1:
        raise UserError(f"{path} names the folder {twice} twice; leave one line for each.")
    return [names[folder] for folder in folders]


def _plain(names: list[str]) -> list[str]:
    return [re.sub(r"[\W_]+", " ", name).strip().lower() for name in names]


def read_lines(path: Path) -> list[str]:
    """Stripped lines; blank ones are allowed at the end only, since a line's place says which class it is.

    Raises:
        UserError: there is nothing in it, a blank line in between, or it is not UTF-8.
    """
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
    """Prompts with {} for the class name, one a line; {c}, as CLIP_benchmark writes it, is the same.

    Raises:
        UserError: one has none, or more than that in braces.
    """
    templates = []
    for line in read_lines(path):
        template = line.replace("{c}", "{}")
        template = template if template.count("{}") < 2 else template.replace("{}", "{0}")
        try:
            works = template.format("a") != template.format("b")
        except (IndexError, KeyError, ValueError, AttributeError):
            works = False
        if not works:
            raise UserError(f"{path}: the template {line!r} must have {{}} where the class name goes.")
        templates.append(template)
    return templates


def packaged_lines(name: str) -> list[str]:
    """The entries of a file in `names/` of this package: its lines, without those that start with #."""
    text = resources.files(__package__).joinpath("names", name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]
