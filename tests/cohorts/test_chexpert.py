from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from raystudy.cohorts.chexpert import LABELS, read_chexpert
from raystudy.cohorts.settings import CohortSettings
from raystudy.cohorts.tables import SourceTable
from raystudy.cohorts.vocabulary import BIT, names
from raystudy.errors import StudyError
from tests.cohorts.hospitals import real_tables, source

HEADER = ",".join(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS])


def line(path: str, view: str = "Frontal,AP", **labels: str) -> str:
    return f"{path},Unknown,0,{view}," + ",".join(labels.get(name.replace(" ", "_"), "") for name in LABELS)


def write(folder: Path, top: str = "CheXpert-v1.0-small", train: list[str] | None = None) -> None:
    films = train or [
        line(f"{top}/train/patient00001/study1/view1_frontal.jpg", Pneumonia="1.0", Edema="-1.0", Fracture="0.0"),
        line(f"{top}/train/patient00001/study1/view2_lateral.jpg", "Lateral,", Pneumonia="1.0"),
        line(f"{top}/train/patient33093/study2/view3_frontal.jpg", "Frontal,LL", Support_Devices="1.0"),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.csv").write_text("\n".join([HEADER, *films]) + "\n")
    valid = line(f"{top}/valid/patient64541/study1/view1_frontal.jpg", No_Finding="1.0", Pneumonia="0.0")
    (folder / "valid.csv").write_text(f"{HEADER}\n{valid}\n")


def read(root: Path, h2_test: str = "holdout", **settings: object) -> SourceTable:
    cohort = CohortSettings.model_validate({"h2_test": h2_test})
    return read_chexpert("H2", source(kind="chexpert", root=str(root), **settings), cohort)  # pyright: ignore


@pytest.mark.parametrize("top", ["CheXpert-v1.0-small", "CheXpert-v1.0"])
def test_paths_are_relative_to_the_folder_above_whether_that_is_named_or_not(tmp_path: Path, top: str) -> None:
    write(tmp_path / top, top)
    for root in (tmp_path, tmp_path / top):
        rows = read(root).rows
        assert rows["uri"].iloc[0] == f"{tmp_path}/{top}/train/patient00001/study1/view1_frontal.jpg"
        assert rows["image_id"].iloc[0] == "H2/train/patient00001/study1/view1_frontal.jpg"
    shutil.move(tmp_path / top, tmp_path / "renamed")
    assert read(tmp_path / "renamed").rows["uri"].str.startswith(f"{tmp_path}/renamed/train/").iloc[0]


def test_labels_patients_and_views_are_read(tmp_path: Path) -> None:
    write(tmp_path)
    rows = read(tmp_path).rows
    assert [names(m) for m in rows["found"]] == [["pneumonia"], ["pneumonia"], ["support_devices"], ["no_finding"]]
    assert names(rows["uncertain"].iloc[0]) == ["edema"]
    assert names(rows["negated"].iloc[0]) == ["fracture"]
    assert rows["view"].tolist() == ["AP", "LATERAL", "", "AP"]  # frontal with LL is frontal of unknown direction
    assert rows["patient_id"].tolist() == ["H2:patient00001", "H2:patient00001", "H2:patient33093", "H2:patient64541"]


def test_one_patient_written_in_two_ways_is_one_patient(tmp_path: Path) -> None:
    films = [f"CheXpert-v1.0/train/{patient}/study1/view1_frontal.jpg" for patient in ("patient00001", "patient1")]
    write(tmp_path, train=[line(film, Edema="1.0") for film in films])
    assert read(tmp_path).rows["patient_id"].tolist() == ["H2:patient00001", "H2:patient00001", "H2:patient64541"]


def test_official_valid_films_are_test_films_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path)
    assert read(tmp_path).rows["split"].tolist() == ["", "", "", "unused"]
    assert read(tmp_path, "official_valid").rows["split"].tolist() == ["train_val", "train_val", "train_val", "test"]
    (tmp_path / "valid.csv").unlink()
    assert len(read(tmp_path).rows) == 3
    with pytest.raises(StudyError, match=r"needs valid\.csv"):
        read(tmp_path, "official_valid")


@pytest.mark.parametrize(
    ("film", "message"),
    [
        (line("CheXpert-v1.0-small/train/../../etc/passwd"), "the path is not like"),
        (line("train/patient00001/study1/view1_frontal.jpg"), "the path is not like"),
        (line("/CheXpert/train/patient00001/study1/view1_frontal.jpg"), "the path is not like"),
        (line("C/train/patient00001/study1/view1_frontal.jpg", Edema="2.0"), "'Edema' must be 1, 0, -1 or blank"),
        (line("C/train/patient00001/study1/view1_frontal.jpg", "Oblique,AP"), "Frontal/Lateral is neither"),
        (line("C/train/patient00001/study1/view1_frontal.jpg", "Frontal,XX"), "AP/PA is not"),
        (
            line("C/train/patient00001/study1/view2_lateral.jpg", "Frontal,PA"),
            "does not fit the file's name .*row 1: 'C",
        ),
        (line("C/train/patient00001/study1/view1_frontal.jpg", "Lateral,"), "does not fit the file's name"),
        (line("C/train/patient00001/study1/view1_frontal.jpg", No_Finding="1.0", Edema="1.0"), "beside a pathology"),
        (line("C/valid/patient64541/study1/view1_frontal.jpg", Edema="1.0"), "stands in several rows"),
    ],
)
def test_rows_that_break_a_rule_are_named(tmp_path: Path, film: str, message: str) -> None:
    write(tmp_path, train=[film])
    with pytest.raises(StudyError, match=message):
        read(tmp_path)


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no CheXpert train\.csv"):
        read(tmp_path)


def test_real_tables_have_the_counted_labels() -> None:
    rows = real_tables()[1].rows
    train, valid = rows[rows["split"] == ""], rows[rows["split"] == "unused"]
    assert [(len(t), t["patient_id"].nunique()) for t in (train, valid)] == [(223414, 64540), (234, 200)]
    frontal = train[train["view"] != "LATERAL"]
    assert len(frontal) == 191027
    pneumonia = BIT["pneumonia"]
    assert [int((frontal[k] & pneumonia != 0).sum()) for k in ("found", "negated", "uncertain")] == [4675, 1875, 15981]
    ill = valid[valid["found"] & pneumonia != 0]
    assert sorted(ill["patient_id"].str.removeprefix("H2:patient").astype(int)) == [
        64548, 64552, 64579, 64583, 64652, 64689, 64692, 64715,
    ]  # fmt: skip
