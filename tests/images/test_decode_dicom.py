"""DICOM films take the same way as PNG and JPEG: same picture, same refusals."""

from __future__ import annotations

import io

import numpy as np
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from raystudy.images.decode import Unreadable, decode_film
from raystudy.images.settings import ImageSettings
from raystudy.streams import stream
from tests.images.films import encoded, film

SETTINGS = ImageSettings(size=48)


def dicom(samples: np.ndarray, compress: str = "", deflated: bool = False, **fields: object) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    data.Modality, data.PhotometricInterpretation, data.SamplesPerPixel = "CR", "MONOCHROME2", 1
    data.Rows, data.Columns = samples.shape
    bits = samples.dtype.itemsize * 8
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = bits, bits, bits - 1, 0
    data.PixelData = samples.tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    if deflated:
        meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    if compress:
        data.compress(compress)
    sink = io.BytesIO()
    data.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def test_a_dicom_film_looks_like_the_same_film_as_png() -> None:
    picture = film(stream(3, "films"), 96, 80)
    expected = decode_film(encoded(picture, "PNG"), "a.png", SETTINGS)
    for name in ("a.dcm", "a", "1.2.840.10008.5"):
        np.testing.assert_array_equal(decode_film(dicom(picture), name, SETTINGS), expected)
    deep = dicom(picture.astype(np.uint16) * 257, WindowCenter=32768, WindowWidth=65536)
    assert np.abs(decode_film(deep, "a.dcm", SETTINGS).astype(int) - expected).max() <= 1
    inverted = dicom(255 - picture, PhotometricInterpretation="MONOCHROME1")
    assert np.abs(decode_film(inverted, "a.dcm", SETTINGS).astype(int) - expected).max() <= 1


def test_a_dicom_film_is_refused_by_the_same_rules() -> None:
    picture = film(stream(3, "films"), 96, 80)
    compressed = dicom(picture, compress=RLELossless)
    deflated = dicom(picture, deflated=True)
    for data, name, reason in (
        (dicom(picture)[:-500], "a.dcm", "truncated: "),
        (compressed[:-500], "a.dcm", "truncated: "),
        (deflated[:-500], "a.dcm", "truncated: "),
        (dicom(picture), "a.png", "wrong extension"),
        (dicom(picture, Rows=60000, Columns=60000), "a.dcm", "decompression bomb"),
        (dicom(picture[:8]), "a.dcm", "too small: 96 × 8"),
    ):
        with pytest.raises(Unreadable, match=reason):
            decode_film(data, name, SETTINGS)
