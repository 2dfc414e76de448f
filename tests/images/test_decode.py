"""Originals become square grey pictures; what cannot be trusted gets a reason."""

from __future__ import annotations

import re
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from raystudy.images.decode import Unreadable, decode_film
from raystudy.images.settings import ImageSettings
from raystudy.streams import stream
from tests.images.films import encoded, film, png
from tests.images.hostile import KINDS, hostile_files

SETTINGS = ImageSettings(size=48)


def published(picture: np.ndarray, size: int = 48) -> np.ndarray:
    """What torchvision's Resize on a PIL image does: Pillow's bilinear filter to a square."""
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))


@pytest.fixture
def picture() -> np.ndarray:
    return film(stream(0, "films"), 96, 80)


def test_eight_bit_png_is_squashed_as_published(picture: np.ndarray) -> None:
    decoded = decode_film(encoded(picture, "PNG"), "a.png", SETTINGS)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, published(picture))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colour_and_alpha_channels_of_a_grey_film_change_nothing(picture: np.ndarray, mode: str) -> None:
    coloured = Image.fromarray(picture).convert(mode)
    if mode.endswith("A"):
        coloured.putalpha(128)
    decoded = decode_film(encoded(coloured, "PNG"), "a.png", SETTINGS)
    assert np.abs(decoded.astype(int) - published(picture)).max() <= 1


