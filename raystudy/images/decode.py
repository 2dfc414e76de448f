"""One original film to one square grey picture; what cannot be trusted is refused with its reason.

Headers are read here, before any decoder sees the file: format by content, size against the pixel cap, number of
components, animation, and for PNG every checksum.  Only then Pillow (PNG, JPEG) or the DICOM reader decodes.

Grey is Pillow's ITU-R 601 luma; alpha and EXIF orientation are ignored, as in the published pipeline.  Resizing is
Pillow's BILINEAR, whose triangle filter widens with the reduction (antialiased): the filter behind torchvision's
``Resize`` on PIL images, with which the paper's films were squashed to a square.  ``letterbox`` keeps the aspect and
fills with black.  JPEGs are decoded at the smallest of libjpeg's scales that is still at least twice the wanted size.
16-bit PNGs are scaled by their full range, or by 12 bits when no sample needs more (raw detector depth in a 16-bit
file); samples of a DICOM film arrive already windowed to their full range.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raystudy.images.settings import ImageSettings

DECODER_VERSION = 1  # raised when a change moves pixels; part of the image store's key
SMALLEST_SIDE = 16

# The cap is checked on the header below, before Pillow sees the file; Pillow's own cap only warns in between.
Image.MAX_IMAGE_PIXELS = None

_EXTENSIONS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".dcm": "DICOM", ".dicom": "DICOM"}
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
class _Header:
    format: str
    width: int
    height: int


def decode_film(data: bytes, name: str, settings: ImageSettings) -> NDArray[np.uint8]:
    """Decode one film.

    Parameters
    ----------
    data : the whole original file.
    name : its file name; the extension has to fit the content.
    settings : size, resize mode and pixel cap.

    Returns
    -------
    (S, S) uint8 grey.

    Raises
    ------
    Unreadable : with the reason for the quarantine.
    """
    header = _read_header(data)
    _check_extension(name, header.format)
    _check_size(header, settings.pixel_cap)
    try:
        if header.format == "DICOM":
            image = _open_dicom(data, settings.pixel_cap)
        else:
            image = _open_with_pillow(data, header, settings)
        return _squared(image, settings)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, OverflowError) as error:
        raise Unreadable(_damage(error)) from error
    except MemoryError as error:
        raise Unreadable("needs more memory than there is") from error


def _damage(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return f"truncated: {text}" if "truncated" in text.lower() else f"damaged: {text or type(error).__name__}"


def _read_header(data: bytes) -> _Header:
    if not data:
        raise Unreadable("zero bytes")
    if data.startswith(_PNG):
        return _png_header(data)
    if data.startswith(_JPEG):
        return _jpeg_header(data)
    if data[128:132] == b"DICM":
        return _Header("DICOM", 0, 0)
    for magic, kind in _OTHERS.items():
        if data.startswith(magic):
            raise Unreadable(f"not PNG, JPEG or DICOM but {kind}")
    if not any(data):
        raise Unreadable("not an image: only zero bytes")
    if _PNG.startswith(data[:8]) or _JPEG.startswith(data[:3]):
        raise Unreadable("truncated: the file ends in its signature")
    raise Unreadable("not an image")


def _png_header(data: bytes) -> _Header:
    """Walk the chunks: order, lengths and every checksum (Pillow checks none of IDAT's)."""
    position, header, pixels, view = len(_PNG), None, False, memoryview(data)
    while True:
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
        if header is None:
            if kind != b"IHDR" or length != 13:
                raise Unreadable("damaged: the PNG does not begin with its header")
            header = _Header("PNG", *struct.unpack_from(">II", data, position + 8))
        elif kind == b"acTL":
            raise Unreadable("animated")
        elif kind == b"IDAT":
            pixels = True
        elif kind == b"IEND":
            if not pixels:
                raise Unreadable("truncated: the PNG has no pixels")
            return header
        position = end


def _jpeg_header(data: bytes) -> _Header:
    """Walk the markers up to the first scan."""
    position, header = 2, None
    while True:
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        if position + 4 > len(data):
            raise Unreadable("truncated: the JPEG ends in its header")
        flag, marker, length = struct.unpack_from(">BBH", data, position)
        if flag != 0xFF or length < 2:
            raise Unreadable("damaged: the JPEG has an impossible marker")
        body = data[position + 4 : position + 2 + length]
        if len(body) < length - 2:
            raise Unreadable("truncated: the JPEG ends in its header")
        if marker == 0xE2 and body.startswith(b"MPF\0"):
            raise Unreadable("animated: the JPEG holds several pictures")
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}:
            header = _jpeg_frame(marker, body)
        if marker == 0xDA:
            if header is None:
                raise Unreadable("damaged: the JPEG has no frame header")
            if data.rfind(b"\xff\xd9", position) < 0:
                raise Unreadable("truncated: the JPEG has no end")
            return header
        position += 2 + length


