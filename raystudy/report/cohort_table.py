"""Who was trained, validated and tested on: counts from the study's own rows in `cohorts/`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd

from raystudy.study import Study

COLUMNS = ["patient_id", "source", "label"]
PATTERN = re.compile(r"cohorts/.+-(?P<kind>h1_\d{3}|test)(?P<more>(-.+)?)\.parquet")


def cohort_table(
    study: Study, trial_ids: Sequence[str], sources: Sequence[str], class_names: Sequence[str]
) -> dict[str, Any] | None:
    """Return the page's table of some trials: films of each source and class, and patients, of their cohorts and tests.

    Parameters
    ----------
    class_names : the negative class first.
    """
    used = study.plan().get("rows", {})
    matches = [m for name in sorted({n for t in trial_ids for n in used.get(t, ())}) if (m := PATTERN.fullmatch(name))]
    if not matches:
        return None

    def read(match: re.Match[str]) -> pd.DataFrame:
        part = "test_set" if match["kind"] == "test" else "role"
        found = study.storage.read_table(match.string, [*COLUMNS, part]).to_pandas()
        return found.rename(columns={part: "part"})

    with ThreadPoolExecutor(8) as pool:
        frames = list(pool.map(read, matches))
    rows: list[list[str]] = []
    for match, frame in zip(matches, frames, strict=True):
        extra = match["more"].strip("-")
        name = "test" if match["kind"] == "test" else mixture(int(match["kind"][3:]))
        for part, group in sorted(frame.groupby("part"), key=lambda item: _order(str(item[0]))):
            counts = group.groupby(["source", "label"]).size()
            cells = [str(int(counts.get((source, label), 0))) for label in (1, 0) for source in sources]
            patients = str(group["patient_id"].nunique())
            rows.append([f"{name} {extra}".strip(), str(part), *cells, str(len(group)), patients])
    columns = [f"{class_names[label]}, {source}" for label in (1, 0) for source in sources]
    return {
        "title": "Who was trained and tested on",
        "columns": ["cohort", "used for", *columns, "films", "patients"],
        "rows": rows,
        "note": "Films of each class and source. No patient is in two of training, validation and test.",
    }


def mixture(share: int) -> str:
    return f"{share}H1-{100 - share}H2"


def _order(part: str) -> tuple[int, str]:
    return ({"train": 0, "val": 1}.get(part, 2), part)
