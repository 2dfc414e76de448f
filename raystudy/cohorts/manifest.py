"""Any hospital pair by a column map (source kind ``manifest``).

In flow a CSV or Parquet table with one row an image; out flow the checked rows of one source.  Findings come from a
column of joined labels, from columns of 1, 0, −1 or blank, or from both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from raystudy.cohorts.settings import ManifestSource
from raystudy.cohorts.tables import (
    SPLIT_NAMES,
    VIEWS,
    SourceTable,
    checked_rows,
    flag_masks,
    refuse_rows,
)
from raystudy.cohorts.text_table import read_text_table
from raystudy.cohorts.vocabulary import parse_labels
from raystudy.errors import StudyError
from raystudy.storage import open_storage


def read_manifest(name: str, source: ManifestSource, drop_duplicates: bool = False) -> SourceTable:
    """Read the rows of one source.

    Raises
    ------
    StudyError : a table that cannot be read, a column that is missing, rows that break a rule.
    """
    root, columns = open_storage(source.root), source.columns
    where = root.address(source.table)
    wanted = [c for c in columns.model_dump().values() if c is not None]
    frame = read_text_table(root, source.table, [*wanted, *source.finding_columns, *source.where], source.separator)
    frame = _filtered(frame, source.where, where)
    masks = read_findings(
        frame, columns.findings, columns.uncertain, source.finding_columns, source.findings, source.separator, where
    )
    path = frame[columns.image].str.replace(r"^(\./)+", "", regex=True)
    raw = pd.DataFrame(
        {
            "path": path,
            "original": frame[columns.image_id] if columns.image_id else path,
            "patient": frame[columns.patient],
            "view": canonical_views(frame, columns.view, source.view, where),
            "split": canonical_splits(frame, columns.split, where),
            **masks,
        }
    )
    return SourceTable(name, checked_rows(name, raw, root, where, drop_duplicates), (f"{len(raw)} rows of {where}",))


def _filtered(frame: pd.DataFrame, filters: Mapping[str, object], where: str) -> pd.DataFrame:
    keep = np.ones(len(frame), bool)
    for column, value in filters.items():
        values = value if isinstance(value, tuple) else (value,)
        texts = {str(v).lower() if isinstance(v, bool) else str(v) for v in values}
        compared = frame[column].str.lower() if any(isinstance(v, bool) for v in values) else frame[column]
        keep &= compared.isin(texts).to_numpy()
    if len(frame) and not keep.any():
        seen = "; ".join(f"{c}: {', '.join(map(str, frame[c].unique()[:8]))}" for c in filters)
        raise StudyError("no row passes the `where` filter", where=where, remedy=f"the columns hold {seen}")
    return frame[keep]


def read_findings(
    frame: pd.DataFrame,
    joined: str | None,
    joined_uncertain: str | None,
    flags: Mapping[str, str],
    spellings: Mapping[str, str | None],
    separator: str,
    where: str,
) -> pd.DataFrame:
    """Return the int64 masks found, uncertain and negated of all rows."""
    masks = flag_masks(frame, flags, where)
    for column, kind in ((joined, "found"), (joined_uncertain, "uncertain")):
        if column is None:
            continue
        found, unknown = parse_labels(frame[column], separator, spellings)
        if unknown:
            refuse_unknown(frame[column], unknown, where)
        masks[kind] |= found
    return masks


def refuse_unknown(texts: pd.Series, unknown: Mapping[str, Iterable[str]], where: str) -> None:
    """Refuse rows with spellings of findings that the vocabulary does not know."""
    spelled = sorted({part for parts in unknown.values() for part in parts})
    refuse_rows(
        f"unknown findings {', '.join(map(repr, spelled[:8]))}",
        texts[texts.isin(list(unknown))],
        where,
        remedy="map each spelling to the vocabulary under `findings:` of this source, or to null for no finding",
    )


def canonical_views(frame: pd.DataFrame, column: str | None, constant: str, where: str) -> pd.Series:
    """Return AP, PA, LATERAL or blank for each row."""
    texts = frame[column].str.upper() if column else pd.Series(constant.upper(), index=frame.index, dtype="str")
    views = texts.map(VIEWS)
    if views.isna().any():
        refuse_rows("the view is not AP, PA, LATERAL or blank", texts[views.isna()], where)
    return views


def canonical_splits(frame: pd.DataFrame, column: str | None, where: str) -> pd.Series:
    """Return train, val, test or train_val for each row, or blank when the table brings no split."""
    if column is None:
        return pd.Series("", index=frame.index, dtype="str")
    splits = frame[column].str.lower().map(SPLIT_NAMES)
    if splits.isna().any():
        refuse_rows("the split is not train, val or test", frame.loc[splits.isna(), column], where)
    return splits
