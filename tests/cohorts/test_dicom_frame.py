"""Compressed DICOM frames from strangers: nothing decodes to more than the header says, and sound frames stay exact."""

from __future__ import annotations

import io
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from raystudy.cohorts.dicom import decode_dicom
from tests.cohorts.dicom_films import RAMP, deflated, encapsulated, film, written

pytest.importorskip("pydicom", reason="the extra raystudy[dicom] is not installed")
JPEG, JPEG_2000, RLE = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"
GREY = (RAMP // 16).astype(np.uint8)
SOUND: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: in_dicom(picture("JPEG"), JPEG),
    "progressive": lambda: in_dicom(picture("JPEG", progressive=True), JPEG),
    "JPEG with restarts": lambda: in_dicom(picture("JPEG", restart_marker_blocks=1), JPEG),
    "JPEG 2000": lambda: in_dicom(picture("JPEG2000", no_jp2=True), JPEG_2000),
    "JP2": lambda: in_dicom(picture("JPEG2000"), JPEG_2000),
    "JP2 with a box": lambda: in_dicom(boxed(codestream()), JPEG_2000),
    "RLE": lambda: in_dicom(rle(b"".join(b"\x3f" + row.tobytes() for row in GREY)), RLE),
    "RLE, padded": lambda: in_dicom(rle(b"\x80" + b"".join(b"\x3f" + r.tobytes() for r in GREY) + b"\0\0"), RLE),
}


