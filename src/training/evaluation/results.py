"""Finished work on disk: what it depends on, one JSON file each, and a summary of all of them as CSV and Markdown."""
from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pandas import DataFrame

from .. import checkpoint
from ..distributed import Ranks
from ..errors import UserError, reason
from ..files import check_folder, written_whole

VERSIONS = ("open_clip_elip", "open_clip_torch", "torch", "torchvision", "timm")
_FIRST_COLUMNS = ("command", "model", "pretrained", "data", "split")
_LAST_COLUMNS = ("weights", "date", "file")


def described_model(
    options: Any, identity: Any, weights_hash: str, transform: Any, tokenizer: Any = None
) -> dict[str, Any]:
    """Of a result's or a cached file's description, what makes features; `options`: an evaluation's."""
    # The identity tells transformers' tokenizers by name alone.
    pieces = getattr(tokenizer, "pieces", getattr(tokenizer, "tokenizer", None))  # ours, or open_clip's
    vocabulary = getattr(pieces, "backend_tokenizer", None)
    return {
        "model": options.model,
        "weights": weights_hash,
        "identity": digest_of([identity.to_dict(), vocabulary and vocabulary.to_str()]),
        "settings": {
            "precision": options.precision,
            "transform": re.sub(r" at 0x[0-9a-f]+", "", repr(transform)),
            "vision_guided_reduction": options.vision_guided_reduction,
        },
    }


def described_data(data: Any) -> dict[str, Any]:
    """Of a result's or a cached file's description, what the data are."""
    return {"data": data.name, "split": data.split, "data_fingerprint": data.fingerprint()}


def described(command: str, options: Any, model: dict[str, Any], data: Any, **settings: Any) -> dict[str, Any]:
    """All that a result depends on, as `Results` takes it: a `described_model`, data, the command's own settings."""
    settings = {**model["settings"], "on_broken": options.on_broken, **settings}
    work = {"command": command, "pretrained": options.pretrained}
    return {**work, **model, **described_data(data), "settings": settings}


def digest_of(what: Any) -> str:
    """16 hexadecimal digits of plain types."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left and the others to the right; `rows` begins with the headings."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ([row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


class Results:
    """The results in a folder, made with the first one; "none": nowhere. The main process reads and writes.

    `what` is a piece of work, all that its numbers depend on (see `described`); if it is equal, it is done again only
    with `redo`.
    """

    def __init__(self, folder: str | Path, ranks: Ranks, redo: bool = False):
        self.folder = None if str(folder).lower() == "none" else Path(folder)
        if self.folder is not None:
            check_folder(self.folder, "--results")
        self.ranks, self.redo = ranks, redo
        self.found: list[Path] = []

    def find(self, what: dict[str, Any]) -> dict[str, Any] | None:
        """The record of exactly this work, on every process; None if there is none, or with `redo`. Collective."""
        if self.folder is None or self.redo:
            return None
        path = self.folder / _file_name(what)
        record = self.ranks.broadcast(self.ranks.is_main and _read(path))
        self.found += [path] if record else []
        return record

    def shown(self, rows: Sequence[Sequence[str]], legend: str = "") -> str:
        """A `table` of numbers, its legend, and where those lie that were found."""
        found = [f"found, not evaluated again (--redo does it): {path}" for path in dict.fromkeys(self.found)]
        return "\n".join(filter(None, [table(rows), legend, *found]))

    def add(self, what: dict[str, Any], metrics: dict[str, float], info: dict[str, Any] | None = None) -> dict:
        """Writes a record (whole or not at all) and the summaries anew; returns it. info: what else to keep."""
        versions = {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS}}
        record = {**what, "metrics": metrics, **(info or {}), "versions": versions, "date": time.strftime("%F %T%z")}
        if self.folder is not None and self.ranks.is_main:
            of_averages = ", averaged weights" if what["settings"].get("averaged") else ""
            logging.info(f"{what['data']}{of_averages}: {json.dumps(metrics)}")  # a full disk loses what took hours
            _write(self.folder / _file_name(what), json.dumps(record, indent=2) + "\n")
            self._summarise()
        return record

    def _summarise(self) -> None:
        rows = []
        for path in sorted(self.folder.glob("*.json")):
            if record := _read(path):
                own = {name: record.get(name) for name in (*_FIRST_COLUMNS, *_LAST_COLUMNS)}
                rows.append({**own, **record["metrics"], "file": path.name})
        metrics = dict.fromkeys(name for row in rows for name in row if name not in _LAST_COLUMNS)
        columns = [*metrics, *_LAST_COLUMNS]
        _write(self.folder / "summary.csv", DataFrame(rows, columns=columns, dtype=object).to_csv(index=False))
        lines = [columns, ["---"] * len(columns), *([_shown(row.get(name)) for name in columns] for row in rows)]
        _write(self.folder / "summary.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))

    def kept(self, path: Path | None, flag: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, tensors and plain types; from `path` if it is there and whole, else it is put there.

        A collective call. A UserError names `flag` if it cannot be written.
        """
        found = None
        if path is not None and self.ranks.is_main and path.is_file() and not self.redo:
            with suppress(UserError):  # cut off
                found = checkpoint.load(path)
                logging.info(f"using {path}")
        found = self.ranks.broadcast(found)
        if found is not None:
            return found
        made = make()
        with self.ranks.agree():
            if path is not None and self.ranks.is_main:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    checkpoint.save(made, path)
                except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
                    raise UserError(f"{path} cannot be written ({reason(error)}); give another {flag}.") from None
        return made


def _file_name(what: dict[str, Any]) -> str:
    words = [str(what.get(name) or "") for name in ("command", "model", "data", "split")]
    words = [re.sub(r"[^\w.-]+", "_", Path(word).name)[:40] for word in words if word]
    return "-".join([*words, digest_of(what)[:12]]) + ".json"


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None for a file that is absent or is not one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if isinstance(record["metrics"], dict) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); free space there or change --results.") from None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _shown(value: Any) -> str:
    text = "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