def test_palette_with_transparency_is_read_through_its_palette(picture: np.ndarray) -> None:
    coloured = Image.fromarray(picture // 4 * 4).convert("P")
    for options in ({}, {"transparency": bytes(range(256))}, {"transparency": 3}):
        decoded = decode_film(encoded(coloured, "PNG", **options), "a.png", SETTINGS)
        assert np.abs(decoded.astype(int) - published(picture // 4 * 4)).max() <= 1


def test_one_bit_png_is_black_and_white() -> None:
    halves = np.zeros((64, 64), np.uint8)
    halves[:, 32:] = 255
    decoded = decode_film(encoded(Image.fromarray(halves).convert("1"), "PNG"), "a.png", SETTINGS)
    assert (decoded[:, :20] == 0).all()
    assert (decoded[:, 28:] == 255).all()


def test_sixteen_bits_are_scaled_not_cut(picture: np.ndarray) -> None:
    # 257 = 65535 / 255, so v · 257 is the exact 16-bit form of the 8-bit value v.
    decoded = decode_film(encoded(picture.astype(np.uint16) * 257, "PNG"), "a.png", SETTINGS)
    np.testing.assert_array_equal(decoded, published(picture))


def test_twelve_bits_in_a_sixteen_bit_file_fill_the_range(picture: np.ndarray) -> None:
    decoded = decode_film(encoded(picture.astype(np.uint16) * 16, "PNG"), "a.png", SETTINGS)
    assert np.abs(decoded.astype(int) - published(picture)).max() <= 1


@pytest.mark.parametrize("shape", [(60, 60), (390, 320), (1200, 900)])
def test_jpeg_stays_close_to_its_full_decoding(shape: tuple[int, int]) -> None:
    data = encoded(film(stream(1, "films"), *shape), "JPEG", quality=92)
    decoded = decode_film(data, "a.JPG", SETTINGS)
    full = decode_film(encoded(Image.open(__import__("io").BytesIO(data)), "PNG"), "a.png", SETTINGS)
    assert np.abs(decoded.astype(int) - full).mean() < 1.5


@pytest.mark.parametrize(("width", "height"), [(96, 48), (48, 96), (50, 50)])
def test_letterbox_keeps_the_aspect_and_is_black_around(width: int, height: int) -> None:
    white = np.full((height, width), 255, np.uint8)
    decoded = decode_film(encoded(white, "PNG"), "a.png", ImageSettings(size=48, resize="letterbox"))
    expected = np.zeros((48, 48), np.uint8)
    h, w = round(height * 48 / max(width, height)), round(width * 48 / max(width, height))
    expected[(48 - h) // 2 : (48 - h) // 2 + h, (48 - w) // 2 : (48 - w) // 2 + w] = 255
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"quality": 100}])
def test_a_jpeg_may_not_repeat_its_scans_for_ever(options: dict[str, object]) -> None:
    data = encoded(film(stream(4, "films"), 200, 160), "JPEG", **options)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert (b"\xff\x00" in scan) or not options  # what only looks like a marker
    decode_film(data, "a.jpg", SETTINGS)
    with pytest.raises(Unreadable, match="decompression bomb: the JPEG has more than 100 scans"):
        decode_film(data[:-2] + scan * 100 + data[-2:], "a.jpg", SETTINGS)
    with pytest.raises(Unreadable, match="truncated: the JPEG has no end"):
        decode_film(data[:-2], "a.jpg", SETTINGS)


def test_a_file_without_extension_is_known_by_its_content(picture: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_film(encoded(picture, "PNG"), "00000001_000", SETTINGS), published(picture))


@pytest.mark.parametrize("shape", [(96, 80), (17, 33), (16, 16)])
def test_black_borders_and_interlacing_are_no_missing_rows(shape: tuple[int, int]) -> None:
    picture = film(stream(2, "films"), *shape)
    picture[-5:] = 0
    decoded = decode_film(encoded(picture, "PNG"), "a.png", SETTINGS)
    np.testing.assert_array_equal(decoded, published(picture))
    # Pillow writes no interlaced PNG: the seven passes are put together here.
    body = b""
    for left, top, right, down in (
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
    ):  # fmt: skip
        for row in picture[top::down, left::right]:
            body += b"\0" + row.tobytes() if row.size else b""
    height, width = picture.shape
    np.testing.assert_array_equal(
        decode_film(png(width, height, zlib.compress(body), interlaced=True), "a.png", SETTINGS), published(picture)
    )
    with pytest.raises(Unreadable, match="truncated"):
        decode_film(png(width, height, zlib.compress(body[:-1]), interlaced=True), "a.png", SETTINGS)


def test_the_pixel_cap_is_a_setting(picture: np.ndarray) -> None:
    data = encoded(picture, "PNG")
    decode_film(data, "a.png", ImageSettings(size=48, pixel_cap=96 * 80))
    with pytest.raises(Unreadable, match="decompression bomb: the header says 96 × 80"):
        decode_film(data, "a.png", ImageSettings(size=48, pixel_cap=96 * 80 - 1))


def test_five_hundred_hostile_files_each_get_their_reason() -> None:
    accepted, wrong = [], []
    started = time.monotonic()
    for number, (name, data, pattern) in enumerate(hostile_files(20, 500)):
        try:
            decode_film(data, name, SETTINGS)
        except Unreadable as refusal:
            if not re.search(pattern, refusal.reason):
                wrong.append((KINDS[number % len(KINDS)].__name__, refusal.reason))
        else:
            accepted.append(KINDS[number % len(KINDS)].__name__)
    assert accepted == []
    assert wrong == []
    assert time.monotonic() - started < 60  # no file costs more than a look at its header


def test_random_damage_ends_in_a_picture_or_a_reason_and_nothing_else() -> None:
    rng = stream(5, "damage")
    whole = [("a.jpg", "JPEG", {}), ("a.jpg", "JPEG", {"progressive": True}), ("a.png", "PNG", {})]
    reasons: list[str] = []
    for number in range(600):
        name, kind, options = whole[number % 3]
        data = bytearray(encoded(film(rng), kind, **options))
        places = rng.integers(2, len(data) if number % 2 else 400, 4)  # everywhere, or in the header
        for place in places:
            data[int(place)] = int(rng.integers(256))
        try:
            assert decode_film(bytes(data), name, SETTINGS).shape == (48, 48)
            assert name == "a.jpg"  # a PNG says by its checksums that it is damaged
        except Unreadable as refusal:
            reasons.append(refusal.reason)
    assert 250 < len(reasons) < 550
    assert not any("0x7" in reason for reason in reasons)  # no addresses: the same damage, the same reason


def test_a_reason_survives_the_way_between_processes() -> None:
    import pickle

    assert pickle.loads(pickle.dumps(Unreadable("animated"))).reason == "animated"
