"""Finished work on disk: one JSON file each, and a summary of all of them as CSV and Markdown."""
from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import platform
import re
import time
from pathlib import Path
from typing import Any

from ..distributed import Ranks
from ..errors import UserError
from ..files import written_whole

VERSIONS = ("open_clip_elip", "open_clip_torch", "torch", "torchvision", "timm")
_FIRST_COLUMNS = ("command", "model", "pretrained", "data", "split")
_LAST_COLUMNS = ("weights", "date", "file")


class Results:
    """The results in a folder. Only the main process reads and writes; the others are told.

    A piece of work is described by `what`, a dict of plain types: "command", "model", "pretrained", "weights", "data",
    "split", "data_fingerprint", "settings", ... Equal descriptions are the same work.

    Args:
        folder: made when the first result is added; None writes nothing.
        ranks: this process among the others.
        redo: do finished work again.

    Raises:
        UserError: `folder` is a file.
    """

    def __init__(self, folder: Path | None, ranks: Ranks, redo: bool = False):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"--results {folder} is a file; name a folder.")
        self.folder, self.ranks, self.redo = folder, ranks, redo

    def find(self, what: dict[str, Any]) -> dict[str, Any] | None:
        """The record of exactly this work, on every process; None if there is none, or with `redo`. Collective."""
        record = None
        if self.folder is not None and not self.redo and self.ranks.is_main:
            record = _read(self.folder / _file_name(what))
        return self.ranks.broadcast(record)

    def add(self, what: dict[str, Any], metrics: dict[str, float], info: dict[str, Any] | None = None) -> dict:
        """Writes a record (whole or not at all) and the summaries anew; returns it.

        Args:
            metrics: the numbers.
            info: more that is worth keeping, such as the names of skipped pictures; plain types.
        """
        versions = {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS}}
        record = {**what, "metrics": metrics, **(info or {}), "versions": versions, "date": time.strftime("%F %T%z")}
        if self.folder is not None and self.ranks.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / _file_name(what), json.dumps(record, indent=2) + "\n")
            self._summarise()
        return record

    def _summarise(self) -> None:
        rows = []
        for path in sorted(self.folder.glob("*.json")):
            record = _read(path)
            if record is not None:
                own = {name: record.get(name) for name in (*_FIRST_COLUMNS, *_LAST_COLUMNS)}
                rows.append({**own, **record["metrics"], "file": path.name})
        metrics = list(dict.fromkeys(name for row in rows for name in row if name not in _LAST_COLUMNS))
        columns = [*metrics, *_LAST_COLUMNS]
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _write(self.folder / "summary.csv", table.getvalue())
        lines = [columns, ["---"] * len(columns), *([_shown(row.get(name)) for name in columns] for row in rows)]
        _write(self.folder / "summary.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))


def _file_name(what: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    words = [str(what.get(name) or "") for name in ("command", "model", "data", "split")]
    words = [re.sub(r"[^\w.-]+", "_", Path(word).name)[:40] for word in words if word]
    return "-".join([*words, digest]) + ".json"


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None for a file that is absent or is not one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("metrics"), dict) else None


def _write(path: Path, text: str) -> None:
    try:
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
