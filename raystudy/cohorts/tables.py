"""Reading and checking the tables that say who is in a source.

In flow CSV (also gzip) or Parquet bytes; out flow text columns, and after checking the rows of one source: image_id,
patient_id, uri, view, split, and the findings as bit masks (found, uncertain, negated).  A row that breaks a rule is
named with the rule; nothing is repaired, guessed or left out silently.  A cell of a CSV table holds no line break: a
quote too many in one row would otherwise take the next rows into its cell, also in a column that nobody reads.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import re
import unicodedata
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pandera.pandas as pa
import pyarrow
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from raystudy.cohorts.vocabulary import ANY_PATHOLOGY, BIT, NO_FINDING
from raystudy.errors import StudyError
from raystudy.storage import Storage, open_storage

SHOWN_ROWS = 5
LARGEST_TABLE = 2 << 30  # bytes after unpacking
CELL_BYTES = 8  # what a cell takes at least, however short its text
HEADER_BYTES = 1 << 18  # within which the header and the first row end
VIEWS = {
    "": "", "AP": "AP", "PA": "PA", "LATERAL": "LATERAL", "LAT": "LATERAL", "LL": "LATERAL", "RL": "LATERAL",
    "L": "LATERAL",
}  # fmt: skip
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "train_val": "train_val",
}  # fmt: skip
PLACEHOLDERS = ("", "nan", "none", "null", "na", "n/a", "unknown", "anonymous", "anonymized", "anonymised")
FLAGS = {"": 0, "0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1, "-1": -1, "-1.0": -1}
ROW_COLUMNS = ("image_id", "patient_id", "uri", "view", "found", "uncertain", "negated", "split")


@dataclass(frozen=True)
class SourceTable:
    """The checked rows of one source.

    ``rows``: columns of ``ROW_COLUMNS``, by image_id.  ``split`` is train, val, test, ``train_val`` (divided among
    these two), ``unused`` (kept out of every cohort), or empty (divided among all three).  ``notes``: what the plan
    prints about this source.
    """

    name: str
    rows: pd.DataFrame
    notes: tuple[str, ...] = field(default=())


def read_text_table(storage: Storage, path: str, columns: Iterable[str], separator: str = "|") -> pd.DataFrame:
    """Read the named columns of a table as text; blank cells are empty strings, lists are joined by ``separator``.

    Raises
    ------
    StudyError : no such file, not a table, a column that is missing or stands twice, a row of another length, a line
        break in a cell of CSV, more than ``LARGEST_TABLE`` bytes of text.
    """
    where = storage.address(path)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise StudyError("there is no such table", where=where, remedy="mend root and table of this source") from None
    except (ValueError, IsADirectoryError, NotADirectoryError):
        raise StudyError(
            "this is no path of a table below root", where=where, remedy="name a file below root"
        ) from None
    wanted = list(dict.fromkeys(columns))
    stem = path.lower().removesuffix(".gz")
    if stem.endswith((".parquet", ".pq")):
        return _parquet(data, wanted, where, separator)
    return _csv(_unpacked(data, where), wanted, where, "\t" if stem.endswith(".tsv") else ",")


def _unpacked(data: bytes, where: str) -> bytes:
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            text = file.read(LARGEST_TABLE)
    except (zlib.error, EOFError, OSError) as error:
        raise StudyError(f"the gzip file is damaged: {error}", where=where, remedy="fetch it again") from None
    _check_size(len(text) + 1, where)
    return text


def _check_size(size: int, where: str) -> None:
    if size > LARGEST_TABLE:
        raise StudyError(
            "the table is larger than 2 GiB when unpacked", where=where, remedy="split it, or check where it comes from"
        )


def _csv(data: bytes, wanted: list[str], where: str, delimiter: str) -> pd.DataFrame:
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise StudyError("the table is empty", where=where, remedy="a header line and one row an image")
    if b"\0" in data:
        raise StudyError(
            "this is not a text table (it holds NUL bytes)", where=where, remedy="CSV in UTF-8, or Parquet"
        )
    names, cells = _first_records(data, delimiter, where)
    _check_columns(names, wanted, where)
    if len(names) == cells + 1 and not names[-1]:  # the NIH header of 2017 ends in one comma more than its rows
        header, newline, rest = data.partition(b"\n")
        data = header.rstrip(b"\r").removesuffix(b",") + newline + rest
    odd: list[pyarrow.csv.InvalidRow] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        odd.append(row)
        return "skip"

    try:
        table = pyarrow.csv.read_csv(
            pyarrow.BufferReader(data),
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=1 << 24),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=wanted, column_types=dict.fromkeys(wanted, pyarrow.string()), strings_can_be_null=False
            ),
        )
    except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError, UnicodeDecodeError) as error:
        raise StudyError(
            f"this cannot be read as CSV: {str(error).splitlines()[0][:200]}",
            where=where,
            remedy="CSV in UTF-8, or Parquet",
        ) from None
    if odd:
        shown = "; ".join(
            f"row {(r.number or 2) - 1}: {r.actual_columns} instead of {r.expected_columns} in {(r.text or '')[:60]!r}"
            for r in odd[:3]
        )
        raise StudyError(
            f"{len(odd)} rows have another number of cells: {shown}", where=where, remedy="quote the cells"
        )
    lines = sum(map(bool, data.splitlines()))  # bytes split at line breaks only, as CSV does
    if lines != table.num_rows + 1:
        raise StudyError(
            f"a cell holds a line break, or a quote is not closed{_broken_cell(data, delimiter)}",
            where=where,
            remedy="mend the quotes; write line breaks in cells as blanks, or the table as Parquet",
        )
    return _stripped(table.to_pandas())


def _broken_cell(data: bytes, delimiter: str) -> str:
    """Say where the first cell with a line break begins."""
    lines = (line.decode(errors="replace") for line in data.splitlines(keepends=True) if line.strip(b"\r\n"))
    reader, rows = csv.reader(lines, delimiter=delimiter), 0
    with contextlib.suppress(csv.Error):  # a cell without end: pyarrow took it, so it ends with the file
        for cells in reader:
            rows += 1
            if reader.line_num != rows:
                broken = next(cell for cell in cells if "\n" in cell or "\r" in cell)
                return f": row {rows - 1}: {broken[:80]!r}"
    return ""


def _first_records(data: bytes, delimiter: str, where: str) -> tuple[list[str], int]:
    """Return the header's names and the number of cells of the first row (of the header where there is none)."""
    text = io.TextIOWrapper(io.BytesIO(data[:HEADER_BYTES]), encoding="utf-8", newline="")
    try:
        reader = csv.reader(text, delimiter=delimiter)
        names = next(reader)
        return names, len(next(reader, names))
    except csv.Error as error:
        raise StudyError(
            f"the header or the first row is no CSV: {error}", where=where, remedy="quote the cells"
        ) from None
    except (UnicodeDecodeError, StopIteration):
        raise StudyError("the header line is not UTF-8 text", where=where, remedy="CSV in UTF-8, or Parquet") from None


