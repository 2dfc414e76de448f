"""200 generated hostile tables: each is a named refusal, none a traceback, and nothing of them gets into a cohort."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from raystudy.cohorts import text_table
from raystudy.errors import StudyError
from tests.cohorts.hospitals import build, films_of, manifest

Rng = np.random.Generator


def csv(films: pd.DataFrame) -> bytes:
    return films.to_csv(index=False).encode()


def cell(column: str, *values: str) -> Callable[[pd.DataFrame, Rng], bytes]:
    """Put one of the values into one random row."""

    def change(films: pd.DataFrame, rng: Rng) -> bytes:
        films = films.copy()
        films.loc[int(rng.integers(len(films))), column] = values[int(rng.integers(len(values)))]
        return csv(films)

    return change


def line(edit: Callable[[bytes], bytes]) -> Callable[[pd.DataFrame, Rng], bytes]:
    """Edit one random line below the header."""

    def change(films: pd.DataFrame, rng: Rng) -> bytes:
        lines = csv(films).rstrip(b"\n").split(b"\n")
        place = int(rng.integers(1, len(lines)))
        lines[place] = edit(lines[place])
        return b"\n".join(lines) + b"\n"

    return change


def twice(films: pd.DataFrame, rng: Rng) -> bytes:
    return csv(pd.concat([films, films.iloc[[int(rng.integers(len(films)))]]]))


def torn_patient(films: pd.DataFrame, rng: Rng) -> bytes:
    films = films.copy()
    place = int(rng.integers(len(films)))
    films.loc[place, "split"] = {"train": "test", "test": "val", "val": "train"}[str(films.loc[place, "split"])]
    return csv(films)


def without(films: pd.DataFrame, rng: Rng) -> bytes:
    return csv(films.drop(columns=[["file", "patient", "view", "findings", "split"][int(rng.integers(5))]]))


def repeated_column(films: pd.DataFrame, rng: Rng) -> bytes:
    name = ["file", "patient", "findings", "split"][int(rng.integers(4))]
    return csv(films).replace(b"note", name.encode(), 1)


def stray_quotes(films: pd.DataFrame, rng: Rng) -> bytes:
    """Two neighbouring rows begin a quoted cell in a column that nobody reads: they could be read as one."""
    films = films.copy()
    place = int(rng.integers(len(films) - 1))
    films.loc[[place, place + 1], "note"] = "STRAY"
    return csv(films).replace(b"STRAY", b'"as sent')


def two_spellings(films: pd.DataFrame, rng: Rng) -> bytes:
    ids = [("12", "12.0"), ("0012", "12"), ("P12", "p12"), ("007.0", "7"), ("0", "000")][int(rng.integers(5))]
    films = films.copy()
    for place, patient in zip(rng.permutation(len(films))[:2], ids, strict=True):
        films.loc[int(place), "patient"] = patient
    return csv(films)


def cut_gzip(films: pd.DataFrame, rng: Rng) -> bytes:
    data = gzip.compress(csv(films))
    return data[: int(rng.integers(20, len(data) - 4))]


def flipped_gzip(films: pd.DataFrame, rng: Rng) -> bytes:
    data = bytearray(gzip.compress(csv(films)))
    data[-int(rng.integers(1, 9))] ^= 0xFF  # the checksum and length at the end
    return bytes(data)


def cut_parquet(films: pd.DataFrame, rng: Rng) -> bytes:
    sink = io.BytesIO()
    films.to_parquet(sink)
    return sink.getvalue()[: int(rng.integers(8, len(sink.getvalue()) - 8))]


def no_text_parquet(films: pd.DataFrame, rng: Rng) -> bytes:
    """One cell of a text column holds bytes that are no UTF-8: Parquet's writer does not look."""
    column = ["file", "patient", "view", "findings", "split"][int(rng.integers(5))]
    cells = [str(value).encode() for value in films[column]]
    cells[int(rng.integers(len(cells)))] += b"\xff\xfe"
    raw = pyarrow.array(cells, pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    table = pyarrow.Table.from_pandas(films, preserve_index=False)
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table.set_column(table.column_names.index(column), column, text), sink)
    return sink.getvalue()


