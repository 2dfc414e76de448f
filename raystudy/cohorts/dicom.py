"""DICOM films: who is on them (source kind ``dicom``) and their decoding.

In flow a folder whose topmost folders name the findings, or a table; out flow the checked rows, or one film's samples.
Only the header fields listed here are read: names, dates and other identifying fields stay in the file.  pydicom and
its plug-ins come with the extra ``raystudy[dicom]`` and are imported when the first DICOM file is read.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from raystudy.cohorts.dicom_file import plain_file
from raystudy.cohorts.dicom_frame import announced, unpack_rle
from raystudy.cohorts.dicom_grey import grey
from raystudy.cohorts.manifest import canonical_splits, canonical_views, read_findings, refuse_unknown
from raystudy.cohorts.settings import DicomSource
from raystudy.cohorts.tables import SourceTable, checked_rows, path_stays_below, refuse_rows
from raystudy.cohorts.text_table import read_text_table
from raystudy.cohorts.vocabulary import parse_labels
from raystudy.errors import StudyError
from raystudy.storage import Storage, open_storage

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

HEADER_FIELDS = ["PatientID", "ViewPosition", "Modality", "Rows", "Columns"]
PIXEL_FIELDS = [
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration", "PhotometricInterpretation",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "VOILUTFunction", "WindowCenter",
    "WindowWidth",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData", "PixelData",
]  # fmt: skip
RADIOGRAPHS = ("CR", "DX", "RG", "OT", "")
COLUMNS_TAG = 0x00280011  # the last of HEADER_FIELDS in a file
SIZE_FIELDS = ["SamplesPerPixel", "Rows", "Columns", "BitsAllocated"]
BITS_ALLOCATED_TAG = 0x00280100  # the last of SIZE_FIELDS in a file
HEAD_BYTES = 1 << 16
LONG_HEAD_BYTES = 1 << 24  # of a file whose private fields or tables stand before the image's size
READERS = 16
RLE = "1.2.840.10008.1.2.5"
# What pydicom and its decoders raise, beside pydicom's own errors, on bytes that are no sound DICOM film.
_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NotImplementedError, OSError, RuntimeError,
    TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip
_NO_MEMORY = ("Unable to allocate", "bad_alloc")  # numpy's words and C++'s


def read_dicom(name: str, source: DicomSource, drop_duplicates: bool = False) -> SourceTable:
    """Read the rows of a DICOM source.

    Raises
    ------
    StudyError : a table or folder that cannot be read, files that are no DICOM radiographs, rows that break a rule.
    """
    root = open_storage(source.root)
    raw, where = _folder_rows(root, source) if source.table is None else _table_rows(root, source.table, source)
    rows = checked_rows(name, raw, root, where, drop_duplicates)
    return SourceTable(name, rows, (f"{len(raw)} DICOM files of {where}",))


def _folder_rows(root: Storage, source: DicomSource) -> tuple[pd.DataFrame, str]:
    where = root.uri
    files = pd.Series([f for f in root.list() if f.rpartition("/")[2] != "DICOMDIR"], dtype="str")
    if files.empty:
        raise StudyError("there are no files here", where=where, remedy="name the folder of the DICOM files as `root`")
    loose = ~files.str.contains("/")
    if loose.any():
        refuse_rows(
            "the file lies in no folder that names its finding", files[loose], where, "sort it, or give a `table`"
        )
    folder = files.str.partition("/")[0]
    found, unknown = parse_labels(folder, source.separator, source.findings)
    if unknown:
        refuse_unknown(folder, unknown, where)
    headers = _read_headers(root, files, where)
    return pd.DataFrame(
        {
            "path": files,
            "original": files,
            "patient": headers["patient"],
            "view": canonical_views(headers, "view", "", where),
            "split": "",
            "found": found,
            "uncertain": 0,
            "negated": 0,
        }
    ), where


def _table_rows(root: Storage, table: str, source: DicomSource) -> tuple[pd.DataFrame, str]:
    where, columns = root.address(table), source.columns
    wanted = [c for c in columns.model_dump().values() if c is not None]
    frame = read_text_table(root, table, [*wanted, *source.finding_columns], source.separator)
    files = frame[columns.file].str.replace(r"^(\./)+", "", regex=True)
    bad = ~path_stays_below(files)
    if bad.any():
        refuse_rows("the file must be relative and stay below its root", files[bad], where)
    masks = read_findings(
        frame, columns.findings, columns.uncertain, source.finding_columns, source.findings, source.separator, where
    )
    headers = pd.DataFrame(index=frame.index)
    if columns.patient is None or columns.view is None:
        headers = _read_headers(root, files, where)
    views, view = (frame, columns.view) if columns.view is not None else (headers, "view")
    return pd.DataFrame(
        {
            "path": files,
            "original": files,
            "patient": frame[columns.patient] if columns.patient is not None else headers["patient"],
            "view": canonical_views(views, view, "", where),
            "split": canonical_splits(frame, columns.split, where),
            **masks,
        }
    ), where


def _read_headers(root: Storage, files: pd.Series, where: str) -> pd.DataFrame:
    """Return patient and view of each file, (N, 2) text."""
    _require_pydicom()
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda path: _header(root, path), files))
    failed = np.array([isinstance(f, str) for f in found], bool)
    if failed.any():
        reasons = pd.Series([f"{p}: {f}" for p, f in zip(files, found, strict=True)], index=files.index)[failed]
        refuse_rows("the file is no DICOM radiograph", reasons, where)
    return pd.DataFrame(found, columns=["patient", "view"], index=files.index, dtype="str")


def _header(root: Storage, path: str) -> tuple[str, str] | str:
    """Return (patient, view), or the reason why the file cannot be used."""
    from pydicom.errors import BytesLengthException

    try:
        head = root.read_head(path, HEAD_BYTES)
        try:
            fields = _fields(head)
        except (*_DAMAGE, BytesLengthException):
            if len(head) < HEAD_BYTES:
                raise
            fields = None  # the cut may lie inside a sequence
        fields = fields or _fields(root.read_head(path, LONG_HEAD_BYTES))
    except FileNotFoundError:
        return "there is no such file"
    except (*_DAMAGE, BytesLengthException) as error:
        return " ".join(str(error).split())[:120] or type(error).__name__
    if fields is None:
        return "it holds no image"
    patient, view, modality = fields
    if modality not in RADIOGRAPHS:
        return f"its modality is {modality}"
    return patient, view


def _fields(head: bytes) -> tuple[str, str, str] | None:
    """Return patient, view and modality; None when the image's size does not stand in this head of a file."""
    from pydicom.filereader import read_partial
    from pydicom.tag import Tag

    tags: list[Any] = [Tag(field) for field in HEADER_FIELDS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = io.BytesIO(plain_file(head, LONG_HEAD_BYTES).data)
        header = read_partial(file, lambda tag, vr, length: tag > COLUMNS_TAG, specific_tags=tags)
        if "Rows" not in header or "Columns" not in header:
            return None
        values = (header.get(field) for field in ("PatientID", "ViewPosition", "Modality"))
        patient, view, modality = ("" if value is None else str(value).strip() for value in values)
    return patient, view, modality


def decode_dicom(data: bytes, pixel_cap: int | None = None) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Decode one DICOM film to grey, black = 0.

    The modality transformation comes first, then the first VOI LUT, or else the first window, over the full range of
    the result.  Where there is neither, samples of up to 8 bits keep their place in the range of their bits and deeper
    ones run from the film's smallest value to its largest.  MONOCHROME1 is inverted; padding is black; colour becomes
    ITU-R 601 luma (PS3.3 C.11.1-2).

    Parameters
    ----------
    pixel_cap : the most pixels that a header may announce.

    Returns
    -------
    (H, W) : uint8 for samples of up to 8 bits, else uint16 over 0…65535.

    Raises
    ------
    ValueError : a file that is damaged, has no or several frames, or exceeds the cap.
    StudyError : the extra, or the plug-in for this compression, is not installed.
    MemoryError : the machine has too little memory.
    """
    _require_pydicom()
    from pydicom.errors import BytesLengthException
    from pydicom.pixels.decoders.base import get_decoder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            film = _read(data, pixel_cap)
            _check_image(film, pixel_cap)
            syntax = film.file_meta.TransferSyntaxUID
            if syntax.is_encapsulated and syntax != RLE and "pylibjpeg" not in get_decoder(syntax).available_plugins:
                raise StudyError(
                    f"no plug-in can read DICOM compressed as {syntax.name}", remedy="pip install 'raystudy[dicom]'"
                )
            native = not syntax.is_encapsulated or syntax == RLE
            if syntax.is_encapsulated:
                _check_frame(film)
            return grey(film, native)
        except (*_DAMAGE, BytesLengthException) as error:
            if any(sign in str(error) for sign in _NO_MEMORY):  # pydicom makes one error of all that a plug-in raises
                raise MemoryError(str(error)) from error
            text = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"DICOM: {text}") from error


def _read(data: bytes, pixel_cap: int | None) -> Dataset:
    from pydicom import dcmread

    file = plain_file(data, LONG_HEAD_BYTES)
    if not file.whole and len(file.data) > LONG_HEAD_BYTES:
        limit = _pixel_bytes(file.data, pixel_cap) + LONG_HEAD_BYTES
        file = plain_file(data, limit)
        if not file.whole and len(file.data) > limit:
            raise ValueError("decompression bomb: the deflated data set is larger than its header says")
    if not file.whole:
        raise ValueError("truncated: the file ends inside its deflated data set")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "End of file reached")  # pydicom would go on without the data set
        try:
            return dcmread(io.BytesIO(file.data), specific_tags=PIXEL_FIELDS)
        except UserWarning as warning:
            raise ValueError("truncated: the file ends inside its data") from warning


def _require_pydicom() -> None:
    try:
        import pydicom  # noqa: F401 (only whether it is there)
    except ImportError:
        raise StudyError("reading DICOM needs the extra `dicom`", remedy="pip install 'raystudy[dicom]'") from None


def _pixel_bytes(head: bytes, pixel_cap: int | None) -> int:
    """Return the bytes of the pixels that the head of a file announces."""
    from pydicom.filereader import read_partial
    from pydicom.tag import Tag

    tags: list[Any] = [Tag(field) for field in SIZE_FIELDS]
    film = read_partial(io.BytesIO(head), lambda tag, vr, length: tag > BITS_ALLOCATED_TAG, specific_tags=tags)
    if "Rows" not in film or "Columns" not in film or "BitsAllocated" not in film:
        raise ValueError(f"decompression bomb: the deflated data set says no size in its first {len(head)} bytes")
    _check_size(film, pixel_cap)
    return int(film.Rows) * int(film.Columns) * _samples(film) * -(-int(film.BitsAllocated) // 8)


def _samples(film: Dataset) -> int:
    return int(film.get("SamplesPerPixel") or 1)


def _check_size(film: Dataset, pixel_cap: int | None) -> None:
    rows, columns, bits = int(film.Rows), int(film.Columns), int(film.BitsAllocated)
    if pixel_cap is not None and rows * columns > pixel_cap:
        raise ValueError(f"decompression bomb: {columns} × {rows}, the cap is {pixel_cap} pixels")
    if _samples(film) not in (1, 3) or bits not in (1, 8, 16, 32):
        raise ValueError(f"{_samples(film)} samples of {bits} bits a pixel are not read")


def _check_image(film: Dataset, pixel_cap: int | None) -> None:
    if "PixelData" not in film or "Rows" not in film or "Columns" not in film:
        raise ValueError("it holds no image")
    _check_size(film, pixel_cap)
    if int(film.get("NumberOfFrames") or 1) != 1:
        raise ValueError(f"animated: {film.NumberOfFrames} frames")


def _check_frame(film: Dataset) -> None:
    """Refuse a compressed frame of another size than the header's: decoders would make room for the frame's own.

    RLE is decoded here: pydicom's decoder knows no bounds, and the compiled one aborts on damaged segments.
    """
    from pydicom.encaps import generate_frames
    from pydicom.uid import ExplicitVRLittleEndian

    frames = generate_frames(film.PixelData, number_of_frames=1)
    frame = next(frames)
    if next(frames, None) is not None:
        raise ValueError("animated: its pixel data holds several frames")
    rows, columns, samples = int(film.Rows), int(film.Columns), _samples(film)
    if film.file_meta.TransferSyntaxUID == RLE:
        film.PixelData = unpack_rle(frame, rows * columns, samples, int(film.BitsAllocated))
        film.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        if samples > 1:
            film.PlanarConfiguration = 1
        return
    found = announced(frame)
    if (found.width, found.height) != (columns, rows):
        raise ValueError(f"the header says {columns} × {rows}, its compressed frame {found.width} × {found.height}")
    if found.components != samples:
        raise ValueError(f"the header says {samples} samples a pixel, its compressed frame {found.components}")