def _check_columns(names: list[str], wanted: list[str], where: str) -> None:
    for name in wanted:
        if names.count(name) > 1:
            raise StudyError(f"the column {name!r} stands twice", where=where, remedy="keep one of them")
        if name not in names:
            listed = ", ".join(repr(n) for n in names[:30])
            raise StudyError(
                f"the table has no column {name!r}", where=where, remedy=f"name one of its columns: {listed[:600]}"
            )


def _parquet(data: bytes, wanted: list[str], where: str, separator: str) -> pd.DataFrame:
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        _check_columns(file.schema_arrow.names, wanted, where)
        leaves = [
            (k, file.schema.column(k).path)
            for k in range(len(file.schema))
            if any(f"{file.schema.column(k).path}.".startswith(f"{name}.") for name in wanted)
        ]
        groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
        chunks = [group.column(k) for group in groups for k, _ in leaves]
        _check_size(sum(max(chunk.total_uncompressed_size, CELL_BYTES * chunk.num_values) for chunk in chunks), where)
        # A text that stands in many rows is one text in a dictionary: its size there is known before it takes room.
        texts = [path for k, path in leaves if file.schema.column(k).physical_type == "BYTE_ARRAY"]
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data), read_dictionary=texts).read(columns=wanted)
        _check_size(sum(_text_bytes(chunk) for column in table.columns for chunk in column.chunks), where)
    except (pyarrow.ArrowException, OSError) as error:
        raise StudyError(
            f"this cannot be read as Parquet: {str(error).splitlines()[0][:200]}", where=where, remedy="write it again"
        ) from None
    frame = pd.DataFrame({name: _as_text(table.column(name), name, where, separator) for name in wanted}, dtype="str")
    return _stripped(frame)


def _text_bytes(values: pyarrow.Array) -> int:
    """Return how long the texts of a dictionary, or of lists of them, are together; 0 for other values."""
    while pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        values = values.flatten()
    if not isinstance(values, pyarrow.DictionaryArray):
        return 0
    lengths = pc.call_function("binary_length", [values.dictionary]).cast(pyarrow.int64())
    return pc.call_function("sum", [lengths.take(values.indices)]).as_py() or 0


