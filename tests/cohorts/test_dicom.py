from __future__ import annotations

import builtins
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from raystudy.cohorts.dicom import HEAD_BYTES, HEADER_FIELDS, PIXEL_FIELDS, decode_dicom, read_dicom
from raystudy.cohorts.tables import SourceTable
from raystudy.cohorts.vocabulary import names
from raystudy.errors import StudyError
from raystudy.object_stores import LocalFolder
from tests.cohorts.dicom_films import RAMP, deflated, film, written
from tests.cohorts.hospitals import source

pydicom = pytest.importorskip("pydicom", reason="the extra raystudy[dicom] is not installed")
RNG = np.random.default_rng(0)


def decoded(*args: Any, **fields: Any) -> NDArray[Any]:
    return decode_dicom(written(film(*args, **fields)))


def test_deep_samples_without_a_window_run_from_black_to_white() -> None:
    grey = decoded()
    assert (grey.dtype, grey.shape, int(grey.min()), int(grey.max())) == (np.uint16, (64, 64), 0, 65535)
    assert np.array_equal(grey, np.rint(RAMP / 4095 * 65535))


def test_eight_bit_samples_without_a_window_are_kept() -> None:
    pixels = (RAMP // 32 + 50).astype(np.uint8)
    assert np.array_equal(decoded(pixels, bits=8), pixels)


def test_eight_bit_samples_follow_their_rescaling_and_the_range_of_their_bits() -> None:
    pixels = (RAMP // 32 + 50).astype(np.uint8)
    assert np.array_equal(decoded(pixels, bits=8, RescaleSlope=3, RescaleIntercept=-7), pixels)
    assert np.array_equal(decoded(pixels, bits=8, RescaleSlope=-1, RescaleIntercept=255), 255 - pixels)
    six = (RAMP // 64).astype(np.uint8)
    assert np.array_equal(decoded(six, bits=6), np.rint(six / 63 * 255))


def test_monochrome1_is_inverted() -> None:
    assert np.array_equal(decoded(PhotometricInterpretation="MONOCHROME1"), 65535 - decoded())


def window(x: NDArray[Any], center: float, width: float, function: str) -> NDArray[Any]:
    """The standard's pseudo-code (PS3.3 C.11.2.1.2, C.11.2.1.3) with y from 0 to 1."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (x - center) / width))
    c, w = (center - 0.5, width - 1) if function == "LINEAR" else (center, width)
    y = (x - c) / w + 0.5
    return np.where(x <= c - w / 2, 0, np.where(x > c + w / 2, 1, y))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_is_applied_after_the_rescaling(function: str) -> None:
    fields = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 1500, "WindowWidth": 3000}
    expected = window(RAMP * 2.0 - 1000, 1500, 3000, function)
    assert np.allclose(decoded(**fields, VOILUTFunction=function) / 65535, expected, atol=1e-5)


def test_first_of_several_windows_is_taken_and_signed_samples_are_allowed() -> None:
    pixels = (RAMP.astype(np.int32) - 2048).astype(np.int16)
    grey = decoded(pixels, WindowCenter=[0, 100], WindowWidth=[1000, 50])
    assert np.allclose(grey / 65535, window(pixels.astype(float), 0, 1000, "LINEAR"), atol=1e-5)


def lut(depth: int, entries: Any, first: int = 0, kind: str = "US") -> Any:
    from pydicom.dataset import Dataset

    table = Dataset()
    table.add_new("LUTDescriptor", kind, [len(entries) % 65536, first, depth])
    table.add_new("LUTData", "OW" if isinstance(entries, bytes) else "US", entries)
    return table


@pytest.mark.parametrize("depth", [8, 12, 16])
@pytest.mark.parametrize("rescaling", [{}, {"RescaleSlope": 1, "RescaleIntercept": 0}])
def test_voi_lut_goes_before_a_window(depth: int, rescaling: dict[str, int]) -> None:
    full = 2**depth - 1
    entries = np.minimum(np.arange(4096) * 2 * full // 4095, full).astype("<u2")
    table = lut(depth, entries.tolist())
    grey = decoded(VOILUTSequence=[table], WindowCenter=10, WindowWidth=5, **rescaling)
    assert np.array_equal(grey, np.rint(entries[RAMP] / full * 65535))
    table.add_new("LUTData", "OW", entries.tobytes())
    assert np.array_equal(decoded(VOILUTSequence=[table], **rescaling), grey)


def test_a_lut_may_begin_at_a_negative_value_and_ends_with_its_last_entry() -> None:
    pixels = (RAMP.astype(np.int32) - 2048).astype(np.int16)
    entries = np.arange(0, 3000, 3)  # for the values -500…499
    grey = decoded(pixels, VOILUTSequence=[lut(12, entries.tolist(), first=-500, kind="SS")])
    assert np.array_equal(grey, np.rint(entries[np.clip(pixels + 500, 0, 999)] / 4095 * 65535))
    short = lut(12, [0] * 20)
    short.add_new("LUTData", "US", [0] * 10)
    with pytest.raises(ValueError, match="a lookup table holds 10 of 20 entries"):
        decoded(VOILUTSequence=[short])


def test_a_modality_lut_may_be_packed_and_goes_before_the_window() -> None:
    pixels = (RAMP // 16).astype(np.uint8)
    packed = lut(8, bytes(255 - k for k in range(256)))
    assert np.array_equal(decoded(pixels, bits=8, ModalityLUTSequence=[packed], WindowCenter=128, WindowWidth=256),
                          255 - pixels)  # fmt: skip
    deep = lut(16, [16 * k for k in range(4096)])
    grey = decoded(ModalityLUTSequence=[deep], WindowCenter=32768, WindowWidth=65536)
    assert np.array_equal(grey, RAMP * 16)


@pytest.mark.parametrize("fields", [{}, {"WindowCenter": 1000, "WindowWidth": 900}, {"BitsAllocated": 16}])
@pytest.mark.parametrize("shift", [1, 4])
def test_samples_may_lie_left_in_their_words(fields: dict[str, Any], shift: int) -> None:
    left = (RAMP << shift) | 1  # an overlay in the bits that are not stored
    assert np.array_equal(decoded(left, HighBit=11 + shift, **fields), decoded(**fields))
    signed = (RAMP.astype(np.int32) - 2048).astype(np.int16)
    assert np.array_equal(decoded(signed << shift, HighBit=11 + shift, **fields), decoded(signed, **fields))
    dataset = film(left, HighBit=11 + shift, **fields)
    dataset.compress("1.2.840.10008.1.2.5", encoding_plugin="pydicom")
    assert np.array_equal(decode_dicom(written(dataset)), decoded(**fields))


@pytest.mark.parametrize("high", [3, 16])
def test_a_high_bit_that_does_not_fit_is_refused(high: int) -> None:
    with pytest.raises(ValueError, match=f"its high bit {high} does not fit 12 bits stored of 16 allocated"):
        decoded(HighBit=high)
    compressed = film()
    compressed.compress("1.2.840.10008.1.2.4.90")
    compressed.HighBit = 15
    with pytest.raises(ValueError, match="its high bit 15 does not fit"):
        decode_dicom(written(compressed))


@pytest.mark.parametrize("slope", ["NaN", "inf", "1e308", "0", "1e-300"])
@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 2000, "WindowWidth": 4000}])
@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
def test_an_impossible_rescaling_is_refused(slope: str, bits: int, window: dict[str, int]) -> None:
    pixels = RAMP if bits == 12 else (RAMP // 16).astype(np.uint8)
    with pytest.raises(ValueError, match=r"the rescaling with slope .* and intercept 7.0 is not possible"):
        decoded(pixels, bits=bits, RescaleSlope=slope, RescaleIntercept="7", **window)
    with pytest.raises(ValueError, match=r"the rescaling with slope 1.0 and intercept (inf|nan) is not possible"):
        decoded(pixels, bits=bits, RescaleSlope=1, RescaleIntercept="NaN" if window else "inf", **window)


def test_padding_is_black_and_does_not_stretch_the_rest() -> None:
    pixels = RAMP.copy() // 4 + 100
    pixels[:, :8] = 4095
    for kind in ("MONOCHROME1", "MONOCHROME2"):
        grey = decoded(pixels, PixelPaddingValue=4095, PhotometricInterpretation=kind)
        assert (grey[:, :8] == 0).all()
        assert (grey[:, 8:].min(), grey[:, 8:].max()) == (0, 65535)


def test_padding_may_be_a_range() -> None:
    pixels = RAMP.copy() // 4 + 100
    pixels[:, :8] = np.arange(8) + 4000
    grey = decoded(pixels, PixelPaddingValue=4000, PixelPaddingRangeLimit=4007)
    assert (grey[:, :8] == 0).all()
    assert (grey[:, 8:].min(), grey[:, 8:].max()) == (0, 65535)


def test_colour_of_twelve_bits_reaches_white() -> None:
    pixels = np.stack([RAMP, RAMP, RAMP], -1)
    grey = decoded(pixels, bits=12)
    assert grey.dtype == np.uint16
    assert np.abs(grey.astype(int) - np.rint(RAMP / 4095 * 65535)).max() <= 1


def test_colour_becomes_luma() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    luma = (pixels @ np.array([0.299, 0.587, 0.114])).round()
    assert np.abs(decoded(pixels, bits=8).astype(int) - luma).max() <= 1


@pytest.mark.parametrize(
    ("syntax", "lossless"),
    [("RLELossless", True), ("JPEG2000Lossless", True), ("DeflatedExplicitVRLittleEndian", True)],
)
def test_compressed_films_give_the_same_grey(syntax: str, lossless: bool) -> None:
    import pydicom.uid

    dataset = film()
    uid = getattr(pydicom.uid, syntax)
    if uid.is_encapsulated:
        dataset.compress(uid, encoding_plugin="pylibjpeg")
    else:
        dataset.file_meta.TransferSyntaxUID = uid
    assert np.array_equal(decode_dicom(written(dataset)), decoded()) == lossless


SHIPPED = {  # what pydicom ships, by compression
    "JPEG lossy 8 bit": "SC_rgb_jpeg.dcm", "JPEG lossy 12 bit": "JPGExtended.dcm", "JPEG 2000": "JPEG2000.dcm",
    "JPEG-LS": "MR_small_jpeg_ls_lossless.dcm", "JPEG-LS near": "JPEGLSNearLossless_16.dcm", "RLE": "MR_small_RLE.dcm",
    "JPEG 2000 lossless": "MR_small_jp2klossless.dcm", "big endian": "MR_small_bigendian.dcm", "CT": "CT_small.dcm",
    "RLE colour": "SC_rgb_rle.dcm", "YBR": "SC_ybr_full_422_uncompressed.dcm", "palette": "examples_palette.dcm",
    "implicit": "MR_small_implicit.dcm", "deflated": "image_dfl.dcm",
}  # fmt: skip


def shipped(name: str) -> bytes:
    from pydicom.data import get_testdata_file

    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    return Path(path).read_bytes()


@pytest.mark.parametrize("name", SHIPPED.values(), ids=SHIPPED)
def test_files_that_pydicom_ships_are_decoded(name: str) -> None:
    grey = decode_dicom(shipped(name))
    assert grey.ndim == 2
    assert grey.dtype in (np.uint8, np.uint16)
    assert grey.max() > grey.min()


@pytest.mark.parametrize(("name", "frames"), [("examples_ybr_color.dcm", 30), ("SC_rgb_rle_2frame.dcm", 2)])
def test_a_film_of_several_frames_is_refused_as_such(name: str, frames: int) -> None:
    with pytest.raises(ValueError, match=f"^DICOM: animated: {frames} frames$"):
        decode_dicom(shipped(name))


def test_lossless_compressions_of_one_shipped_film_agree() -> None:
    plain = decode_dicom(shipped("MR_small.dcm"))
    for kind in ("RLE", "jpeg_ls_lossless", "jp2klossless", "bigendian"):
        assert np.array_equal(decode_dicom(shipped(f"MR_small_{kind}.dcm")), plain)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "DICOM"),
        (b"not a film at all" * 20, "DICOM"),
        (written(film())[:6000], "DICOM"),
        (written(film(NumberOfFrames=7)), "animated: 7 frames"),
        (written(film(PhotometricInterpretation="XYZ")), "Photometric Interpretation.*XYZ"),
        (written(film(WindowCenter=1, WindowWidth=0)), "window"),
        (written(film(WindowCenter=1, WindowWidth=5, VOILUTFunction="WAVY")), "WAVY"),
        (written(film(Rows=0)), "DICOM"),
    ],
)
def test_damaged_and_unsuitable_files_are_refused_with_their_reason(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_dicom(data)


def test_truncated_and_flipped_bytes_never_give_anything_but_a_film_or_a_reason() -> None:
    rng = np.random.default_rng(0)
    originals = [shipped(name) for name in ("JPEG2000.dcm", "MR_small_RLE.dcm", "SC_rgb_jpeg.dcm", "CT_small.dcm")]
    refused = 0
    for k in range(120):
        data = bytearray(originals[k % 4])
        for place in rng.integers(128, len(data), 4):
            data[place] = int(rng.integers(256))
        cut = int(rng.integers(200, len(data))) if k % 3 == 0 else len(data)
        try:
            assert decode_dicom(bytes(data[:cut]), pixel_cap=4_000_000).ndim == 2
        except ValueError as error:
            refused += str(error).startswith("DICOM: ")
    assert refused > 30


def without_group_length(data: bytes) -> bytes:
    """A file whose meta information does not say how long it is: the inflater must not be found by that."""
    assert data[132:136] == b"\2\0\0\0"
    return data[:132] + data[144:]


@pytest.mark.parametrize("change", [bytes, without_group_length])
def test_pixel_cap_is_checked_on_the_header_and_inside_deflated_files(change: Any) -> None:
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_dicom(written(film()), pixel_cap=4095)
    data = change(written(deflated(film(np.zeros((3000, 3000), np.uint16)))))
    assert len(data) < 100_000
    with pytest.raises(ValueError, match="decompression bomb: 3000 × 3000"):
        decode_dicom(data, pixel_cap=10_000)
    small = film()
    assert np.array_equal(decode_dicom(change(written(deflated(small)))), decoded())


def test_a_header_reads_no_more_of_a_bomb_than_a_head(folder: Path) -> None:
    zeros = film(PatientID="b", ViewPosition="AP")
    zeros.add_new((0x0009, 0x0010), "LO", "vendor")
    zeros.add_new((0x0009, 0x1001), "OB", bytes(200_000_000))
    for change in (bytes, without_group_length):
        (folder / "pneumonia" / "b.dcm").write_bytes(change(written(deflated(zeros))))
        tracemalloc.start()
        with pytest.raises(StudyError, match=r"b\.dcm: it holds no image"):
            read(folder)
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
        tracemalloc.stop()


FRAMES = {  # file, what marks the frame's own size, the place of the height's lower two bytes behind it
    "JPEG": ("SC_rgb_jpeg.dcm", b"\xff\xc0", 5),
    "JPEG, 12 bit": ("JPGExtended.dcm", b"\xff\xc1", 5),
    "JPEG-LS": ("MR_small_jpeg_ls_lossless.dcm", b"\xff\xf7", 5),
    "JPEG 2000": ("JPEG2000.dcm", b"\xff\x4f\xff\x51", 14),
}


@pytest.mark.parametrize(("name", "mark", "place"), FRAMES.values(), ids=FRAMES)
def test_a_compressed_frame_must_have_the_size_of_the_header(name: str, mark: bytes, place: int) -> None:
    data = bytearray(shipped(name))
    decode_dicom(bytes(data))
    at = data.index(mark, data.index(b"\xff\xd8\xff" if mark[1] != 0x4F else mark)) + place
    data[at : at + 2] = b"\x7f\xff"
    with pytest.raises(ValueError, match=r"the header says \d+ × \d+, its compressed frame \d+ × 32767"):
        decode_dicom(bytes(data), pixel_cap=2_000_000)


def test_missing_extra_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    data, real = written(film()), builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == "pydicom":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(StudyError, match=r"pip install 'raystudy\[dicom\]'"):
        decode_dicom(data)


def read(root: Path, **settings: Any) -> SourceTable:
    return read_dicom("H1", source(kind="dicom", root=str(root), **settings))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for finding, patient, view in (("pneumonia", "a", "PA"), ("pneumonia", "b", "AP"), ("normal", "c", "")):
        path = tmp_path / "films" / finding / f"{patient}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(written(film(PatientID=patient, ViewPosition=view)))
    return tmp_path / "films"


def test_folder_names_give_the_findings_and_headers_the_patients(folder: Path) -> None:
    (folder / "DICOMDIR").write_bytes(b"x")
    rows = read(folder).rows
    assert rows["image_id"].tolist() == ["H1/normal/c.dcm", "H1/pneumonia/a.dcm", "H1/pneumonia/b.dcm"]
    assert rows["patient_id"].tolist() == ["H1:c", "H1:a", "H1:b"]
    assert rows["view"].tolist() == ["", "PA", "AP"]
    assert [names(m) for m in rows["found"]] == [["no_finding"], ["pneumonia"], ["pneumonia"]]


def test_films_of_a_linked_folder_are_read_too(folder: Path) -> None:
    folder.joinpath("pneumonia").rename(folder.parent / "site2")
    (folder / "pneumonia").symlink_to(folder.parent / "site2")
    assert read(folder).rows["image_id"].tolist() == ["H1/normal/c.dcm", "H1/pneumonia/a.dcm", "H1/pneumonia/b.dcm"]


def test_a_patient_in_two_spellings_is_refused(folder: Path) -> None:
    (folder / "normal" / "c.dcm").write_bytes(written(film(PatientID="A")))
    with pytest.raises(StudyError, match=r"'A' \(row 1\) and 'a' \(row 2\)"):
        read(folder)


def test_headers_that_are_longer_than_the_first_read_are_read_whole(folder: Path) -> None:
    long = film(PatientID="a", ViewPosition="PA", ImageComments="x" * 10_000)
    long.add_new((0x0009, 0x0010), "LO", "vendor")
    long.add_new((0x0009, 0x1001), "OB", b"\1" * 200_000)
    (folder / "pneumonia" / "a.dcm").write_bytes(written(long))
    other = deflated(film(RNG.integers(0, 4096, (400, 400)).astype(np.uint16), PatientID="b", ViewPosition="AP"))
    (folder / "pneumonia" / "b.dcm").write_bytes(written(other))
    assert (folder / "pneumonia" / "b.dcm").stat().st_size > HEAD_BYTES
    rows = read(folder).rows
    assert rows["patient_id"].tolist() == ["H1:c", "H1:a", "H1:b"]
    assert rows["view"].tolist() == ["", "PA", "AP"]


@pytest.mark.parametrize("endless", [True, False])
def test_a_first_read_may_end_inside_a_sequence(folder: Path, endless: bool) -> None:
    from pydicom.dataset import Dataset

    items = [Dataset() for _ in range(1000)]
    for k, item in enumerate(items):
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = "1.2.3", f"1.2.1{k}{'3' * 50}"
    long = film(PatientID="a", ViewPosition="PA", ReferencedImageSequence=items)
    long["ReferencedImageSequence"].is_undefined_length = endless
    data = written(long)
    assert data.index(b"333") < HEAD_BYTES < data.index(b"\x28\0\x10\0US")
    (folder / "pneumonia" / "a.dcm").write_bytes(data)
    rows = read(folder).rows
    assert rows["patient_id"].tolist() == ["H1:c", "H1:a", "H1:b"]
    for damaged in (data[:HEAD_BYTES], data[: HEAD_BYTES - 100]):
        (folder / "pneumonia" / "a.dcm").write_bytes(damaged)
        with pytest.raises(StudyError, match=r"no DICOM radiograph.*a\.dcm"):
            read(folder)


def test_table_gives_findings_and_split_and_headers_the_rest(folder: Path) -> None:
    table = "file,labels,split\nnormal/c.dcm,No Finding,test\npneumonia/a.dcm,Edema|Mass,train\n"
    (folder / "t.csv").write_text(table)
    rows = read(folder, table="t.csv", columns={"findings": "labels", "split": "split"}).rows
    assert rows["patient_id"].tolist() == ["H1:c", "H1:a"]
    assert rows["split"].tolist() == ["test", "train"]
    assert names(rows["found"].iloc[1]) == ["edema", "mass"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pneumonia/x.dcm", b"hello", "no DICOM radiograph.*x.dcm"),
        ("pneumonia/x.dcm", lambda: written(film(Modality="CT")), "its modality is CT"),
        ("pneumonia/x.dcm", lambda: written(film(PatientID="")), "patient id is blank"),
        ("pneumonia/x.dcm", lambda: written(film(PatientID="Anonymous")), "placeholder"),
        ("pneumonia/x.dcm", lambda: written(film(ViewPosition="OBLIQUE")), "the view is not"),
        ("zopf/x.dcm", lambda: written(film()), "unknown findings 'zopf'"),
        ("x.dcm", lambda: written(film()), "lies in no folder"),
    ],
)
def test_files_that_break_a_rule_are_named(folder: Path, name: str, content: Any, message: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content())
    with pytest.raises(StudyError, match=message):
        read(folder)


@pytest.mark.parametrize("path", ["missing.dcm", "../films/pneumonia/a.dcm", "/etc/passwd"])
def test_files_of_a_table_must_be_there_and_below_the_root(folder: Path, path: str) -> None:
    (folder / "t.csv").write_text(f"file,labels\n{path},No Finding\n")
    with pytest.raises(StudyError, match=r"there is no such file|stay below its root"):
        read(folder, table="t.csv", columns={"findings": "labels"})


def test_storage_that_does_not_answer_is_no_fault_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> bytes:
        raise StudyError("no answer from the server", where="s3://films", remedy="start it")

    monkeypatch.setattr(LocalFolder, "read_head", away)
    with pytest.raises(StudyError, match="no answer from the server"):
        read(folder)


def test_no_identifying_field_is_on_the_allow_list() -> None:
    identifying = {"PatientName", "PatientBirthDate", "StudyDate", "InstitutionName", "AccessionNumber"}
    assert not identifying & {*HEADER_FIELDS, *PIXEL_FIELDS}
