"""A generator of files that must not become films: seeded, endless, each with the reason it has to get."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle

import numpy as np
from PIL import Image

from raystudy.streams import stream
from tests.cohorts.dicom_films import deflated, encapsulated, written
from tests.cohorts.dicom_films import film as dicom_film
from tests.images.films import chunk, encoded, film, png

JPEG, JPEG_2000, RLE = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"
Hostile = tuple[str, bytes, str]  # name, content, pattern of the reason


def _rng_film(rng: np.random.Generator) -> np.ndarray:
    return film(rng, int(rng.integers(40, 120)), int(rng.integers(40, 120)))


def _cut_png(rng: np.random.Generator) -> Hostile:
    data = encoded(_rng_film(rng), "PNG")
    return "a.png", data[: int(rng.integers(1, len(data) - 1))], "truncated|damaged"


def _cut_jpeg(rng: np.random.Generator) -> Hostile:
    data = encoded(_rng_film(rng), "JPEG", progressive=bool(rng.integers(2)))
    return "a.jpg", data[: int(rng.integers(1, len(data) - 1))], "truncated|damaged"


def _zero_bytes(rng: np.random.Generator) -> Hostile:
    return str(rng.choice(["a.png", "a.jpg", "a.dcm"])), b"", "zero bytes"


def _zeros(rng: np.random.Generator) -> Hostile:
    return "a.png", bytes(int(rng.integers(1, 5000))), "not an image"


def _noise(rng: np.random.Generator) -> Hostile:
    return "a.png", b"\1" + rng.bytes(int(rng.integers(1, 5000))), "not an image"


def _page(rng: np.random.Generator) -> Hostile:
    page = f"<html><body>404 {rng.integers(10**6)}</body></html>"
    return "a.jpeg", page.encode(), "not an image"


def _wrong_extension(rng: np.random.Generator) -> Hostile:
    kind, name = (("PNG", "a.jpg"), ("JPEG", "a.png"), ("PNG", "a.dcm"), ("PNG", "a.txt"))[int(rng.integers(4))]
    return name, encoded(_rng_film(rng), kind), "wrong extension"


def _other_format(rng: np.random.Generator) -> Hostile:
    kind = str(rng.choice(["GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "PDF"]))
    return "a.png", encoded(Image.fromarray(_rng_film(rng)).convert("RGB"), kind), "not PNG, JPEG or DICOM|not an image"


def _bomb_png(rng: np.random.Generator) -> Hostile:
    side = int(rng.integers(20_000, 2**31 - 1))
    return "a.png", png(side, side, zlib.compress(bytes(1000))), "decompression bomb"


def _true_bomb_png(rng: np.random.Generator) -> Hostile:
    side = int(rng.integers(11_000, 12_000))
    row = zlib.compressobj(9)
    body = b"".join(row.compress(bytes(side + 1)) for _ in range(200)) + row.flush()
    return "a.png", png(side, side, body), "decompression bomb"


def _bomb_jpeg(rng: np.random.Generator) -> Hostile:
    data = bytearray(encoded(_rng_film(rng), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, int(rng.integers(20_000, 65_000)))
    return "a.jpg", bytes(data), "decompression bomb"


def _cmyk(rng: np.random.Generator) -> Hostile:
    return "a.jpg", encoded(Image.fromarray(_rng_film(rng)).convert("CMYK"), "JPEG"), "CMYK"


def _animated_png(rng: np.random.Generator) -> Hostile:
    frames = [Image.fromarray(film(rng)) for _ in range(int(rng.integers(2, 4)))]
    return "a.png", encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), "animated"


def _several_jpegs(rng: np.random.Generator) -> Hostile:
    frames = [Image.fromarray(film(rng)) for _ in range(2)]
    return "a.jpg", encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]), "animated"


def _too_small(rng: np.random.Generator) -> Hostile:
    width, height = (1, 1) if rng.integers(2) else (int(rng.integers(1, 16)), int(rng.integers(1, 400)))
    kind = str(rng.choice(["PNG", "JPEG"]))
    picture = np.zeros((height, width), np.uint8)
    return f"a.{kind.lower()}", encoded(picture, kind), "too small"


def _flipped_bit(rng: np.random.Generator) -> Hostile:
    data = bytearray(encoded(_rng_film(rng), "PNG"))
    place = int(rng.integers(8, len(data)))
    data[place] ^= 1 << int(rng.integers(8))
    return "a.png", bytes(data), "damaged|truncated|animated|decompression bomb"


def _too_few_rows(rng: np.random.Generator) -> Hostile:
    return "a.png", png(64, 64, zlib.compress(bytes(65 * int(rng.integers(1, 63))))), "truncated|damaged"


def _no_deflate(rng: np.random.Generator) -> Hostile:
    return "a.png", png(64, 64, b"\xff" + rng.bytes(int(rng.integers(5, 4000)))), "truncated|damaged"


def _no_palette(rng: np.random.Generator) -> Hostile:
    body = zlib.compress(bytes(65 * 64))
    return "a.png", png(64, 64, body, colour=3), "damaged|colour mode"


def _impossible_depth(rng: np.random.Generator) -> Hostile:
    depth = int(rng.choice([0, 3, 5, 7, 9, 32, 255]))
    return "a.png", png(64, 64, zlib.compress(bytes(65 * 64)), depth=depth), "damaged"


def _no_pixels(rng: np.random.Generator) -> Hostile:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, int(rng.integers(20, 90)), 8, 0, 0, 0, 0))
    return "a.png", b"\x89PNG\r\n\x1a\n" + header + chunk(b"IEND", b""), "truncated"


def _text_bomb(rng: np.random.Generator) -> Hostile:
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(int(rng.integers(3, 9)) << 20)))
    return "a.png", png(64, 64, zlib.compress(bytes(65 * 64)), extra=text), "damaged"


def _jpeg_kind(rng: np.random.Generator) -> Hostile:
    data = bytearray(encoded(_rng_film(rng), "JPEG"))
    frame = data.index(b"\xff\xc0")
    if rng.integers(2):
        data[frame + 1] = int(rng.choice([0xC3, 0xC9, 0xCA]))  # lossless, arithmetic
    else:
        data[frame + 4] = 12  # bits
    return "a.jpg", bytes(data), "of a kind that is not read"


def _jpeg_without_quantisation(rng: np.random.Generator) -> Hostile:
    data = encoded(_rng_film(rng), "JPEG")
    return "a.jpg", data.replace(b"\xff\xdb", b"\xff\xfe"), "damaged|truncated"


def _dicom_noise(rng: np.random.Generator) -> Hostile:
    return "a.dcm", bytes(128) + b"DICM" + rng.bytes(int(rng.integers(0, 3000))), "damaged"


def _dicom(rng: np.random.Generator, **fields: object) -> bytes:
    picture = _rng_film(rng)
    return written(dicom_film(picture, bits=8, **fields))


def _bomb_dicom(rng: np.random.Generator) -> Hostile:
    side = int(rng.integers(10_001, 65_535))
    return "a.dcm", _dicom(rng, Rows=side, Columns=side), "decompression bomb: .* the cap is"


@cache
def _deflated_zeros(tag: int) -> bytes:
    dataset = dicom_film(np.zeros((64, 64), np.uint8), bits=8)
    dataset.add_new((tag, 0x0010), "LO", "vendor")
    dataset.add_new((tag, 0x1001), "OB", bytes(20 << 20))
    return written(deflated(dataset))


def _deflated_bomb_dicom(rng: np.random.Generator) -> Hostile:
    tag, reason = ((0x0009, "says no size"), (0x7FE1, "is larger than its header says"))[int(rng.integers(2))]
    return "a.dcm", _deflated_zeros(tag), f"decompression bomb: the deflated data set {reason}"


def _rle_bomb_dicom(rng: np.random.Generator) -> Hostile:
    picture = _rng_film(rng)
    segment = (b"\x81" + rng.bytes(1)) * int(rng.integers(picture.size + 9, 3 * picture.size))
    frame = struct.pack("<16I", 1, 64, *[0] * 14) + segment
    return "a.dcm", encapsulated(frame, RLE, picture, bits=8), "decompression bomb: an RLE segment"


def _other_frame_dicom(rng: np.random.Generator) -> Hostile:
    picture = _rng_film(rng)
    kind, syntax = (("JPEG", JPEG), ("JPEG2000", JPEG_2000))[int(rng.integers(2))]
    frame = encoded(film(rng, 121, 121), kind)
    return "a.dcm", encapsulated(frame, syntax, picture, bits=8), "damaged: the header says .* frame 121 × 121"


def _several_frames_dicom(rng: np.random.Generator) -> Hostile:
    n = int(rng.integers(2, 99))
    return "a.dcm", _dicom(rng, NumberOfFrames=n), f"^animated: {n} frames"


def _cut_dicom(rng: np.random.Generator) -> Hostile:
    data = _dicom(rng)
    return "a.dcm", data[: len(data) - int(rng.integers(2, 1500))], "^truncated: "


def _no_pixels_dicom(rng: np.random.Generator) -> Hostile:
    dataset = dicom_film(_rng_film(rng), bits=8)
    del dataset[str(rng.choice(["PixelData", "Rows", "Columns"]))]
    return "a.dcm", written(dataset), "damaged: it holds no image"


KINDS: tuple[Callable[[np.random.Generator], Hostile], ...] = (
    _cut_png, _cut_jpeg, _zero_bytes, _zeros, _noise, _page, _wrong_extension, _other_format, _bomb_png,
    _true_bomb_png, _bomb_jpeg, _cmyk, _animated_png, _several_jpegs, _too_small, _flipped_bit, _too_few_rows,
    _no_deflate, _no_palette, _impossible_depth, _no_pixels, _text_bomb, _jpeg_kind, _jpeg_without_quantisation,
    _dicom_noise, _bomb_dicom, _deflated_bomb_dicom, _rle_bomb_dicom, _other_frame_dicom, _several_frames_dicom,
    _cut_dicom, _no_pixels_dicom,
)  # fmt: skip


def hostile_files(seed: int, n: int) -> Iterator[Hostile]:
    """Yield n hostile files, all kinds in turn."""
    for number, (kind, _) in enumerate(zip(cycle(KINDS), range(n), strict=False)):
        yield kind(stream(seed, "hostile", kind.__name__, number))