def _as_text(column: pyarrow.ChunkedArray, name: str, where: str, separator: str) -> pd.Series:
    kind = column.type
    try:
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            lists = column.cast(pyarrow.list_(pyarrow.string())).combine_chunks()
            # A null in a list would make the whole cell null.
            lists = pyarrow.ListArray.from_arrays(lists.offsets, lists.values.fill_null(""), mask=lists.is_null())
            column = pyarrow.chunked_array([pc.call_function("binary_join", [lists, pyarrow.scalar(separator)])])
        elif pyarrow.types.is_dictionary(kind):
            column = column.cast(kind.value_type)
        column = column.cast(pyarrow.string()).fill_null("")
        column.validate(full=True)  # a file may call any bytes UTF-8
        return column.to_pandas()
    except pyarrow.ArrowException:
        raise StudyError(
            f"the column {name!r} of type {kind} cannot be read as text", where=where, remedy="text or numbers"
        ) from None


def _stripped(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.apply(lambda c: c.str.strip()) if len(frame) else frame


def flag_masks(frame: pd.DataFrame, columns: Mapping[str, str], where: str) -> pd.DataFrame:
    """Turn columns of 1, 0, −1 or blank into masks.

    Parameters
    ----------
    columns : column -> finding.

    Returns
    -------
    frame of int64 columns found, uncertain, negated (explicitly 0), one row a row.
    """
    masks = {kind: np.zeros(len(frame), np.int64) for kind in ("found", "uncertain", "negated")}
    for column, finding in columns.items():
        codes, unique = pd.factorize(frame[column].str.lower())
        odd = [str(u) for u in unique if str(u) not in FLAGS]
        if odd:
            failing = frame.loc[frame[column].str.lower().isin(odd), column]
            refuse_rows(f"{column!r} must be 1, 0, -1 or blank", failing, where)
        values = np.array([FLAGS[str(u)] if u else np.nan for u in unique])[codes] if len(unique) else np.zeros(0)
        for kind, value in (("found", 1), ("uncertain", -1), ("negated", 0)):
            masks[kind] |= np.where(values == value, BIT[finding], 0)
    return pd.DataFrame(masks, index=frame.index)


def refuse_rows(rule: str, failing: pd.Series, where: str, remedy: str | None = None) -> None:
    """Raise a StudyError that lists the first failing rows and their number.

    Parameters
    ----------
    failing : what stands in these rows; the index is the row's place below the header, from 0.
    """
    raise StudyError(_failing_rows(rule, failing), where=where, remedy=remedy or "mend these rows, or leave them out")


def _failing_rows(rule: str, failing: pd.Series) -> str:
    first = failing.iloc[:SHOWN_ROWS]
    shown = ", ".join(f"row {row + 1}: {str(value)[:80]!r}" for row, value in first.items() if isinstance(row, int))
    more = f" … and {len(failing) - SHOWN_ROWS} more" if len(failing) > SHOWN_ROWS else ""
    return f"{len(failing)} rows fail: {rule} ({shown}{more})"


_BAD_PATH = r"(^|/)\.\.?(/|$)|^/|^~|^[A-Za-z]:|\\|//|/$|^$|://|[\x00-\x1f\x7f]"
_PLAIN_ASCII = r"^[ -~]*$"


def path_stays_below(paths: pd.Series) -> pd.Series:
    return ~_matches(paths, _BAD_PATH)


def _plain(texts: pd.Series) -> pd.Series:
    """False where invisible characters or two spellings of one letter could make one id look like two."""
    ascii_only = _matches(texts, _PLAIN_ASCII)
    others = {str(t) for t in texts[~ascii_only]}
    good = [text for text in others if text.isprintable() and unicodedata.is_normalized("NFC", text)]
    return ascii_only | texts.isin(good)


def _matches(texts: pd.Series, pattern: str) -> pd.Series:
    found = pc.call_function(
        "match_substring_regex",
        [pyarrow.array(texts.astype(object), pyarrow.string())],
        pc.MatchSubstringOptions(pattern),
    )
    return pd.Series(found.to_numpy(zero_copy_only=False), index=texts.index)


_ID_CHECKS = [
    pa.Check(lambda c: c != "", error="the image id is blank"),
    pa.Check(_plain, error="the image id holds invisible or decomposed characters"),
]
_RAW_ROWS = pa.DataFrameSchema(
    {
        "path": pa.Column(
            None, pa.Check(path_stays_below, error="the image path must be relative and stay below its root")
        ),
        "original": pa.Column(
            None,
            [
                *_ID_CHECKS,
                pa.Check(lambda c: ~c.duplicated(keep=False), error="the image id stands in several rows"),
            ],
        ),
        "patient": pa.Column(
            None,
            [
                pa.Check(lambda c: ~c.str.lower().isin(PLACEHOLDERS), error="the patient id is blank or a placeholder"),
                pa.Check(_plain, error="the patient id holds invisible or decomposed characters"),
            ],
        ),
        "view": pa.Column(
            None, pa.Check.isin(sorted(set(VIEWS.values())), error="the view is not AP, PA, LATERAL or blank")
        ),
        "split": pa.Column(
            None,
            pa.Check.isin(
                ["", "train", "val", "test", "train_val", "unused"], error="the split is not train, val or test"
            ),
        ),
        "found": pa.Column(
            "int64",
            pa.Check(
                lambda c: ((c & BIT[NO_FINDING]) == 0) | ((c & ANY_PATHOLOGY) == 0),
                error="No Finding stands beside a pathology",
            ),
        ),
        "uncertain": pa.Column("int64"),
        "negated": pa.Column("int64"),
    },
    checks=[pa.Check(lambda f: (f["found"] & f["uncertain"]) == 0, error="a finding is both marked and uncertain")],
)


_IDS_MAY_REPEAT = _RAW_ROWS.update_column("original", checks=_ID_CHECKS)


def checked_rows(
    name: str, raw: pd.DataFrame, folder: Storage, where: str, drop_duplicates: bool = False
) -> pd.DataFrame:
    """Check raw rows and return them in canonical columns.

    Parameters
    ----------
    name : the source's key.
    raw : columns path (below ``folder``), original (the image's own name), patient, view, split, found, uncertain,
        negated; the index is the row's place in the table.
    drop_duplicates : all rows whose image id stands in several rows get the split ``unused``; else they are refused.

    Raises
    ------
    StudyError : naming each broken rule, its first rows and their number.
    """
    if raw.empty:
        raise StudyError(
            f"source {name}: the table has no rows", where=where, remedy="mend the table, or the `where` filter"
        )
    try:
        (_IDS_MAY_REPEAT if drop_duplicates else _RAW_ROWS).validate(raw, lazy=True)
    except pa.errors.SchemaErrors as error:
        raise StudyError(
            _described(error.failure_cases, raw), where=where, remedy="mend these rows, or leave them out"
        ) from None
    _check_spellings(raw, where)
    raw = raw.assign(split=raw["split"].mask(raw["original"].duplicated(keep=False), "unused"))
    _check_given_splits(raw, where)
    root = open_storage(folder.uri).uri.rstrip("/") + "/"
    rows = pd.DataFrame(
        {
            "image_id": f"{name}/" + raw["original"],
            "patient_id": f"{name}:" + raw["patient"],
            "uri": root + raw["path"],
            "view": raw["view"],
            "found": raw["found"],
            "uncertain": raw["uncertain"],
            "negated": raw["negated"],
            "split": raw["split"],
        }
    )
    _check_uris(rows[~rows["image_id"].duplicated(keep=False)], where)
    return rows.sort_values("image_id", kind="stable").reset_index(drop=True)


def _described(cases: pd.DataFrame, raw: pd.DataFrame) -> str:
    lines: list[str] = []
    for rule, group in cases.groupby("check", sort=False):
        places = group["index"].dropna().astype(int).drop_duplicates().tolist()
        column = str(group["column"].iloc[0])
        shown = raw[column] if column in ("path", "original", "patient") else raw["original"]
        lines.append(_failing_rows(str(rule), shown.loc[places]))
    return "; ".join(lines)


def _check_spellings(raw: pd.DataFrame, where: str) -> None:
    """A patient that is written in two ways would be taken for two, of whom one may be trained and one tested on."""
    first = raw["patient"].drop_duplicates()
    folded = pd.Series([_folded(str(patient)) for patient in first], index=first.index)
    twice = folded.duplicated(keep=False)
    if twice.any():
        groups = [group for _, group in first[twice].groupby(folded[twice], sort=False)]
        shown = "; ".join(
            " and ".join(f"{str(group[row])[:80]!r} (row {int(row) + 1})" for row in group.index[:3])
            for group in groups[:SHOWN_ROWS]
        )
        raise StudyError(
            f"{len(groups)} patients seem to be written in two ways: {shown}",
            where=where,
            remedy="write each patient in one way: capitals, leading zeros and a final .0 do not tell patients apart",
        )


def _folded(patient: str) -> str:
    number = re.fullmatch(r"0*([0-9]+?)(\.0+)?", patient)
    return number.group(1) if number else patient.casefold()


def _check_given_splits(raw: pd.DataFrame, where: str) -> None:
    """A patient whose films stand in two given splits would be trained and tested on."""
    raw = raw[raw["split"] != "unused"]
    given = raw[raw["split"] != ""]
    several = given.groupby("patient")["split"].nunique()
    torn = several.index[several > 1]
    if len(torn):
        refuse_rows("a patient stands in several splits", raw.loc[raw["patient"].isin(torn), "patient"], where)
    if 0 < len(given) < len(raw):
        refuse_rows("the split is blank, while other rows have one", raw.loc[raw["split"] == "", "original"], where)


def _check_uris(rows: pd.DataFrame, where: str) -> None:
    twice = rows["uri"].duplicated(keep=False)
    if twice.any():
        refuse_rows("several rows name the same file", rows.loc[twice, "uri"], where)
