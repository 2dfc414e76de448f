"""Checking the rows that say who is in a source.

In flow raw text columns; out flow the rows of one source: image_id, patient_id, uri, view, split, and the findings as
bit masks (found, uncertain, negated).  A row that breaks a rule is named with the rule; nothing is repaired, guessed or
left out silently.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
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
# Characters that str.isprintable() lets pass but nobody sees: Unicode's Default_Ignorable_Code_Point, Braille's blank.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_DASHES = re.compile("[\u2010-\u2015\u2212]")


def path_stays_below(paths: pd.Series) -> pd.Series:
    return ~_matches(paths, _BAD_PATH)


def _plain(texts: pd.Series) -> pd.Series:
    """False where invisible characters or two spellings of one letter could make one id look like two."""
    ascii_only = _matches(texts, _PLAIN_ASCII)
    others = {str(t) for t in texts[~ascii_only]}
    good = [
        text
        for text in others
        if text.isprintable() and unicodedata.is_normalized("NFC", text) and not _UNSEEN.search(text)
    ]
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
            remedy="write each patient in one way: capitals, kinds of dash or digit, a number's leading zeros and "
            "final .0 do not tell patients apart",
        )


def _folded(patient: str) -> str:
    patient = _DASHES.sub("-", unicodedata.normalize("NFKC", patient))
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
