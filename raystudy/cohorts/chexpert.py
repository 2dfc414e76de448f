"""CheXpert, small or full-size (source kind ``chexpert``).

In flow ``train.csv`` and ``valid.csv``; out flow the checked rows.  A ``Path`` begins with the data set's own folder
(``CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg``), so it is relative to the folder above; the
patient is read from it.  Labels are 1, 0, −1 (uncertain) or blank (not mentioned).
"""

from __future__ import annotations

import pandas as pd

from raystudy.cohorts.settings import ChexpertSource, CohortSettings
from raystudy.cohorts.tables import SourceTable, checked_rows, flag_masks, refuse_rows
from raystudy.cohorts.text_table import read_text_table
from raystudy.cohorts.vocabulary import canonical_finding
from raystudy.errors import StudyError
from raystudy.storage import Storage, open_storage

FOLDERS = ("", "CheXpert-v1.0-small", "CheXpert-v1.0")
LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
FINDINGS = {label: str(canonical_finding(label)) for label in LABELS}
PATH, ORIENTATION, VIEW = "Path", "Frontal/Lateral", "AP/PA"
_FILE = r"patient(?P<patient>[0-9]+)/study[0-9]+/view[0-9]+_(?P<side>frontal|lateral)\.jpg"
_PATH = rf"[^/\\]+/(?P<original>(?:train|valid|test)/{_FILE})"


def read_chexpert(
    name: str, source: ChexpertSource, cohort: CohortSettings, drop_duplicates: bool = False
) -> SourceTable:
    """Read the rows of CheXpert.

    Raises
    ------
    StudyError : a table that is missing or cannot be read, or rows that break a rule.
    """
    root = open_storage(source.root)
    train = source.train or _first(root, "train.csv")
    if train is None:
        raise StudyError(
            "there is no CheXpert train.csv here", where=root.uri, remedy="name the data set's folder, or set `train`"
        )
    valid = source.valid or _first(root, "valid.csv")
    if valid is None and cohort.h2_test == "official_valid":
        raise StudyError(
            "h2_test: official_valid needs valid.csv", where=root.uri, remedy="put it here, or set `valid`"
        )
    images = open_storage(source.images) if source.images else _folder(root, train)
    official = cohort.h2_test == "official_valid"
    parts = [_table(root, train, "train_val" if official else "")]
    where = root.address(train)
    notes = [f"{len(parts[0])} rows of {where}"]
    if valid is not None:
        parts.append(_table(root, valid, "test" if official else "unused"))
        use = "the test split" if official else "not used (h2_test: holdout)"
        notes.append(f"{len(parts[1])} rows of {root.address(valid)}: {use}")
        where += f", then {root.address(valid)}"  # rows are counted through both
    raw = pd.concat(parts, ignore_index=True)
    return SourceTable(name, checked_rows(name, raw, images, where, drop_duplicates), tuple(notes))


def _first(root: Storage, table: str) -> str | None:
    for folder in FOLDERS:
        there = root.stamps(folder)  # a listing tells a missing bucket from a missing file
        for name in (table, f"{table}.gz"):
            if name in there:
                return "/".join(filter(None, (folder, name)))
    return None


def _folder(root: Storage, table: str) -> Storage:
    folder = table.rpartition("/")[0]
    return root.child(*folder.split("/")) if folder else root


def _table(root: Storage, path: str, split: str) -> pd.DataFrame:
    where = root.address(path)
    frame = read_text_table(root, path, [PATH, ORIENTATION, VIEW, *LABELS])
    parts = frame[PATH].str.extract(f"^{_PATH}$")
    odd = parts["original"].isna()
    if odd.any():
        refuse_rows(
            "the path is not like CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg",
            frame.loc[odd, PATH],
            where,
        )
    odd = ~frame[ORIENTATION].isin(["Frontal", "Lateral"])
    if odd.any():
        refuse_rows("Frontal/Lateral is neither", frame.loc[odd, ORIENTATION], where)
    odd = frame[ORIENTATION].str.lower() != parts["side"]
    if odd.any():  # a table whose columns were shuffled would call lateral films frontal
        refuse_rows("Frontal/Lateral does not fit the file's name", frame.loc[odd, PATH], where)
    odd = ~frame[VIEW].isin(["AP", "PA", "LL", "RL", ""])
    if odd.any():
        refuse_rows("AP/PA is not AP, PA, LL, RL or blank", frame.loc[odd, VIEW], where)
    # 17 frontal rows carry LL or RL: frontal, of unknown direction.
    view = frame[VIEW].where(frame[VIEW].isin(["AP", "PA"]), "").where(frame[ORIENTATION] == "Frontal", "LATERAL")
    return pd.DataFrame(
        {
            "path": parts["original"],
            "original": parts["original"],
            # patient1 and patient00001 are one
            "patient": "patient" + parts["patient"].str.lstrip("0").str.zfill(5),
            "view": view,
            "split": pd.Series(split, index=frame.index, dtype="str"),
            **flag_masks(frame, FINDINGS, where),
        }
    )
