"""Looks for words in everything that a folder holds, also where they are packed: Parquet, SQLite, PNG, safetensors."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

IMAGE = re.compile(rb"data:image/\w+;base64,([A-Za-z0-9+/=\s]+)")


def texts(file: Path) -> Iterator[str]:
    """Yield all readable text of a file, packed or not, its name among it."""
    data = file.read_bytes()
    yield str(file)
    yield data.decode("latin-1")
    yield data.decode("utf-16-le", errors="ignore")
    if data.startswith(b"PAR1"):
        table = pq.read_table(io.BytesIO(data))
        yield f"{table.schema.metadata} {table.to_pylist()}"
    elif data.startswith(b"SQLite format 3"):
        with contextlib.closing(sqlite3.connect(file)) as store:
            for (name,) in store.execute("select name from sqlite_master where type = 'table'").fetchall():
                yield str(store.execute(f'select * from "{name}"').fetchall())
    elif data.startswith(b"\x89PNG"):
        yield _image_text(data)
    elif file.suffix == ".safetensors":
        yield json.dumps(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]))
    for match in IMAGE.finditer(data):
        yield _image_text(base64.b64decode(match.group(1)))


def _image_text(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return str(image.info)


def files_with(folder: Path, *words: str) -> set[str]:
    """Return the files below a folder that contain one of the words in any letter case."""
    found: set[str] = set()
    for file in (f for f in folder.rglob("*") if f.is_file()):
        if any(word in text.lower() for text in texts(file) for word in words):
            found.add(str(file.relative_to(folder)))
    return found
