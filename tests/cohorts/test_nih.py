from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from raystudy.cohorts.nih import KAGGLE_LAST, read_nih
from raystudy.cohorts.settings import CohortSettings
from raystudy.cohorts.split import nih_paper_split
from raystudy.cohorts.tables import SourceTable
from raystudy.cohorts.vocabulary import names
from raystudy.errors import StudyError
from tests.cohorts.hospitals import real_tables, shared, source

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
LINES = {
    "00000001_000.png": "Cardiomegaly|Emphysema,0,1,57,M,PA,2682,2749,0.143,0.143",
    "00000002_000.png": "No Finding,0,2,80,M,AP,2500,2048,0.171,0.171",
    "00001336_000.png": "Pneumonia|Pleural_Thickening,0,1336,74,F,PA,2500,2048,0.168,0.168",
    "00030805_000.png": "Pneumonia,0,30805,27,M,PA,2048,2500,0.171,0.171",
}


def write(
    root: Path, name: str = "Data_Entry_2017_v2020.csv", header: str = HEADER, end: str = "", **more: str
) -> None:
    lines = [f"{image},{line}{end}" for image, line in {**LINES, **more}.items()]
    root.mkdir(exist_ok=True)
    (root / name).write_text("\n".join([header, *lines]) + "\n")


def read(root: Path, cohort: CohortSettings | None = None, **settings: object) -> SourceTable:
    return read_nih("H1", source(kind="nih", root=str(root), **settings), cohort or CohortSettings())  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "header", "end"),
    [
        ("Data_Entry_2017_v2020.csv", HEADER, ""),
        ("Data_Entry_2017.csv", HEADER + ",", ""),
        ("Data_Entry_2017.csv", HEADER + ",", ","),
    ],
    ids=["v2020", "v2017 with a comma too many", "v2017 with a blank column"],
)
def test_both_tables_are_read_with_their_broken_headers(tmp_path: Path, name: str, header: str, end: str) -> None:
    write(tmp_path, name, header, end)
    rows = read(tmp_path).rows
    assert rows["image_id"].tolist() == [f"H1/{n}" for n in LINES]
    assert rows["patient_id"].tolist() == ["H1:1", "H1:2", "H1:1336", "H1:30805"]
    assert [names(m) for m in rows["found"]][2] == ["pleural_thickening", "pneumonia"]
    assert rows["view"].tolist() == ["PA", "AP", "PA", "PA"]


def test_one_patient_written_in_two_ways_is_one_patient(tmp_path: Path) -> None:
    write(tmp_path, **{"00000001_001.png": "Edema,1,00000001,57,M,PA,2682,2749,0.143,0.143"})
    rows = read(tmp_path, CohortSettings(split="random")).rows
    assert set(rows.loc[rows["image_id"].str.startswith("H1/00000001_"), "patient_id"]) == {"H1:1"}


def test_without_films_the_kaggle_tree_is_planned_with(tmp_path: Path) -> None:
    write(tmp_path)
    folders = [uri.removeprefix(f"{tmp_path}/").split("/")[0] for uri in read(tmp_path).rows["uri"]]
    assert folders == ["images_001", "images_001", "images_002", "images_012"]


def test_films_are_found_by_base_name_in_any_tree(tmp_path: Path) -> None:
    write(tmp_path)
    images = tmp_path / "elsewhere" / "odd"
    images.mkdir(parents=True)
    for name in list(LINES)[:3]:
        (images / name).touch()
    table = read(tmp_path)
    # The missing film is expected beside the others.
    assert table.rows["uri"].tolist() == [f"{images}/{name}" for name in LINES]
    assert "3 of 4 there" in " ".join(table.notes)
    assert read(tmp_path, layout="flat").rows["uri"].iloc[0] == f"{tmp_path}/images/00000001_000.png"
    assert read(tmp_path, images=str(tmp_path / "elsewhere")).rows["uri"].iloc[0] == f"{images}/00000001_000.png"
    (tmp_path / "00000001_000.png").touch()
    with pytest.raises(StudyError, match=r"00000001_000\.png is there twice"):
        read(tmp_path)


