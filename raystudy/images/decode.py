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
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from raystudy.errors import StudyError
from raystudy.images.headers import Header, Unreadable, check_png_rows, read_header
from raystudy.images.settings import ImageSettings

DECODER_VERSION = 2  # raised, with NUMERICS_VERSION, when a change moves pixels; part of the image store's key
SMALLEST_SIDE = 16

# The cap is checked on the header below, before Pillow sees the file; Pillow's own cap only warns in between.
Image.MAX_IMAGE_PIXELS = None

_EXTENSIONS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".dcm": "DICOM", ".dicom": "DICOM"}


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
    StudyError : what is missing is no fault of the film: memory, the extra for DICOM or a plug-in.
    """
    header = read_header(data)
    _check_extension(name, header.format)
    _check_size(header, settings.pixel_cap)
    try:
        if header.format == "DICOM":
            image = _open_dicom(data, settings.pixel_cap)
        else:
            image = _open_with_pillow(data, header, settings)
        return _squared(image, settings)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, OverflowError, Warning) as error:
        raise Unreadable(_damage(error)) from error
    except MemoryError as error:
        raise StudyError(
            "decoding the film needs more memory than there is",
            where=name,
            remedy="give the machine more memory or other work, or lower `images.pixel_cap`",
        ) from error


def _damage(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow's text holds a memory address
        return "damaged: no decoder accepts its header"
    text = " ".join(str(error).split())[:200]
    return f"truncated: {text}" if "truncated" in text.lower() else f"damaged: {text or type(error).__name__}"


def _check_extension(name: str, content: str) -> None:
    suffix = PurePosixPath(name).suffix.lower()
    expected = _EXTENSIONS.get(suffix)
    if expected is None and (not suffix or (content == "DICOM" and suffix[1:].isdigit())):
        return  # no extension, or the last component of a DICOM UID
    if expected != content:
        raise Unreadable(f"wrong extension: {suffix or 'none'} for {content}")


def _check_size(header: Header, pixel_cap: int) -> None:
    if header.format == "DICOM":
        return  # checked where its header is read
    if header.width * header.height > pixel_cap:
        raise Unreadable(
            f"decompression bomb: the header says {header.width} × {header.height}, the cap is {pixel_cap} pixels"
        )
    if min(header.width, header.height) < SMALLEST_SIDE:
        raise Unreadable(f"too small: {header.width} × {header.height}")


def _open_with_pillow(data: bytes, header: Header, settings: ImageSettings) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=[header.format]) as image:
        if image.size != (header.width, header.height) or getattr(image, "n_frames", 1) != 1:
            raise Unreadable("damaged: the file says two different things about its size")
        if header.format == "JPEG":
            image.draft("L", _draft_size(header, settings))
        image.load()
        if header.format == "PNG" and _may_lack_rows(image, data):
            check_png_rows(data, header)
        if image.mode.startswith("I"):
            return Image.fromarray(_eight_bits(np.asarray(image)))
        if image.mode not in {"1", "L", "LA", "P", "RGB", "RGBA"}:
            raise Unreadable(f"colour mode {image.mode}")
        image.info.pop("transparency", None)  # alpha is ignored, also where it is a palette's
        return image.convert("L")


def _may_lack_rows(image: Image.Image, data: bytes) -> bool:
    """Pillow leaves rows that the file does not hold at zero, without a word."""
    interlaced = data[28] != 0
    return interlaced or not any(image.crop((0, image.height - 1, image.width, image.height)).tobytes())


def _draft_size(header: Header, settings: ImageSettings) -> tuple[int, int]:
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

    try:
        samples = decode_dicom(data, pixel_cap)
    except ValueError as error:
        text = str(error).removeprefix("DICOM: ")
        if text.startswith(("decompression bomb", "animated")):
            raise Unreadable(text) from error
        short = "truncated" in text or "less than expected" in text
        raise Unreadable(f"{'truncated' if short else 'damaged'}: {text.removeprefix('truncated: ')}") from error
    if min(samples.shape) < SMALLEST_SIDE:
        raise Unreadable(f"too small: {samples.shape[1]} × {samples.shape[0]}")
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
