"""DICOM films for tests: as a detector would write them, and with parts that disagree."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

RAMP = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)  # every 12-bit value once


def film(pixels: NDArray[Any] = RAMP, *, bits: int = 12, **fields: Any) -> Any:
    """Return a radiograph as a detector would write it."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["raystudy"])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.PatientID, dataset.PatientName, dataset.ViewPosition = "CR", "p1", "Secret^Name", "PA"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    if pixels.ndim == 3:
        dataset.SamplesPerPixel, dataset.PlanarConfiguration, dataset.PhotometricInterpretation = 3, 0, "RGB"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = pixels.itemsize * 8, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(dataset, name, value)
    return dataset


def written(dataset: Any) -> bytes:
    sink = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of odd values, which are the point here
        dataset.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def deflated(dataset: Any) -> Any:
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    return dataset


def encapsulated(frames: bytes | list[bytes], syntax: str, pixels: NDArray[Any] = RAMP, **fields: Any) -> bytes:
    """Return a film whose compressed frames are these, whatever its header says."""
    from pydicom.encaps import encapsulate

    dataset = film(pixels, **fields)
    dataset.PixelData = encapsulate([frames] if isinstance(frames, bytes) else frames)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    return written(dataset)
