from __future__ import annotations

import gzip
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from raystudy.cohorts.build import read_tables
from raystudy.cohorts.manifest import read_manifest
from raystudy.cohorts.planning import plan_cohorts
from raystudy.cohorts.settings import CohortSettings
from raystudy.cohorts.tables import SourceTable
from raystudy.cohorts.vocabulary import names
from raystudy.errors import StudyError
from raystudy.storage import open_storage
from tests.cohorts.hospitals import COLUMNS, TASKS, build, draw, films_of, manifest, shared, source


def read(root: Path, table: str, **changes: object) -> SourceTable:
    return read_manifest("H1", manifest(root, table, **changes))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def clean(tmp_path: Path) -> SourceTable:
    films_of("a").to_csv(tmp_path / "clean.csv", index=False)
    return read(tmp_path, "clean.csv")


def test_csv_gzip_tsv_and_parquet_give_the_same_rows(tmp_path: Path, clean: SourceTable) -> None:
    films = films_of("a")
    films.to_csv(tmp_path / "films.csv.gz", index=False)
    films.to_csv(tmp_path / "films.tsv", index=False, sep="\t")
    films.to_parquet(tmp_path / "films.parquet")
    lists = films.assign(findings=films["findings"].str.split("|"), pneumonia=films["pneumonia"].astype(int))
    lists.to_parquet(tmp_path / "lists.parquet")
    for table in ("films.csv.gz", "films.tsv", "films.parquet", "lists.parquet"):
        pd.testing.assert_frame_equal(read(tmp_path, table).rows, clean.rows)


def parquet(root: Path, column: str, values: pyarrow.Array) -> Path:
    table = pyarrow.Table.from_pandas(films_of("a", len(values) // 2))
    table = table.set_column(table.column_names.index(column), column, values)
    pyarrow.parquet.write_table(table, root / "films.parquet")
    return root


def test_blanks_inside_a_list_of_findings_take_nothing_away(tmp_path: Path) -> None:
    lists = [["Pneumonia", None], [None, "Edema", ""], [], None, [None], ["Mass", "Nodule"]]
    found = read(parquet(tmp_path, "findings", pyarrow.array(lists)), "films.parquet", separator=";").rows["found"]
    assert [names(m) for m in found] == [["pneumonia"], ["edema"], [], [], [], ["mass", "nodule"]]


@pytest.mark.parametrize(
    "values", [[{"label": "Mass"}], [[{"label": "Mass"}]], [[["Mass"]]], [b"\xff\xfe"]],
    ids=["records", "lists of records", "lists of lists", "bytes"],
)  # fmt: skip
def test_columns_that_are_no_text_are_refused_by_name(tmp_path: Path, values: list[object]) -> None:
    with pytest.raises(StudyError, match=r"the column 'findings' of type .* cannot be read as text"):
        read(parquet(tmp_path, "findings", pyarrow.array(values * 4)), "films.parquet")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: b"\xef\xbb\xbf" + t,
        lambda t: t.replace(b"\n", b"\r\n"),
        lambda t: t.replace(b"as sent", b'"quoted, with ""quotes"""'),
        lambda t: b"\n".join([t.split(b"\n")[0], *sorted(t.strip().split(b"\n")[1:], reverse=True)]),
        lambda t: t.replace(b"Effusion|Edema", b" pleural effusion | EDEMA "),
        lambda t: t.replace(b"\na/", b"\n./a/"),
        lambda t: t + b"\n\n",
    ],
    ids=[
        "byte order mark",
        "carriage returns",
        "quotes in cells",
        "order",
        "spelling",
        "dot paths",
        "blank lines",
    ],
)
def test_harmless_differences_change_nothing(tmp_path: Path, clean: SourceTable, change: object) -> None:
    (tmp_path / "odd.csv").write_bytes(change((tmp_path / "clean.csv").read_bytes()))  # pyright: ignore[reportCallIssue]
    pd.testing.assert_frame_equal(read(tmp_path, "odd.csv").rows, clean.rows)


def test_a_line_break_in_a_cell_is_refused_by_its_row_also_where_nobody_reads(tmp_path: Path) -> None:
    head = "file,patient,findings,comment\n"
    columns = {"image": "file", "patient": "patient", "findings": "findings"}
    for rows, first in (
        ('a.png,p1,Edema,"oops\nb.png,p2,Pneumonia,"fine\nc.png,p3,No Finding,x\n', r"row 1: 'oops\\nb\.png"),
        ('a.png,p1,Edema,x\n\nb.png,p2,Edema,"one\n\ntwo"\n', "row 2: 'one"),
        ('a.png,p1,Edema,"one\r\ntwo"\r\n', "row 1: 'one"),
    ):
        (tmp_path / "t.csv").write_bytes((head + rows).encode())
        with pytest.raises(StudyError, match=f"a cell holds a line break, or a quote is not closed: {first}"):
            read(tmp_path, "t.csv", columns=columns)


