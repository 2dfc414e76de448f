"""A DICOM file's bytes before pydicom reads them: transfer syntax and bounded inflation.

In flow the bytes of a file that anybody may have made; out flows the same file, never deflated, no longer than wanted.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

DEFLATED = "1.2.840.10008.1.2.1.99"
EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"

_PREAMBLE = 132  # 128 bytes of anything and "DICM"
_LONG_LENGTH = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_TRANSFER_SYNTAX = (0x0002, 0x0010)


@dataclass(frozen=True)
class PlainFile:
    """A DICOM file whose data set is not deflated.

    Parameters
    ----------
    syntax : UID of the transfer syntax that the original names.
    data : preamble, transfer syntax and data set; of a deflated original as explicit VR little endian.
    whole : False when the data set was cut at the limit, or ended inside its deflated stream.
    """

    syntax: str
    data: bytes
    whole: bool


def plain_file(data: bytes, limit: int) -> PlainFile:
    """Return the file as pydicom may read it; at most ``limit`` bytes are inflated (PS3.10 7.1, PS3.5 A.5).

    Raises
    ------
    ValueError : no DICOM file, or its meta information cannot be read.
    """
    syntax, start = _meta(data)
    if syntax != DEFLATED:
        return PlainFile(syntax, _head(syntax) + data[start:], True)
    inflate = zlib.decompressobj(-15)
    try:
        body = inflate.decompress(data[start:], limit)
    except zlib.error as error:
        raise ValueError(f"the deflated data set is damaged: {error}") from None
    return PlainFile(syntax, _head(EXPLICIT_LITTLE_ENDIAN) + body, inflate.eof)


def _head(syntax: str) -> bytes:
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    return bytes(128) + b"DICM" + struct.pack("<HH2sH", *_TRANSFER_SYNTAX, b"UI", len(uid)) + uid


def _meta(data: bytes) -> tuple[str, int]:
    """Return the transfer syntax and where the data set begins: group 2 is always explicit VR little endian."""
    if data[128:_PREAMBLE] != b"DICM":
        raise ValueError("it does not begin like a DICOM file")
    place, syntax = _PREAMBLE, ""
    while len(data) >= place + 12 and data[place : place + 2] == b"\2\0":
        group, element, kind, length = struct.unpack_from("<HH2sH", data, place)
        place += 8
        if not (kind.isalpha() and kind.isupper()):
            raise ValueError("its meta information is not explicit VR little endian")
        if kind in _LONG_LENGTH:
            (length,) = struct.unpack_from("<I", data, place)
            place += 4
        value, place = data[place : place + length], place + length
        if (group, element) == _TRANSFER_SYNTAX:
            syntax = value.rstrip(b"\0 ").decode("ascii", "replace")
    if not syntax or not all(c in "0123456789." for c in syntax):
        raise ValueError("its meta information names no transfer syntax")
    return syntax, place