def _jpeg_frame(marker: int, body: bytes) -> _Header:
    if len(body) < 6:
        raise Unreadable("damaged: the JPEG has a short frame header")
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    if marker not in {0xC0, 0xC1, 0xC2} or precision != 8:
        raise Unreadable(f"JPEG of a kind that is not read (frame {marker:#x}, {precision} bit)")
    if components == 4:
        raise Unreadable("CMYK")
    if components not in {1, 3}:
        raise Unreadable(f"JPEG of {components} components")
    return _Header("JPEG", width, height)


def _check_extension(name: str, content: str) -> None:
    suffix = PurePosixPath(name).suffix.lower()
    expected = _EXTENSIONS.get(suffix)
    if expected is None and (not suffix or (content == "DICOM" and suffix[1:].isdigit())):
        return  # no extension, or the last component of a DICOM UID
    if expected != content:
        raise Unreadable(f"wrong extension: {suffix or 'none'} for {content}")


def _check_size(header: _Header, pixel_cap: int) -> None:
    if header.format == "DICOM":
        return  # checked where its header is read
    if header.width * header.height > pixel_cap:
        raise Unreadable(
            f"decompression bomb: the header says {header.width} × {header.height}, the cap is {pixel_cap} pixels"
        )
    if min(header.width, header.height) < SMALLEST_SIDE:
        raise Unreadable(f"too small: {header.width} × {header.height}")


def _open_with_pillow(data: bytes, header: _Header, settings: ImageSettings) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=[header.format]) as image:
        if image.size != (header.width, header.height) or getattr(image, "n_frames", 1) != 1:
            raise Unreadable("damaged: the file says two different things about its size")
        if header.format == "JPEG":
            image.draft("L", _draft_size(header, settings))
        image.load()
        if image.mode.startswith("I"):
            return Image.fromarray(_eight_bits(np.asarray(image)))
        if image.mode not in {"1", "L", "LA", "P", "RGB", "RGBA"}:
            raise Unreadable(f"colour mode {image.mode}")
        image.info.pop("transparency", None)  # alpha is ignored, also where it is a palette's
        return image.convert("L")


def _draft_size(header: _Header, settings: ImageSettings) -> tuple[int, int]:
    """Twice the wanted size; for a letterbox the long side decides, for a square each side its own."""
    if settings.resize == "letterbox":
        scale = min(1.0, 2 * settings.size / max(header.width, header.height))
        return max(1, round(header.width * scale)), max(1, round(header.height * scale))
    return 2 * settings.size, 2 * settings.size


def _eight_bits(samples: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Scale 16-bit samples to 8: 65535 becomes 255, or 4095 when no sample is larger."""
    values = samples.astype(np.uint32)
    full = 4095 if int(values.max()) <= 4095 else 65535
    return ((values * 255 + full // 2) // full).astype(np.uint8)


def _open_dicom(data: bytes, pixel_cap: int) -> Image.Image:
    from raystudy.cohorts.dicom import decode_dicom

    samples = decode_dicom(data)
    if samples.ndim != 2 or min(samples.shape) < SMALLEST_SIDE:
        raise Unreadable(f"too small: {' × '.join(map(str, samples.shape))}")
    if samples.size > pixel_cap:
        raise Unreadable(f"decompression bomb: {samples.shape}, the cap is {pixel_cap} pixels")
    if samples.dtype == np.uint16:
        samples = ((samples.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    return Image.fromarray(samples)


def _squared(image: Image.Image, settings: ImageSettings) -> NDArray[np.uint8]:
    size = settings.size
    if settings.resize == "squash":
        return np.array(image.resize((size, size), Image.Resampling.BILINEAR))
    scale = size / max(image.size)
    width, height = (min(size, max(1, round(side * scale))) for side in image.size)
    canvas = np.zeros((size, size), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(
        image.resize((width, height), Image.Resampling.BILINEAR)
    )
    return canvas