def test_a_patient_in_two_spellings_is_refused_with_both(tmp_path: Path) -> None:
    def spelled(*patients: str) -> SourceTable:
        rows = "".join(f"{number}.png,{patient},Edema\n" for number, patient in enumerate(patients))
        (tmp_path / "t.csv").write_text("file,patient,findings\n" + rows)
        return read(tmp_path, "t.csv", columns={"image": "file", "patient": "patient", "findings": "findings"})

    for one, other in (
        *(("12", "12.0"), ("P12", "p12"), ("0012", "12"), ("00", "0.0"), ("straße", "STRASSE")),
        *(("12", "１２"), ("A-12", "A‐12"), ("A-12", "A−12")),
    ):
        with pytest.raises(StudyError, match=rf"1 patients .* '{one}' \(row 1\) and '{other}' \(row 3\)"):
            spelled(one, "7", other, one)
    for unseen in "\ufe0f\u3164\u034f\u2800\u200b":
        with pytest.raises(StudyError, match=r"invisible or decomposed characters \(row 2"):
            spelled("P12", f"P1{unseen}2")
    different = ["12", "120", "12.5", "1.20", "P12", "P012", "P12.0", "10", "1"]
    assert spelled(*different).rows["patient_id"].tolist() == [f"H1:{patient}" for patient in different]


