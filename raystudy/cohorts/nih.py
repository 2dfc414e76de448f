"""NIH ChestX-ray14 in its true layouts (source kind ``nih``).

In flow ``Data_Entry_2017_v2020.csv`` or ``Data_Entry_2017.csv`` with their broken headers (``OriginalImage[Width``
and ``Height]`` are two columns, the older header ends in one comma more than its rows), the official lists where
wanted, and the tree of films, indexed by base name; out flow the checked rows.  Tables are joined by image name, never
by row order.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd

from raystudy.cohorts.manifest import canonical_views, refuse_unknown
from raystudy.cohorts.settings import CohortSettings, NihSource
from raystudy.cohorts.split import NIH_PATIENTS, nih_paper_split
from raystudy.cohorts.tables import SourceTable, checked_rows, refuse_rows
from raystudy.cohorts.text_table import read_text_table
from raystudy.cohorts.vocabulary import parse_labels
from raystudy.errors import StudyError
from raystudy.storage import Storage, open_storage

TABLES = tuple(f"Data_Entry_2017{version}.csv{packed}" for version in ("_v2020", "") for packed in ("", ".gz"))
LISTS = {"train_val": "train_val_list.txt", "test": "test_list.txt"}
NAME, LABELS, PATIENT, VIEW = "Image Index", "Finding Labels", "Patient ID", "View Position"
# The last film of the Kaggle tree's folders images_001 … images_012: films are dealt out in the order of their names.
KAGGLE_LAST = (
    "00001335_006", "00003923_013", "00006585_006", "00009232_003", "00011558_007", "00013774_025", "00016051_009",
    "00018387_034", "00020945_049", "00024717_000", "00028173_002", "00030805_000",
)  # fmt: skip


def read_nih(name: str, source: NihSource, cohort: CohortSettings, drop_duplicates: bool = False) -> SourceTable:
    """Read the rows of NIH ChestX-ray14.

    Raises
    ------
    StudyError : a table that is missing or cannot be read, rows that break a rule, a film that is there twice.
    """
    root = open_storage(source.root)
    table = source.table or _first(root)
    where = root.address(table)
    frame = read_text_table(root, table, [NAME, LABELS, PATIENT, VIEW])
    _check_names(frame, where)
    found, unknown = parse_labels(frame[LABELS], "|", {})
    if unknown:
        refuse_unknown(frame[LABELS], unknown, where)
    if (found == 0).any():
        refuse_rows("no finding is given; NIH writes No Finding", frame.loc[found == 0, NAME], where)
    images = open_storage(source.images) if source.images else root
    path, tree = _paths(frame[NAME], images, source.layout)
    raw = pd.DataFrame(
        {
            "path": path,
            "original": frame[NAME],
            "patient": frame[PATIENT].astype("int64").astype(str),  # "1" and "00000001" are one patient
            "view": canonical_views(frame, VIEW, "", where),
            "split": _splits(frame, source, cohort, root, where),
            "found": found,
            "uncertain": 0,
            "negated": 0,
        }
    )
    rows = checked_rows(name, raw, images, where, drop_duplicates)
    split = f"official lists {', '.join(LISTS.values())}" if source.official_lists else f"split {cohort.split}"
    return SourceTable(name, rows, (f"{len(rows)} rows of {where}", f"films: {tree}", split))


def _first(root: Storage) -> str:
    there = root.stamps()  # a listing tells a missing bucket from a missing file
    for table in TABLES:
        if table in there:
            return table
    raise StudyError(
        "there is no NIH table here", where=root.uri, remedy=f"put {' or '.join(TABLES)} here, or set `table`"
    )


def _check_names(frame: pd.DataFrame, where: str) -> None:
    """File names carry the patient: a table whose columns were shuffled would leak patients between splits."""
    odd = ~frame[NAME].str.fullmatch(r"[0-9]{8}_[0-9]{3}\.png")
    if odd.any():
        refuse_rows("the image name is not like 00000001_000.png", frame.loc[odd, NAME], where)
    odd = ~frame[PATIENT].str.fullmatch(r"[0-9]{1,8}") | (frame[PATIENT].str.zfill(8) != frame[NAME].str.slice(0, 8))
    if odd.any():
        refuse_rows(
            "the patient id does not fit the image name", (frame[NAME] + " of patient " + frame[PATIENT])[odd], where
        )


def _splits(frame: pd.DataFrame, source: NihSource, cohort: CohortSettings, root: Storage, where: str) -> pd.Series:
    if source.official_lists:
        return _official(frame, root, where)
    if cohort.split == "random":
        return pd.Series("", index=frame.index, dtype="str")
    patient = frame[PATIENT].astype("int64")
    odd = (patient < 1) | (patient > NIH_PATIENTS)
    if odd.any():
        refuse_rows(
            f"the split paper_counts knows the patients 1…{NIH_PATIENTS}",
            frame.loc[odd, PATIENT],
            where,
            remedy="cohort.split: random, or the original table",
        )
    return pd.Series(nih_paper_split()[patient.to_numpy() - 1], index=frame.index, dtype="str")


def _official(frame: pd.DataFrame, root: Storage, where: str) -> pd.Series:
    split = pd.Series("", index=frame.index, dtype="object")
    for kind, path in LISTS.items():
        try:
            listed = root.read_bytes(path).decode("ascii").split()
        except FileNotFoundError:
            raise StudyError(
                "the official list is not here", where=root.address(path), remedy="official_lists: false"
            ) from None
        except UnicodeDecodeError:
            raise StudyError(
                "this is no list of film names", where=root.address(path), remedy="fetch it again"
            ) from None
        inside = frame[NAME].isin(listed)
        twice = inside & (split != "")
        if twice.any():
            refuse_rows("the film stands in both official lists", frame.loc[twice, NAME], where)
        split[inside] = kind
    if (split == "").any():
        refuse_rows("the film stands in no official list", frame.loc[split == "", NAME], where)
    return split.astype("str")


def _paths(names: pd.Series, images: Storage, layout: str) -> tuple[pd.Series, str]:
    """Return where each film lies below ``images``, and in words how it was found."""
    if layout == "kaggle":
        return _kaggle(names), "Kaggle tree"
    if layout == "flat":
        return "images/" + names, "one folder"
    found: dict[str, str] = {}
    folders: Counter[str] = Counter()
    for path in images.list():
        if not path.endswith(".png"):
            continue
        folder, _, base = path.rpartition("/")
        if base in found:
            raise StudyError(
                f"the film {base} is there twice: {found[base]} and {path}", where=images.uri, remedy="keep one of them"
            )
        found[base] = path
        folders[folder] += 1
    if not found:
        return _kaggle(names), "none there yet; planned as the Kaggle tree"
    if any(folder.split("/")[-2:-1] == [f"images_{k:03d}"] for folder in folders for k in range(1, 13)):
        expected = _kaggle(names)
    else:
        main = folders.most_common(1)[0][0]
        expected = (f"{main}/" if main else "") + names
    path = names.map(found)
    missing = int(path.isna().sum())
    return path.fillna(expected), f"{len(names) - missing} of {len(names)} there"


def _kaggle(names: pd.Series) -> pd.Series:
    folder = np.searchsorted(np.array(KAGGLE_LAST), names.str.slice(0, 12).to_numpy(str)) + 1
    return (
        pd.Series([f"images_{k:03d}/images/" for k in range(14)], dtype="str").iloc[folder].set_axis(names.index)
        + names
    )
