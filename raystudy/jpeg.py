"""The segments of a JPEG as its decoder will meet them, read before any decoder sees the file.

In flow the bytes of a JPEG or JPEG-LS that anybody may have made; out flow its markers with their segments (ITU-T T.81
B.1, T.87 C.1).  Scan data is stepped over.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

START_OF_SCAN = 0xDA
JPEG_LS_FRAME = 0xF7
MOST_SCANS = 100  # a progressive encoder writes about ten; a decoder goes through all pixels for each

_FILL = re.compile(rb"\xff+")
_END_OF_IMAGE = 0xD9
# What ends scan data: no stuffed byte, no fill byte, no restart.  JPEG-LS stuffs one bit, not a byte.
_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_JPEG_LS_SCAN_END = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]")


def is_frame(marker: int) -> bool:
    """True for a marker whose segment says the picture's size."""
    return (0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}) or marker == JPEG_LS_FRAME


def frame_fields(body: bytes) -> tuple[int, int, int, int]:
    """Return precision, height, width and components of a frame's segment; a short one raises ``ValueError``."""
    if len(body) < 6:
        raise ValueError("the JPEG has a short frame header")
    return struct.unpack_from(">BHHB", body)


def segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, body) of each segment between start and end of the image.

    Raises
    ------
    ValueError : a file that ends too early, bytes that are no segment, or more than ``MOST_SCANS`` scans.
    """
    place, scans, scan_end = 2, 0, _SCAN_END
    while True:
        fill = _FILL.match(data, place)
        place = fill.end() - 1 if fill else place
        marker = data[place + 1] if place + 1 < len(data) else None
        if marker == _END_OF_IMAGE and fill:
            return
        if place + 4 > len(data):
            raise ValueError("truncated: the JPEG ends in its header")
        (length,) = struct.unpack_from(">H", data, place + 2)
        if fill is None or marker is None or length < 2 or marker < 0xC0 or 0xD0 <= marker <= 0xD8:
            raise ValueError("the JPEG has an impossible marker")
        body = data[place + 4 : place + 2 + length]
        if len(body) < length - 2:
            raise ValueError("truncated: the JPEG ends in its header")
        yield marker, body
        place += 2 + length
        if marker == JPEG_LS_FRAME:
            scan_end = _JPEG_LS_SCAN_END
        if marker == START_OF_SCAN:
            scans += 1
            if scans > MOST_SCANS:
                raise ValueError(f"decompression bomb: the JPEG has more than {MOST_SCANS} scans")
            end = scan_end.search(data, place)
            if end is None:
                raise ValueError("truncated: the JPEG has no end")
            place = end.start()