def test_findings_from_flags_joined_labels_and_uncertain_labels_come_together(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,who,a,b,labels,maybe\nx.png,1,1,-1.0,Mass,\ny.png,2,0,,,Nodule\n")
    columns = {"image": "file", "patient": "who", "findings": "labels", "uncertain": "maybe"}
    rows = read(tmp_path, "t.csv", columns=columns, finding_columns={"a": "pneumonia", "b": "edema"}, view="AP").rows
    spelled = [[names(m) for m in rows[kind]] for kind in ("found", "uncertain", "negated")]
    assert spelled == [[["mass", "pneumonia"], []], [["edema"], ["nodule"]], [[], ["pneumonia"]]]
    assert rows["view"].tolist() == ["AP", "AP"]
    assert rows["image_id"].tolist() == ["H1/x.png", "H1/y.png"]
    assert rows["patient_id"].tolist() == ["H1:1", "H1:2"]
    assert rows["uri"].tolist() == [f"{tmp_path}/x.png", f"{tmp_path}/y.png"]


def test_unknown_spelling_can_be_mapped_or_ignored(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,patient,findings\nx.png,1,Lungenentzündung;Zopf\n", encoding="utf-8")
    columns = {"image": "file", "patient": "patient", "findings": "findings"}
    settings = {"columns": columns, "separator": ";"}
    with pytest.raises(StudyError, match="unknown findings 'Lungenentzündung', 'Zopf'"):
        read(tmp_path, "t.csv", **settings)
    rows = read(tmp_path, "t.csv", **settings, findings={"Lungenentzündung": "Pneumonia", "Zopf": None}).rows
    assert names(rows["found"].iloc[0]) == ["pneumonia"]


def test_one_file_can_hold_both_hospitals(tmp_path: Path) -> None:
    both = pd.concat([films_of("a").assign(site="1", ok=True), films_of("b").assign(site="2", ok=True)])
    both.to_csv(tmp_path / "both.csv", index=False)
    one, two = (manifest(tmp_path, "both.csv", where={"site": (s,), "ok": True}) for s in ("1", "2"))
    cohorts = build({"H1": one, "H2": two})
    assert set(cohorts.table["image_id"].str.slice(0, 5)) == {"H1/a/", "H2/b/"}
    with pytest.raises(StudyError, match="belong to both sources"):
        build({"H1": one, "H2": manifest(tmp_path, "both.csv")})
    with pytest.raises(StudyError, match="no row passes"):
        build({"H1": one, "H2": manifest(tmp_path, "both.csv", where={"site": "3"})})


def test_rows_are_named_by_their_place_in_the_file_also_behind_a_filter(tmp_path: Path) -> None:
    films = films_of("a")
    films["site"] = ["1", "2"] * 30
    films.loc[7, "findings"] = "Zopf"
    films.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(StudyError, match=r"1 rows fail: unknown findings 'Zopf' \(row 8: 'Zopf'\)"):
        read(tmp_path, "t.csv", where={"site": "2"})


def test_rows_with_one_id_are_refused_or_kept_out_of_every_cohort(tmp_path: Path) -> None:
    films = films_of("a")
    films["name"] = [f"film {k}" for k in range(len(films))]
    films.loc[[3, 17], "name"] = "film 8"
    films.to_csv(tmp_path / "a.csv", index=False)
    films_of("b").to_csv(tmp_path / "b.csv", index=False)
    one = manifest(tmp_path, "a.csv", columns={**COLUMNS, "image_id": "name"})
    sources = {"H1": one, "H2": manifest(tmp_path, "b.csv")}
    with pytest.raises(StudyError, match=r"3 rows fail: the image id stands in several rows \(row 4: 'film 8'"):
        build(sources)
    tables = read_tables(sources, CohortSettings(), open_storage("nowhere"), drop_duplicates=True)
    assert (tables[0].rows["image_id"] == "H1/film 8").sum() == 3
    assert tables[0].rows.loc[tables[0].rows["split"] == "unused", "image_id"].unique().tolist() == ["H1/film 8"]
    cohorts = draw(tables)
    assert "H1/film 8" not in set(cohorts.table["image_id"])
    assert cohorts.duplicates["image_id"].tolist() == ["H1/film 8"] * 3
    assert cohorts.duplicates["uri"].nunique() == 3
    plan = plan_cohorts(cohorts, TASKS, sources, CohortSettings())
    assert plan.sources["H1"][-1] == "3 rows whose image id stands in several rows are left out"


def test_rows_with_one_id_are_held_to_all_other_rules(tmp_path: Path) -> None:
    films = pd.concat([films_of("a"), films_of("a")[:1]])
    for column, value, message in (("patient", "nan", "patient id is blank"), ("file", "../x.png", "below its root")):
        films.iloc[[0, -1], films.columns.get_loc(column)] = value
        films.to_csv(tmp_path / "a.csv", index=False)
        with pytest.raises(StudyError, match=message):
            read_manifest("H1", manifest(tmp_path, "a.csv"), drop_duplicates=True)  # pyright: ignore


def test_columns_without_a_name_do_no_harm(tmp_path: Path, clean: SourceTable) -> None:
    lines = (tmp_path / "clean.csv").read_text().splitlines()
    odd = "\n".join([lines[0] + ",,", *(line + ",x,y" for line in lines[1:])])
    (tmp_path / "odd.csv.gz").write_bytes(gzip.compress(odd.encode()))
    pd.testing.assert_frame_equal(read(tmp_path, "odd.csv.gz").rows, clean.rows)


def test_a_root_may_be_an_address(tmp_path: Path, clean: SourceTable) -> None:
    rows = read_manifest("H1", manifest(f"file://{tmp_path}", "clean.csv")).rows
    pd.testing.assert_frame_equal(rows, clean.rows)


def packed(hospital: str, **changes: object) -> object:
    finding_columns = {"pneumonia": "pneumonia", "no_finding": "no_finding", "abnormal": "other_pathology"}
    columns = {"image": "image_path", "patient": "patient_id", "view": "view", "split": "split"}
    return source(
        kind="manifest", root=str(shared("data", "xray")), table="manifest.csv", where={"source": hospital},
        columns=columns, finding_columns=finding_columns, **changes,
    )  # fmt: skip


def test_real_films_of_nih_and_guangzhou_have_the_counts_of_their_readme() -> None:
    sources = {"H1": packed("nih"), "H2": packed("guangzhou")}
    tasks = {"pneumonia": TASKS["pneumonia"].model_copy(update={"negatives": "no_finding"})}
    cohorts = build(sources, tasks)  # pyright: ignore[reportArgumentType]
    have = {(c.split, c.source, c.label): c.have for c in cohorts.cells}
    assert have == {
        ("train", "H1", 1): 258, ("train", "H2", 1): 276, ("train", "H1", 0): 175, ("train", "H2", 0): 288,
        ("val", "H1", 1): 50, ("val", "H2", 1): 68, ("val", "H1", 0): 41, ("val", "H2", 0): 57,
        ("test", "H1", 1): 51, ("test", "H2", 1): 56, ("test", "H1", 0): 44, ("test", "H2", 0): 55,
    }  # fmt: skip
    assert all(Path(uri).is_file() for uri in cohorts.table["uri"])


def test_guangzhou_has_no_other_pathology_and_the_default_is_refused_with_a_way_out() -> None:
    sources = {"H1": packed("nih"), "H2": packed("guangzhou")}
    with pytest.raises(StudyError, match="train H2 negative: have 0, need 1") as refusal:
        build(sources)  # pyright: ignore[reportArgumentType]
    assert "{H2: no_finding}" in str(refusal.value)


def test_columns_of_the_example_are_those_of_the_settings() -> None:
    assert set(COLUMNS.values()) <= set(films_of("a").columns)
