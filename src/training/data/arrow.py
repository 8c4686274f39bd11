"""METER's Arrow files: in each row a picture, encoded, and the captions, questions or sentences that go with it."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import UserError, reason

ENDING = ".arrow"
LABELS = ("contradiction", "neutral", "entailment")  # of SNLI-VE, by number


class LeftOut(str):
    """Why an item is left out, in a few words; it is counted."""


class ArrowFile:
    """A file, mapped into memory; another process maps it anew.

    Raises: UserError if it is not there or not whole, not in Arrow's file format, empty, or holds several splits.
    """

    def __init__(self, path: str, flag: str):
        self.path, self.flag, self.table = path, flag, _mapped(path, flag)
        self.columns = self.table.column_names
        if not len(self.table):
            raise UserError(f"{flag} {path} has no rows; fetch it again.")
        splits = self.table["split"].unique().to_pylist() if "split" in self.columns else []
        if len(splits) > 1:
            raise UserError(f"{flag} {path} holds the splits {', '.join(map(str, splits))}; write a file for each.")
        self.pictures = ("image_0", "image_1") if "image_0" in self.columns else ("image",)  # NLVR2 has two

    def __reduce__(self) -> tuple:
        return ArrowFile, (self.path, self.flag)

    def picture(self, row: int, column: str = "image") -> bytes:
        return self.table[column][row].as_py() or b""

    def rows(self, *names: str) -> Iterator[list[list[Any]]]:
        """Of each row, what it has in these columns: lists that are equally long. All but the first may be empty.

        Raises: UserError for another form, and where a column is missing.
        """
        missing = [name for name in (*self.pictures, *names) if name not in self.columns]
        if missing:
            there = ", ".join(self.columns)
            raise UserError(f"{self.flag} {self.path} has no column {missing[0]!r}, only {there}: see docs/data.md.")
        for name in self.pictures:
            if (kind := str(self.table[name].type)) not in ("binary", "large_binary"):
                wrong = f"has {kind} in the column {name!r}, not encoded pictures"
                raise UserError(f"{self.flag} {self.path} {wrong}: see docs/data.md.")
        for row, values in enumerate(zip(*(self.table[name].to_pylist() for name in names), strict=True)):
            lists = [[] if value is None else value for value in values]
            if not all(isinstance(one, list) for one in lists):
                raise UserError(f"Row {row} of {self.path} cannot be used: {' or '.join(names)} is not a list.")
            lists = [one or [[]] * len(lists[0]) for one in lists]  # as there are no answers to the questions of a test
            if len({len(one) for one in lists}) > 1:
                lengths = ", ".join(f"{len(one)} {name}" for one, name in zip(lists, names, strict=True))
                raise UserError(f"Row {row} of {self.path} cannot be used: it has {lengths}.")
            yield lists

    def captions(self) -> Iterator[list[str]]:
        """Of each row, in their order, equal ones once."""
        for row, (captions,) in enumerate(self.rows("caption")):
            if not all(isinstance(one, str | None) for one in captions):
                raise UserError(f"Row {row} of {self.path} cannot be used: caption is not a list of texts.")
            yield list(dict.fromkeys(one or "" for one in captions))


class StoredPicture(NamedTuple):
    """A picture in a file, which is read when this is called."""

    file: ArrowFile
    row: int
    column: str

    def __call__(self) -> bytes:
        return self.file.picture(self.row, self.column)

    def __str__(self) -> str:
        return f"{self.file.path}, row {self.row}"


def read_arrow(path: str, flag: str) -> Iterator[tuple[dict[str, Any] | LeftOut, tuple[StoredPicture, ...]]]:
    """The items of a file, each as a JSON list has it, with its pictures. Raises: UserError."""
    file = ArrowFile(path, flag)
    ids = file.table["image_id"].to_pylist() if "image_id" in file.columns else None
    for row, items in enumerate(_rows_of_items(file)):
        pictures = tuple(StoredPicture(file, row, column) for column in file.pictures)
        names = [str(picture) for picture in pictures]
        common = {"image": names[0], "images": names, "image_id": names[0] if ids is None else ids[row]}
        for item in items:
            yield (item if isinstance(item, LeftOut) else common | item), pictures


def _rows_of_items(file: ArrowFile) -> Iterator[list[dict[str, Any] | LeftOut]]:
    names = dict(enumerate(LABELS))
    if "image_0" in file.columns:  # NLVR2
        for row in file.rows("questions", "answers"):
            yield [{"sentence": sentence, "label": label} for sentence, label in zip(*row, strict=True)]
    elif "sentences" in file.columns:  # SNLI-VE: premise and hypothesis
        for row in file.rows("sentences", "labels"):
            yield [
                {"sentence": pair[1] if isinstance(pair, list) and len(pair) == 2 else None, "label": names.get(label)}
                for pair, label in zip(*row, strict=True)
            ]
    elif "questions" in file.columns:
        for row in file.rows("questions", "question_id", "answers", "answer_scores"):
            yield [
                {"question": question, "question_id": number, "answer_scores": _scored(answers, scores)}
                for question, number, answers, scores in zip(*row, strict=True)
            ]
    else:
        for captions in file.captions():
            yield [{"caption": one} if one.strip() else LeftOut("caption without text") for one in captions]


def _scored(answers: list[str], scores: list[float]) -> dict[str, float] | None:
    fit = isinstance(answers, list) and isinstance(scores, list) and len(answers) == len(scores)
    return dict(zip(answers, scores, strict=True)) if fit else None


def _mapped(path: str, flag: str) -> Any:
    """A pyarrow.Table whose buffers are the file."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{flag} {path} needs pyarrow; pip install 'open_clip_elip[arrow]' brings it.") from None
    start = b""
    try:
        with open(path, "rb") as file:
            start = file.read(6)
        if not start:
            raise UserError(f"{flag} {path} is empty; fetch it again.")
        if start.startswith(b"\xff" * 4):
            raise UserError(f"{flag} {path} is in Arrow's stream format; write it with pyarrow.ipc.new_file.")
        return pyarrow.ipc.open_file(pyarrow.memory_map(path)).read_all()
    except FileNotFoundError:
        raise UserError(f"{flag} {path} does not exist; correct the path.") from None
    except (OSError, pyarrow.ArrowException) as error:
        what = "is cut off or damaged" if start == b"ARROW1" else "cannot be read as an Arrow file"
        raise UserError(f"{flag} {path} {what} ({reason(error)}); fetch it again.") from None