def test_films_behind_a_link_are_found(tmp_path: Path) -> None:
    write(tmp_path / "table")
    (tmp_path / "films").mkdir()
    for name in LINES:
        (tmp_path / "films" / name).touch()
    (tmp_path / "table" / "images").symlink_to(tmp_path / "films")
    assert read(tmp_path / "table").rows["uri"].tolist() == [f"{tmp_path}/table/images/{name}" for name in LINES]


def test_official_lists_give_the_test_split_and_divide_the_rest(tmp_path: Path) -> None:
    write(tmp_path)
    listed = list(LINES)
    (tmp_path / "train_val_list.txt").write_text("\n".join(listed[:2]))
    (tmp_path / "test_list.txt").write_text("\n".join(listed[2:]) + "\n")
    assert read(tmp_path, official_lists=True).rows["split"].tolist() == ["train_val", "train_val", "test", "test"]
    (tmp_path / "test_list.txt").write_text("\n".join(listed[1:]))
    with pytest.raises(StudyError, match="both official lists"):
        read(tmp_path, official_lists=True)
    (tmp_path / "test_list.txt").write_text(listed[3])
    with pytest.raises(StudyError, match=r"no official list.*00001336_000"):
        read(tmp_path, official_lists=True)
    (tmp_path / "test_list.txt").unlink()
    with pytest.raises(StudyError, match="official list is not here"):
        read(tmp_path, official_lists=True)


@pytest.mark.parametrize(
    ("image", "line", "message"),
    [
        ("00000003_000.png", "Pneumonia,0,4,57,M,PA,1,1,1,1", "does not fit the image name"),
        ("00000003_000.jpg", "Pneumonia,0,3,57,M,PA,1,1,1,1", "not like 00000001_000.png"),
        ("00000003_000.png", "Pneumonitis,0,3,57,M,PA,1,1,1,1", "unknown findings 'Pneumonitis'"),
        ("00000003_000.png", ",0,3,57,M,PA,1,1,1,1", "no finding is given"),
        ("00000003_000.png", "Pneumonia|No Finding,0,3,57,M,PA,1,1,1,1", "beside a pathology"),
        ("00000003_000.png", "Pneumonia,0,3,57,M,AXIAL,1,1,1,1", "the view is not"),
        ("00030806_000.png", "Pneumonia,0,30806,57,M,PA,1,1,1,1", "knows the patients 1…30805"),
        ("00000003_000.png", "Pneumonia,0,3,57,M,PA", "another number of cells"),
    ],
)
def test_rows_that_break_a_rule_are_named(tmp_path: Path, image: str, line: str, message: str) -> None:
    write(tmp_path, **{image: line})
    with pytest.raises(StudyError, match=message) as refusal:
        read(tmp_path)
    assert "row 5" in str(refusal.value) or "row" in refusal.value.what


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no NIH table.*\n.*Data_Entry_2017_v2020\.csv"):
        read(tmp_path)


def test_patients_of_the_paper_split_are_those_of_the_stated_recipe() -> None:
    split = nih_paper_split()
    assert {s: int((split == s).sum()) for s in ("train", "val", "test")} == {"train": 24644, "val": 3080, "test": 3081}
    published = pd.read_csv(shared("data", "metadata", "nih_patient_split_seed48066.csv.gz"))
    assert (published.set_index("patient_id")["split"].loc[np.arange(1, 30806)].to_numpy() == split).all()


def test_real_table_fills_the_kaggle_folders_exactly() -> None:
    table = real_tables()[0]
    folders = table.rows["uri"].str.extract(r"/images_(\d{3})/images/")[0].value_counts().sort_index()
    assert folders.tolist() == [4999, *[10000] * 10, 7121]  # as counted in the real tree
    last = table.rows.groupby(table.rows["uri"].str.extract(r"/(images_\d{3})/")[0])["image_id"].max()
    assert [name.removeprefix("H1/").removesuffix(".png") for name in last] == list(KAGGLE_LAST)


def test_real_subset_of_the_xray_pack_is_read_unchanged() -> None:
    table = read(shared("data", "xray", "nih"))
    assert all(Path(uri).is_file() for uri in table.rows["uri"])
    assert len(table.rows) == 846  # as counted in its README
