"""A compressed DICOM frame before a decoder makes room for it: what it announces, and RLE within its bounds.

In flow one encapsulated frame that anybody may have made; out flow the size and components that the decoder will find
in it, or, of an RLE frame, its samples.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from raystudy.jpeg import frame_fields, is_frame, segments

_CODESTREAM = b"\xff\x4f\xff\x51"  # JPEG 2000: start of codestream, directly followed by its size
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_MOST_SEGMENTS = 15


@dataclass(frozen=True)
class Announced:
    """Width and height in pixels, and samples a pixel, that a compressed frame says of itself."""

    width: int
    height: int
    components: int


def announced(frame: bytes) -> Announced:
    """Read what a JPEG, JPEG-LS or JPEG 2000 frame announces.

    Raises
    ------
    ValueError : a frame of another kind, one whose size does not stand where its decoder looks for it, a JPEG that is
        cut or has more scans than an encoder writes, a JP2 file with a palette.
    """
    if frame.startswith(b"\xff\xd8"):
        return _of_jpeg(frame)
    if frame.startswith((_CODESTREAM, _JP2)):
        return _of_jpeg_2000(frame, 0 if frame.startswith(_CODESTREAM) else _codestream(frame))
    raise ValueError("its compressed frame is neither JPEG nor JPEG 2000")


def _of_jpeg(frame: bytes) -> Announced:
    frames = [frame_fields(body) for marker, body in segments(frame) if is_frame(marker)]
    if len(frames) != 1:
        raise ValueError(f"its compressed frame says its size {len(frames)} times")
    _, height, width, components = frames[0]
    return Announced(width, height, components)


def _of_jpeg_2000(frame: bytes, start: int) -> Announced:
    if not frame.startswith(_CODESTREAM, start) or len(frame) < start + 42:
        raise ValueError("its JPEG 2000 codestream does not begin with its size")
    right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
    (components,) = struct.unpack_from(">H", frame, start + 40)
    return Announced(right - left, bottom - top, components)


def _codestream(frame: bytes) -> int:
    """Walk the boxes of a JP2 file (ISO/IEC 15444-1 I.4) to the first codestream."""
    place = 0
    while place + 16 <= len(frame):
        length, kind = struct.unpack_from(">I4s", frame, place)
        head = 16 if length == 1 else 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", frame, place + 8)
        if kind == b"jp2c":
            return place + head
        if length < head:
            raise ValueError("its JPEG 2000 file has an impossible box")
        if kind == b"jp2h" and b"pclr" in frame[place : place + length]:
            raise ValueError("its JPEG 2000 file has a palette")
        place += length
    raise ValueError("its JPEG 2000 file holds no codestream")


def unpack_rle(frame: bytes, pixels: int, samples: int, bits: int) -> bytes:
    """Decode an RLE frame (PS3.5 annex G); no segment is decoded further than its pixels.

    Parameters
    ----------
    pixels : rows × columns.
    samples, bits : samples a pixel and bits allocated to each.

    Returns
    -------
    samples × pixels × bits / 8 bytes, one plane after the other, little endian.

    Raises
    ------
    ValueError : segments of another number, length or place than the header asks for.
    """
    if bits % 8 or len(frame) < 64:
        raise ValueError("truncated: its RLE frame has no header" if len(frame) < 64 else f"RLE of {bits} bits")
    number, *offsets = struct.unpack_from("<16I", frame)
    size = bits // 8
    if number != samples * size or number > _MOST_SEGMENTS:
        raise ValueError(f"its RLE frame has {number} segments, its header asks for {samples * size}")
    planes = np.empty((samples, pixels, size), np.uint8)
    for k, (start, end) in enumerate(zip(offsets[:number], [*offsets[1:number], len(frame)], strict=True)):
        planes[k // size, :, size - 1 - k % size] = np.frombuffer(_unpacked(frame[start:end], pixels), np.uint8)
    return planes.tobytes()


def _unpacked(segment: bytes, n: int) -> bytearray:
    """Decode PackBits to n bytes; what an encoder added to fill the segment is left out."""
    if len(segment) > 2 * n + 16:  # the least able encoder spends two bytes on each
        raise ValueError(f"decompression bomb: an RLE segment of {len(segment)} bytes for {n} pixels")
    out, place = bytearray(), 0
    while len(out) < n:
        if place >= len(segment):
            raise ValueError(f"truncated: an RLE segment holds {len(out)} of {n} pixels")
        control = segment[place]
        if control < 128:
            out += segment[place + 1 : place + 2 + control]
            place += 2 + control
        elif control > 128:
            out += segment[place + 1 : place + 2] * (257 - control)
            place += 2
        else:
            place += 1
    return out[:n]
