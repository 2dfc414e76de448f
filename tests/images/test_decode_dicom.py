"""DICOM films take the same way as PNG and JPEG: same picture, same refusals."""

from __future__ import annotations

import builtins
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    generate_uid,
)

from raystudy.images import decode
from raystudy.images.decode import Unreadable, decode_film
from raystudy.images.prepare import decode_batch
from raystudy.images.settings import ImageSettings
from raystudy.images.store import pixels_key, read_catalog
from raystudy.storage import open_storage
from raystudy.streams import stream
from tests.images.films import encoded, film

SETTINGS = ImageSettings(size=48)


def dicom(samples: np.ndarray, compress: str = "", deflated: bool = False, **fields: object) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
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
        (dicom(picture, NumberOfFrames=7), "a.dcm", "animated: 7 frames"),
    ):
        with pytest.raises(Unreadable, match=f"^{reason}"):
            decode_film(data, name, SETTINGS)


def test_what_the_machine_lacks_is_no_property_of_the_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = film(stream(3, "films"), 96, 80)
    (tmp_path / "a.dcm").write_bytes(dicom(picture, compress=JPEG2000Lossless))
    storage, pixels = open_storage(tmp_path / "store"), pixels_key(SETTINGS)
    batch = pa.table({"uri": [str(tmp_path / "a.dcm")], "fingerprint": ["f"]})

    def without_pydicom(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "pydicom":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    def without_memory(*_: Any) -> Any:
        raise MemoryError

    def without_memory_in_the_plugin(*_: Any) -> Any:
        return np.empty(1 << 50)

    real, decoder = builtins.__import__, get_decoder(JPEG2000Lossless)
    plugin = {"pylibjpeg": without_memory_in_the_plugin, "pillow": without_memory_in_the_plugin}
    for target, name, value, what, remedy in (
        (builtins, "__import__", without_pydicom, "needs the extra `dicom`", "pip install"),
        (decoder, "_available", {"pillow": decoder._available["pillow"]}, "no plug-in can read", "pip install"),
        (decoder, "_available", plugin, "more memory", "pixel_cap"),
        (decode, "_squared", without_memory, "more memory", "pixel_cap"),
    ):
        with monkeypatch.context() as lacking:
            lacking.setattr(target, name, value)
            (answer,) = decode_batch(batch, SETTINGS, storage, pixels).to_pylist()
        assert answer["catalog"] == []
        assert what in answer["refusal"][0]
        assert answer["refusal"][1] == str(tmp_path / "a.dcm")
        assert remedy in answer["refusal"][2]
        assert read_catalog(storage, pixels).films.empty
    (row,) = decode_batch(batch, SETTINGS, storage, pixels).to_pylist()
    assert (row["films"], row["refusal"]) == (1, None)
    assert read_catalog(storage, pixels).films["reason"].isna().all()
