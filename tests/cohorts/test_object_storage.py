"""Hospitals whose tables and films lie in a bucket of a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from raystudy.cohorts.settings import CohortSettings
from raystudy.cohorts.sources import read_source
from raystudy.errors import StudyError
from raystudy.storage import open_storage
from tests.cohorts.hospitals import build, films_of, manifest, source
from tests.cohorts.test_nih import write


def test_a_bucket_gives_the_same_cohorts_as_a_folder(tmp_path: Path, s3_bucket: str) -> None:
    bucket = open_storage(s3_bucket)
    for name in ("a", "b"):
        films_of(name).to_csv(tmp_path / f"{name}.csv", index=False)
        bucket.write_bytes(f"{name}.csv", (tmp_path / f"{name}.csv").read_bytes())
    here, there = (
        build({"H1": manifest(root, "a.csv"), "H2": manifest(root, "b.csv")}) for root in (str(tmp_path), s3_bucket)
    )
    left, right = here.cohort("pneumonia", 30, 0), there.cohort("pneumonia", 30, 0)
    pd.testing.assert_frame_equal(left.drop(columns="uri"), right.drop(columns="uri"))
    assert right["uri"].str.removeprefix(s3_bucket).tolist() == left["uri"].str.removeprefix(str(tmp_path)).tolist()
    with pytest.raises(StudyError, match="no such table"):
        build({"H1": manifest(s3_bucket, "c.csv"), "H2": manifest(s3_bucket, "b.csv")})


def test_nih_films_in_a_bucket_are_found_by_base_name(tmp_path: Path, s3_bucket: str) -> None:
    bucket = open_storage(s3_bucket).child("nih")
    write(tmp_path)
    bucket.write_bytes("Data_Entry_2017_v2020.csv", (tmp_path / "Data_Entry_2017_v2020.csv").read_bytes())
    bucket.write_bytes("films/00000001_000.png", b"x")
    table = read_source("H1", source(kind="nih", root=bucket.uri), CohortSettings(), open_storage("nowhere"))
    assert table.rows["uri"].iloc[0] == f"{s3_bucket}/nih/films/00000001_000.png"


@pytest.mark.parametrize("kind", ["nih", "chexpert", "dicom"])
def test_a_missing_bucket_is_not_a_data_set_without_tables(kind: str, s3_bucket: str) -> None:
    wrong = source(kind=kind, root="s3://no-such-bucket/films")
    with pytest.raises(StudyError, match="no bucket 'no-such-bucket'"):
        read_source("H1", wrong, CohortSettings(), open_storage("nowhere"))
    empty = source(kind=kind, root=f"{s3_bucket}/films")
    with pytest.raises(StudyError, match=r"there (is|are) no"):
        read_source("H1", empty, CohortSettings(), open_storage("nowhere"))


def test_dicom_headers_are_read_from_a_bucket(s3_bucket: str) -> None:
    dicom = pytest.importorskip("tests.cohorts.test_dicom", reason="the extra raystudy[dicom] is not installed")
    bucket = open_storage(s3_bucket).child("dicom")
    bucket.write_bytes("pneumonia/a.dcm", dicom.written(dicom.film(PatientID="a")))
    bucket.write_bytes("normal/b.dcm", dicom.written(dicom.film(PatientID="b")))
    table = read_source("H1", source(kind="dicom", root=bucket.uri), CohortSettings(), open_storage("nowhere"))
    assert table.rows["patient_id"].tolist() == ["H1:b", "H1:a"]
    assert table.rows["uri"].iloc[1] == f"{s3_bucket}/dicom/pneumonia/a.dcm"
