"""What a film's own bytes say before any decoder sees them: format, size, components, checksums, completeness.

A PNG is checked to its last byte.  A JPEG has no checksum: its structure, kind, number of scans and end are checked; a
flipped bit inside its scan, or a scan that was cut and closed with an end marker, is not seen by anybody.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from raystudy.jpeg import START_OF_SCAN, frame_fields, is_frame, segments

_OTHERS = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"RIFF": "WebP or AVI",
    b"%PDF": "PDF",
    b"PK\3\4": "ZIP",
    b"\0\0\0\x0cjP": "JPEG 2000",
    b"8BPS": "Photoshop",
}
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"


class Unreadable(Exception):
    """A film that is quarantined; the message is its reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)

    def __reduce__(self) -> tuple[type[Unreadable], tuple[str]]:
        return Unreadable, (self.reason,)


@dataclass(frozen=True)
class Header:
    """Format (PNG, JPEG, DICOM) and size in pixels; 0 × 0 where the DICOM reader checks."""

    format: str
    width: int
    height: int


def read_header(data: bytes) -> Header:
    """Return format and size; a file that is no complete PNG, JPEG or DICOM raises ``Unreadable``."""
    if not data:
        raise Unreadable("zero bytes")
    if data.startswith(_PNG):
        return _png_header(data)
    if data.startswith(_JPEG):
        return _jpeg_header(data)
    if data[128:132] == b"DICM":
        return Header("DICOM", 0, 0)
    for magic, kind in _OTHERS.items():
        if data.startswith(magic):
            raise Unreadable(f"not PNG, JPEG or DICOM but {kind}")
    if not any(data):
        raise Unreadable("not an image: only zero bytes")
    if _PNG.startswith(data[:8]) or _JPEG.startswith(data[:3]):
        raise Unreadable("truncated: the file ends in its signature")
    raise Unreadable("not an image")


def _png_header(data: bytes) -> Header:
    chunks = list(_png_chunks(data))
    kinds = [kind for kind, _ in chunks]
    if kinds[0] != b"IHDR" or len(chunks[0][1]) != 13:
        raise Unreadable("damaged: the PNG does not begin with its header")
    if b"acTL" in kinds:
        raise Unreadable("animated")
    if b"IDAT" not in kinds:
        raise Unreadable("truncated: the PNG has no pixels")
    if chunks[0][1][9] == 3 and b"PLTE" not in kinds:
        raise Unreadable("damaged: the PNG has no palette")
    return Header("PNG", *struct.unpack_from(">II", chunks[0][1]))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Walk the chunks up to IEND: lengths and every checksum (Pillow checks none of IDAT's)."""
    position, kind, view = len(_PNG), b"", memoryview(data)
    while kind != b"IEND":
        if position + 12 > len(data):
            raise Unreadable("truncated: the PNG ends before its last chunk")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if length > 0x7FFFFFFF or not kind.isalpha():
            raise Unreadable("damaged: the PNG has an impossible chunk")
        if end > len(data):
            raise Unreadable("truncated: the PNG ends inside a chunk")
        if zlib.crc32(view[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise Unreadable(f"damaged: checksum of PNG chunk {kind.decode('ascii')}")
        yield kind, view[position + 8 : end - 4]
        position = end


def _jpeg_header(data: bytes) -> Header:
    """Walk the segments to the end of the image."""
    header, scans = None, 0
    try:
        for marker, body in segments(data):
            if marker == 0xE2 and body.startswith(b"MPF\0"):
                raise Unreadable("animated: the JPEG holds several pictures")
            if is_frame(marker):
                header = _jpeg_frame(marker, body)
            if marker == START_OF_SCAN and header is None:
                raise Unreadable("damaged: the JPEG has no frame header")
            scans += marker == START_OF_SCAN
    except ValueError as error:
        text = str(error)
        raise Unreadable(text if text.startswith(("truncated", "decompression bomb")) else f"damaged: {text}") from None
    if header is None or scans == 0:
        raise Unreadable("truncated: the JPEG has no pixels")
    return header


def _jpeg_frame(marker: int, body: bytes) -> Header:
    precision, height, width, components = frame_fields(body)
    if marker not in {0xC0, 0xC1, 0xC2} or precision != 8:
        raise Unreadable(f"JPEG of a kind that is not read (frame {marker:#x}, {precision} bit)")
    if components == 4:
        raise Unreadable("CMYK")
    if components not in {1, 3}:
        raise Unreadable(f"JPEG of {components} components")
    return Header("JPEG", width, height)


def check_png_rows(data: bytes, header: Header) -> None:
    """Inflate the pixels and count: (filter byte + row) for every row of every pass."""
    depth, colour, interlaced = data[24], data[25], data[28]
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    whole = ((0, 0, 1, 1),)
    adam7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    expected = 0
    for left, top, step_x, step_y in adam7 if interlaced else whole:
        columns, rows = -((left - header.width) // step_x), -((top - header.height) // step_y)
        expected += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    inflate, held = zlib.decompressobj(), 0
    for kind, body in _png_chunks(data):
        rest: bytes | memoryview = body if kind == b"IDAT" else b""
        while len(rest) and held < expected and not inflate.eof:
            held += len(inflate.decompress(rest, 1 << 20))
            rest = inflate.unconsumed_tail
    if held < expected:
        raise Unreadable("truncated: the PNG lacks rows")
