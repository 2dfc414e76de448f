"""Small films for the tests of this room, drawn from named streams."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def film(rng: np.random.Generator, width: int = 96, height: int = 80) -> NDArray[np.uint8]:
    """A smooth grey picture with noise, (height, width) uint8."""
    coarse = Image.fromarray(rng.integers(20, 236, (6, 6), dtype=np.uint8)).resize((width, height), 3)
    noisy = np.asarray(coarse, np.int16) + rng.integers(-6, 7, (height, width))
    return noisy.clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image | NDArray[np.generic], kind: str, **options: object) -> bytes:
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk with its right checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int,
    height: int,
    body: bytes,
    *,
    depth: int = 8,
    colour: int = 0,
    extra: bytes = b"",
    interlaced: bool = False,
) -> bytes:
    """A PNG put together by hand, so that its parts can disagree."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")
