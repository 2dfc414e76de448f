"""Reading the columns of a table of films as text: CSV (also gzip) or Parquet, from anybody.

In flow the bytes of a file; out flow text columns.  What a table unpacks to is bounded before it is unpacked.  A cell
of a CSV table holds no line break: a quote too many in one row would otherwise take the next rows into its cell, also
in a column that nobody reads.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import zlib
from collections.abc import Iterable

import pandas as pd
import pyarrow
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from raystudy.errors import StudyError
from raystudy.storage import Storage

LARGEST_TABLE = 2 << 30  # bytes after unpacking
CELL_BYTES = 8  # what a cell takes at least, however short its text
HEADER_BYTES = 1 << 18  # within which the header and the first row end


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
