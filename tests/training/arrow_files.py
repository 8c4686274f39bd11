"""METER's Arrow files of a few pictures."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from .data_helpers import encode

PICTURES = [encode(n, "png") for n in range(6)]


def write_arrow(path: Path, *, rows_a_batch: int = 4, **columns: list) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(columns)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)
    return str(path)


def write_captions(path: Path, captions: list, **more: list) -> str:
    ids = [f"{n}.jpg" for n in range(len(captions))]
    return write_arrow(path, image=PICTURES[: len(captions)], caption=captions, image_id=ids, **more)


def write_pictures(folder: Path) -> None:
    for n, picture in enumerate(PICTURES):
        (folder / f"{n}.jpg").write_bytes(picture)


def write_json(path: Path, items: list) -> str:
    path.write_text(json.dumps(items))
    return str(path)