def long_cell(films: pd.DataFrame, rng: Rng) -> bytes:
    name, _, rest = csv(films).partition(b"\n")
    first, _, rest = rest.partition(b"\n")
    return name + b"\n" + first + b"x" * int(rng.integers(131_072, 140_000)) + b"\n" + rest


def noise(films: pd.DataFrame, rng: Rng) -> bytes:
    return rng.bytes(int(rng.integers(1, 4000)))


def inserted(*texts: bytes) -> Callable[[pd.DataFrame, Rng], bytes]:
    """Put bytes that no text table holds into the middle of a line."""

    def change(films: pd.DataFrame, rng: Rng) -> bytes:
        data = csv(films)
        place = data.index(b",", int(rng.integers(60, len(data) - 80))) + 1
        return data[:place] + texts[int(rng.integers(len(texts)))] + data[place:]

    return change


def whole(*texts: bytes) -> Callable[[pd.DataFrame, Rng], bytes]:
    return lambda films, rng: texts[int(rng.integers(len(texts)))]


# name -> (what is done to a clean table, a part of the refusal)
ATTACKS: dict[str, tuple[Callable[[pd.DataFrame, Rng], bytes], str]] = {
    "path outside the root": (cell("file", "../../etc/passwd", "a/../../x.png", "..", "a/./x.png"), "below its root"),
    "absolute path": (cell("file", "/etc/passwd", "//host/x.png", "~/x.png", "C:/x.png"), "below its root"),
    "foreign address": (cell("file", "s3://other/x.png", "http://host/x.png", "file:///x.png"), "below its root"),
    "backslashes": (cell("file", r"a\..\x.png", r"\\host\x.png", r"..\x.png"), "below its root"),
    "line break in a path": (cell("file", "a/x\n.png", "a/\tx.png", "a/x\x7f.png", "a/x\x1b.png"), "below its root"),
    "no path": (cell("file", "", "  ", "\t"), "below its root"),
    "no patient": (cell("patient", "", "   ", "nan", "NULL", "n/a", "None", "Anonymous"), "patient id is blank"),
    "invisible letters": (cell("patient", "p00\u200b1", "p001\u00a0x", "p\u202e001", "p0\ufeff01"), "invisible"),
    "decomposed letters": (cell("patient", "mu\u0308ller", "re\u0301ne"), "decomposed"),
    "a film twice": (twice, "several rows"),
    "a patient in two splits": (torn_patient, "several splits"),
    "no such split": (cell("split", "holdout", "train,test", "1", "tset"), "split is not"),
    "a blank split": (cell("split", "", " "), "split"),
    "no such finding": (cell("findings", "Pneumonıa", "Pneumonia;Edema", "1", "ARDS", "nan"), "unknown findings"),
    "contradiction": (cell("findings", "No Finding|Pneumonia", "Edema|normal"), "beside a pathology"),
    "no such view": (cell("view", "PA2", "oblique", "0", "ÁP"), "the view is not"),
    "a column is missing": (without, "no column"),
    "a column twice": (repeated_column, "stands twice"),
    "a short row": (line(lambda row: row.rsplit(b",", 2)[0]), "another number of cells"),
    "a long row": (line(lambda row: row + b",more,cells"), "another number of cells"),
    "half a table": (line(lambda row: row[: len(row) // 3]), "another number of cells"),
    "stray quotes": (stray_quotes, "a cell holds a line break, or a quote is not closed: row "),
    "a patient in two spellings": (two_spellings, "1 patients seem to be written in two ways: '"),
    "cut gzip": (cut_gzip, "gzip"),
    "flipped gzip": (flipped_gzip, "gzip"),
    "cut parquet": (cut_parquet, "Parquet"),
    "no text in parquet": (no_text_parquet, "cannot be read as text"),
    "an endless cell": (long_cell, "field larger than"),
    "noise": (noise, ""),
    "NUL bytes": (inserted(b"\0", b"\0\0\0\0"), "NUL"),
    "not UTF-8": (line(lambda row: row.replace(b",", b",\xff\xfe", 1)), "CSV"),
    "UTF-16": (lambda films, rng: csv(films).decode().encode("utf-16"), "NUL"),
    "nothing": (whole(b"", b"\n", b"  \n\n", b"\xef\xbb\xbf"), "empty"),
    "only a header": (lambda films, rng: csv(films[:0]), "no rows"),
    "a web page": (whole(b"<!DOCTYPE html><html>Sign in</html>", b"<html>\n<p>404</p>\n</html>\n"), "no column"),
    "another separator": (lambda films, rng: csv(films).replace(b",", b";"), "no column"),
    "an open quote": (line(lambda row: b'"' + row), ""),
}  # fmt: skip
CASES = [(name, seed) for seed in range(7) for name in ATTACKS][:200]


def test_there_are_200_of_them() -> None:
    assert len(CASES) == 200


@pytest.mark.parametrize(("name", "seed"), CASES, ids=[f"{name} {seed}" for name, seed in CASES])
def test_hostile_table_is_refused_by_name(tmp_path: Path, name: str, seed: int) -> None:
    attack, expected = ATTACKS[name]
    films_of("b").to_csv(tmp_path / "good.csv", index=False)
    table = "bad.parquet" if "parquet" in name else "bad.csv.gz" if "gzip" in name else "bad.csv"
    data = attack(films_of("a"), np.random.default_rng(seed))
    (tmp_path / table).write_bytes(data)
    sources = {"H1": manifest(tmp_path, table), "H2": manifest(tmp_path, "good.csv")}
    with pytest.raises(StudyError) as refusal:
        build(sources)
    text = str(refusal.value)
    assert expected in text
    assert str(tmp_path / table) in text  # it says which table
    assert refusal.value.remedy
    assert "Traceback" not in text
    assert len(text) < 3000


def test_the_same_table_without_an_attack_is_taken(tmp_path: Path) -> None:
    for name in ("a", "b"):
        films_of(name).to_csv(tmp_path / f"{name}.csv", index=False)
    cohorts = build({"H1": manifest(tmp_path, "a.csv"), "H2": manifest(tmp_path, "b.csv")})
    assert set(cohorts.table["uri"].str.slice(0, len(str(tmp_path)) + 3)) == {f"{tmp_path}/a/", f"{tmp_path}/b/"}


def test_a_table_that_unpacks_to_more_than_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv.gz").write_bytes(gzip.compress(csv(films_of(name))))
    sources = {"H1": manifest(tmp_path, "a.csv.gz"), "H2": manifest(tmp_path, "b.csv.gz")}
    size = max(len(csv(films_of(name))) for name in ("a", "b"))
    monkeypatch.setattr(text_table, "LARGEST_TABLE", size + 1)
    build(sources)
    monkeypatch.setattr(text_table, "LARGEST_TABLE", size // 2)
    with pytest.raises(StudyError, match="larger than 2 GiB"):
        build(sources)


@pytest.mark.parametrize("kind", ["texts", "lists", "plain", "numbers"])
def test_a_parquet_table_of_more_than_the_limit_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rows, text = 200_000, "x" * 500
    column = pyarrow.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [text])
    if kind == "lists":
        column = pyarrow.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32), column)
    elif kind == "plain":
        column = column.cast(pyarrow.string())
    elif kind == "numbers":
        column = pyarrow.array(np.zeros(20 * rows, np.int64))
    names = dict.fromkeys(("file", "patient", "view", "findings", "split"), column)
    path = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(pyarrow.table(names), path, compression="zstd", use_dictionary=kind != "plain")
    assert path.stat().st_size < 1_000_000
    monkeypatch.setattr(text_table, "LARGEST_TABLE", 100_000_000)
    films_of("b").to_csv(tmp_path / "good.csv", index=False)
    pool = pyarrow.default_memory_pool()
    before = pool.max_memory()
    with pytest.raises(StudyError, match="larger than 2 GiB"):
        build({"H1": manifest(tmp_path, "bomb.parquet"), "H2": manifest(tmp_path, "good.csv")})
    assert pool.max_memory() - before < 100_000_000


@pytest.mark.parametrize("table", ["../good.csv", "/etc/passwd", "folder", "a//b.csv", ""])
def test_a_table_that_is_no_file_below_the_root_is_refused(tmp_path: Path, table: str) -> None:
    (tmp_path / "root" / "folder").mkdir(parents=True)
    films_of("b").to_csv(tmp_path / "good.csv", index=False)
    with pytest.raises(StudyError) as refusal:
        build({"H1": manifest(tmp_path / "root", table), "H2": manifest(tmp_path, "good.csv")})
    assert refusal.value.remedy
