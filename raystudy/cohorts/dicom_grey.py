"""From the samples of a DICOM film to grey: alignment, modality and VOI transformation, padding, colour (PS3.3 C.11).

In flow one film whose header and frame are checked; out flows its picture, black = 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def grey(film: Dataset, native: bool) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Decode the samples and show them as `decode_dicom` says.

    Parameters
    ----------
    native : whether the pixel data are the bits of the samples, and no codestream that numbers them itself.

    Returns
    -------
    (H, W) : uint8 for samples of up to 8 bits, else uint16 over 0…65535.

    Raises
    ------
    ValueError : a header that says nothing possible about grey values; pydicom's errors on damaged pixel data.
    """
    from pydicom.pixels.processing import apply_color_lut

    _align(film, native)
    samples = film.pixel_array
    if samples.shape[:2] != (int(film.Rows), int(film.Columns)):
        raise ValueError("animated: its pixel data holds several frames")
    kind = str(film.PhotometricInterpretation)
    deep = int(film.BitsStored) > 8
    full = 65535 if deep else 255
    if kind == "PALETTE COLOR":
        samples = apply_color_lut(samples, film)
        return _luma(samples, 255 if samples.dtype == np.uint8 else 65535)
    if samples.ndim == 3:  # 8 bits of 8 or 16 of 16: pydicom has turned YBR into RGB
        return _luma(samples, 2 ** int(film.BitsStored) - 1)
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"photometric interpretation {kind} of one sample a pixel is not known")
    padded = _padding(samples, film)
    shown = np.rint(_shown(samples, padded, film) * full)
    if kind == "MONOCHROME1":
        shown = full - shown
    shown[padded] = 0
    return shown.astype(np.uint16) if deep else shown.astype(np.uint8)


def _align(film: Dataset, native: bool) -> None:
    """Shift samples whose high bit is not the highest of the bits stored."""
    stored, allocated = int(film.BitsStored), int(film.BitsAllocated)
    high = film.get("HighBit")
    shift = 0 if high is None else int(high) + 1 - stored
    if shift == 0:
        return
    if not native or shift < 0 or stored + shift > allocated or allocated not in (8, 16, 32):
        raise ValueError(f"its high bit {high} does not fit {stored} bits stored of {allocated} allocated")
    order = "<" if film.file_meta.TransferSyntaxUID.is_little_endian else ">"
    film.PixelData = (np.frombuffer(film.PixelData, f"{order}u{allocated // 8}") >> shift).tobytes()
    film.HighBit = stored - 1


def _luma(samples: np.ndarray, white: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return ITU-R 601 luma (weights in 1/65536) of (H, W, 3) samples in 0…white, over 0…255 or 0…65535."""
    weighted = samples[..., :3].astype(np.uint64) @ np.array([19595, 38470, 7471], np.uint64)
    full = 255 if white <= 255 else 65535
    luma = np.minimum((weighted * full // white + (1 << 15)) >> 16, full)
    return luma.astype(np.uint8) if full == 255 else luma.astype(np.uint16)


def _padding(samples: np.ndarray, film: Dataset) -> NDArray[np.bool_]:
    """True where a sample is padding: one value, or all from it to the limit (PS3.3 C.7.5.1.1.2)."""
    value, limit = film.get("PixelPaddingValue"), film.get("PixelPaddingRangeLimit")
    if value is None:
        return np.zeros(samples.shape, bool)
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return (samples >= low) & (samples <= high)


def _shown(samples: np.ndarray, padded: np.ndarray, film: Dataset) -> NDArray[np.float64]:
    """Return the values after modality and VOI transformation, in 0…1."""
    values = _modality(samples, film)
    if film.get("VOILUTSequence"):
        entries, depth = _looked_up(values, film.VOILUTSequence[0], film)
        return np.minimum(entries / (2**depth - 1), 1)
    center, width = _first_number(film, "WindowCenter"), _first_number(film, "WindowWidth")
    if center is not None and width is not None:
        return _windowed(values, center, width, str(film.get("VOILUTFunction") or "LINEAR").upper())
    bits = int(film.BitsStored)
    if bits <= 8 and int(film.PixelRepresentation) == 0 and "ModalityLUTSequence" not in film:
        inside = _modality(np.array([0, 2**bits - 1]), film)  # a slope may be negative
    else:
        inside = values[~padded]
    low, high = (float(inside.min()), float(inside.max())) if inside.size else (0.0, 0.0)
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)


def _modality(samples: np.ndarray, film: Dataset) -> NDArray[np.float64]:
    """Return the values after the modality LUT or the rescaling (PS3.3 C.11.1)."""
    if film.get("ModalityLUTSequence"):
        return _looked_up(samples, film.ModalityLUTSequence[0], film)[0]
    values = samples.astype(np.float64)
    slope, intercept = _first_number(film, "RescaleSlope"), _first_number(film, "RescaleIntercept")
    if slope is None or intercept is None or not values.size:
        return values
    low, high = (float(end) * slope + intercept for end in (values.min(), values.max()))
    if slope == 0 or not np.isfinite([low, high, high - low]).all() or (low == high and values.min() < values.max()):
        raise ValueError(f"the rescaling with slope {slope} and intercept {intercept} is not possible")
    return values * slope + intercept


def _looked_up(values: np.ndarray, table: Dataset, film: Dataset) -> tuple[NDArray[np.float64], int]:
    """Return each value's entry in a lookup table, and the bits of an entry (PS3.3 C.11.1.1, C.11.2.1.1)."""
    n, first, depth = (int(number) for number in table.LUTDescriptor)
    n = n % 65536 or 65536
    if not 8 <= depth <= 16:
        raise ValueError(f"a lookup table of {depth} bits is not known")
    data, order = table.LUTData, "<"
    if isinstance(data, bytes):
        order = "<" if film.file_meta.TransferSyntaxUID.is_little_endian else ">"
    else:
        data = (np.atleast_1d(data).astype(np.int64) & 0xFFFF).astype("<u2").tobytes()
    packed = depth == 8 and len(data) < 2 * n  # two entries a word
    entries = np.frombuffer(data, np.uint8 if packed else f"{order}u2")[:n]
    if entries.size < n:
        raise ValueError(f"truncated: a lookup table holds {entries.size} of {n} entries")
    return entries[np.clip(np.rint(values).astype(np.int64) - first, 0, n - 1)].astype(np.float64), depth


def _first_number(film: Dataset, field: str) -> float | None:
    value = film.get(field)
    if value is None or value == "":
        return None
    return float(value[0]) if hasattr(value, "__getitem__") and not isinstance(value, str) else float(value)


def _windowed(values: NDArray[np.float64], center: float, width: float, function: str) -> NDArray[np.float64]:
    """Map a window to 0…1 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if not (np.isfinite(center) and np.isfinite(width)) or width < (1 if function == "LINEAR" else 1e-9):
        raise ValueError(f"the window {center}/{width} is not possible")
    if function == "LINEAR":
        if width == 1:
            return (values > center - 0.5).astype(np.float64)
        return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0, 1)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    raise ValueError(f"the VOI LUT function {function} is not known")
