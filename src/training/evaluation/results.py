"""Finished work on disk: what it depends on, one JSON file each, and a summary of all of them as CSV and Markdown."""
from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import logging
import platform
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..distributed import Ranks
from ..errors import UserError, reason
from ..files import written_whole

VERSIONS = ("open_clip_elip", "open_clip_torch", "torch", "torchvision", "timm")
_FIRST_COLUMNS = ("command", "model", "pretrained", "data", "split")
_LAST_COLUMNS = ("weights", "date", "file")


def described_model(options: Any, loaded: Any) -> dict[str, Any]:
    """Of a result's or a cached file's description, what makes features of pictures: a `LoadedModel`, settings."""
    return {
        "model": loaded.name,
        "weights": loaded.weights_hash,
        "identity": digest_of(loaded.identity.to_dict()),
        "precision": options.precision,
        "transform": re.sub(r" at 0x[0-9a-f]+", "", loaded.transform_key),
        "vision_guided_reduction": options.vision_guided_reduction,
    }


def described_data(data: Any) -> dict[str, Any]:
    """Of a result's or a cached file's description, what the data are."""
    return {"data": data.name, "split": data.split, "data_fingerprint": data.fingerprint()}


def described(command: str, options: Any, loaded: Any, data: Any, **settings: Any) -> dict[str, Any]:
    """All that a result depends on, as `Results` takes it; `settings` are the command's own."""
    model = described_model(options, loaded)
    own = {name: model.pop(name) for name in ("precision", "transform", "vision_guided_reduction")}
    settings = {**own, "on_broken": options.on_broken, **settings}
    return {"command": command, "pretrained": loaded.pretrained, **model, **described_data(data), "settings": settings}


def digest_of(what: Any) -> str:
    """16 hexadecimal digits of plain types."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left and the others to the right; `rows` begins with the headings."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (zip(row, widths, strict=True) for row in rows)
    )


class Results:
    """The results in a folder, made with the first one; None: nowhere. The main process reads and writes.

    A piece of work is described by `what`, a dict of plain types that holds all that its numbers depend on (see
    `described`). Equal descriptions are the same work, done again only with `redo`.
    """

    def __init__(self, folder: Path | None, ranks: Ranks, redo: bool = False):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"--results {folder} is a file; name a folder.")
        self.folder, self.ranks, self.redo = folder, ranks, redo
        self.found: list[Path] = []

    @classmethod
    def of(cls, options: Any, ranks: Ranks) -> Results:
        """As `--results` and `--redo` have it."""
        return cls(None if options.results.lower() == "none" else Path(options.results), ranks, options.redo)

    def find(self, what: dict[str, Any]) -> dict[str, Any] | None:
        """The record of exactly this work, on every process; None if there is none, or with `redo`. Collective."""
        if self.folder is None or self.redo:
            return None
        path = self.folder / _file_name(what)
        record = self.ranks.broadcast(_read(path) if self.ranks.is_main else None)
        if record is not None:
            self.found.append(path)
        return record

    def shown(self, rows: Sequence[Sequence[str]], legend: str = "") -> str:
        """A `table` of numbers, its legend, and where those lie that were found."""
        found = [f"found, not evaluated again (--redo does it): {path}" for path in dict.fromkeys(self.found)]
        return "\n".join([table(rows), *([legend] if legend else []), *found])

    def add(self, what: dict[str, Any], metrics: dict[str, float], info: dict[str, Any] | None = None) -> dict:
        """Writes a record (whole or not at all) and the summaries anew; returns it.

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
    words = [str(what.get(name) or "") for name in ("command", "model", "data", "split")]
    words = [re.sub(r"[^\w.-]+", "_", Path(word).name)[:40] for word in words if word]
    return "-".join([*words, digest_of(what)[:12]]) + ".json"


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None for a file that is absent or is not one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("metrics"), dict) else None


def read_kept(path: Path, ranks: Ranks, redo: bool) -> dict[str, Any] | None:
    """What `keep` has written there, on every process; None if it is not there, cut off, or with `redo`. Collective."""
    kept = None
    if ranks.is_main and path.is_file() and not redo:
        with suppress(UserError):  # cut off
            kept = checkpoint.load(path)
            logging.info(f"using {path}")
    return ranks.broadcast(kept)


def keep(state: dict[str, Any], path: Path, ranks: Ranks, flag: str) -> None:
    """Writes tensors and plain types for later runs; a UserError names `flag` if that fails. A collective call."""
    with ranks.agree():
        if ranks.is_main:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                checkpoint.save(state, path)
            except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
                raise UserError(f"{path} cannot be written ({reason(error)}); give another {flag}.") from None


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