def picture(kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(GREY).save(sink, kind, **options)
    return sink.getvalue()


def in_dicom(frame: bytes, syntax: str) -> bytes:
    return encapsulated(frame, syntax, GREY, bits=8)


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(picture("JPEG"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def codestream(width: int = 64, height: int = 64, components: int = 1) -> bytes:
    """A JPEG 2000 codestream whose size segment says this."""
    real = picture("JPEG2000", no_jp2=True)
    (length,) = struct.unpack_from(">H", real, 4)
    size = struct.pack(">HH8IH", 38 + 3 * components, 0, width, height, 0, 0, width, height, 0, 0, components)
    return real[:4] + size + b"\x07\x01\x01" * components + real[4 + length :]


def boxed(stream: bytes, box: bytes = b"", head: bytes = b"") -> bytes:
    """A JP2 file with a free box, and a box in its header, before its codestream."""
    whole = picture("JPEG2000")
    parts = bytearray(whole[: whole.index(b"jp2c") - 4])
    place = parts.index(b"jp2h") - 4
    struct.pack_into(">I", parts, place, struct.unpack_from(">I", parts, place)[0] + len(head))
    free = struct.pack(">I4s", 8 + len(box), b"free") + box
    return bytes(parts) + head + free + struct.pack(">I4s", 8 + len(stream), b"jp2c") + stream


def rle(*parts: bytes) -> bytes:
    places = np.cumsum([64, *map(len, parts)])[:-1]
    return struct.pack("<16I", len(parts), *places, *[0] * (15 - len(parts))) + b"".join(parts)


def more_scans(data: bytes, n: int) -> bytes:
    """Repeat the last scan of a JPEG."""
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * n + data[-2:]


DECOY = b"\xff\x4f\xff\x51" + struct.pack(">HH4I", 47, 0, 64, 64, 0, 0) + bytes(24)
PALETTE = struct.pack(">I4sHB", 8 + 3 + 200 + 400, b"pclr", 2, 200) + b"\x07" * 200 + bytes(400)
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "JPEG, junk before its size": (
        lambda: in_dicom(jpeg_of(20000, 20000)[:2] + b"\0" + jpeg_of(20000, 20000)[2:], JPEG),
        "impossible marker",
    ),
    "JPEG, junk before it": (lambda: in_dicom(b"\0\0" + jpeg_of(20000, 20000), JPEG), "neither JPEG nor JPEG 2000"),
    "JPEG of two sizes": (
        lambda: in_dicom(picture("JPEG").partition(b"\xff\xda")[0] + jpeg_of(20000, 20000)[2:], JPEG),
        "says its size 2 times",
    ),
    "JPEG of three components": (
        lambda: in_dicom(picture("JPEG").replace(b"\0\x40\0\x40\x01", b"\0\x40\0\x40\x03"), JPEG),
        "1 samples a pixel, its compressed frame 3",
    ),
    "JPEG of many scans": (
        lambda: in_dicom(more_scans(picture("JPEG", progressive=True), 100), JPEG),
        "decompression bomb: the JPEG has more than 100 scans",
    ),
    "JPEG 2000 of twenty components": (
        lambda: in_dicom(codestream(components=20), JPEG_2000),
        "1 samples a pixel, its compressed frame 20",
    ),
    "JPEG 2000, size not first": (
        lambda: in_dicom(b"\xff\x4f\xff\x64\0\4\0\0" + codestream(20000, 20000)[2:], JPEG_2000),
        "neither JPEG nor JPEG 2000",
    ),
    "JP2 with a decoy": (
        lambda: in_dicom(boxed(codestream(20000, 20000), DECOY), JPEG_2000),
        "compressed frame 20000 × 20000",
    ),
    "JP2 with a palette": (lambda: in_dicom(boxed(codestream(), head=PALETTE), JPEG_2000), "has a palette"),
    "JP2 with an endless box": (lambda: in_dicom(picture("JPEG2000")[:12] + bytes(40), JPEG_2000), "impossible box"),
    "RLE": (lambda: in_dicom(rle(b"\x81\0" * 100_000), RLE), "decompression bomb: an RLE segment of 200000 bytes"),
    "RLE, short": (lambda: in_dicom(rle(b"\x81\0" * 30), RLE), "truncated: an RLE segment holds 3840 of 4096 pixels"),
    "RLE of two segments": (lambda: in_dicom(rle(b"\x81\0" * 32, b"\x81\0" * 32), RLE), "2 segments"),
    "a second frame": (
        lambda: encapsulated([picture("JPEG"), jpeg_of(20000, 20000)], JPEG, GREY, bits=8),
        "animated: its pixel data holds several frames",
    ),
    "a second frame, native": (lambda: written(film(PixelData=RAMP.tobytes() * 2)), "animated: its pixel data holds"),
    "sixty-four bits": (lambda: written(film(BitsAllocated=64)), "1 samples of 64 bits"),
}


@pytest.mark.parametrize("make", SOUND.values(), ids=SOUND)
def test_sound_frames_are_decoded(make: Callable[[], bytes]) -> None:
    assert np.abs(decode_dicom(make(), pixel_cap=4096).astype(int) - GREY).max() <= 8


@pytest.mark.parametrize(("make", "reason"), BOMBS.values(), ids=BOMBS)
def test_frames_that_would_grow_beyond_their_header_are_refused(make: Callable[[], bytes], reason: str) -> None:
    data = make()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason):
            decode_dicom(data, pixel_cap=100_000_000)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((64, 64), "u1"),
        ((37, 51), "u1"),
        ((64, 64), "<u2"),
        ((37, 51), "<i2"),
        ((5, 300, 3), "u1"),
        ((5, 99, 3), "<u2"),
    ],
)
def test_rle_is_exact(shape: tuple[int, ...], kind: str) -> None:
    from pydicom.uid import RLELossless

    rng = np.random.default_rng(3)
    pixels = np.sort(rng.integers(0, 200, shape), axis=1).astype(kind)  # runs
    pixels[::2] = rng.integers(0, 200, pixels[::2].shape)  # and none
    fields = {"RescaleSlope": 2, "RescaleIntercept": -9} if len(shape) == 2 else {}
    dataset = film(pixels, bits=pixels.itemsize * 8, **fields)
    plain = decode_dicom(written(dataset))
    dataset.compress(RLELossless, encoding_plugin="pydicom")
    assert np.array_equal(decode_dicom(written(dataset)), plain)


def hiding(tag: int) -> bytes:
    """A deflated film with 80 MB of zeros in a private field."""
    dataset: Any = film()
    dataset.add_new((tag, 0x0010), "LO", "vendor")
    dataset.add_new((tag, 0x1001), "OB", bytes(80_000_000))
    return written(deflated(dataset))


@pytest.mark.parametrize(
    ("tag", "reason"), [(0x0009, "says no size in its first"), (0x7FE1, "is larger than its header says")]
)
def test_a_deflated_film_grows_to_what_its_header_says(tag: int, reason: str) -> None:
    data = hiding(tag)
    assert len(data) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"decompression bomb: the deflated data set {reason}"):
            decode_dicom(data, pixel_cap=100_000_000)
        assert tracemalloc.get_traced_memory()[1] < 70_000_000
    finally:
        tracemalloc.stop()


def test_a_deflated_film_may_be_longer_than_a_head() -> None:
    pixels: NDArray[Any] = np.zeros((3000, 3000), np.uint16)
    pixels[::7] = 4095
    data = written(deflated(film(pixels)))
    assert np.array_equal(decode_dicom(data, pixel_cap=9_000_000), pixels // 4095 * 65535)
    with pytest.raises(ValueError, match="decompression bomb: 3000 × 3000, the cap is 8999999"):
        decode_dicom(data, pixel_cap=8_999_999)
