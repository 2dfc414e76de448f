"""Patient-wise splits: no patient is trained on and tested on.

In flow the checked rows of one source; out flow train, val or test for each row.  A split that the table brings is
kept.  Otherwise the patients, sorted by id, are permuted by a named stream and cut at the fractions.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from raystudy.cohorts.tables import SourceTable
from raystudy.streams import stream

NIH_PATIENTS = 30_805
# A seed of numpy's legacy generator (frozen by numpy) whose 80/10/10 cut of the sorted NIH patients gives the paper's
# 1099 / 187 / 145 pneumonia films. It matches these counts; the authors' own patients are not published.
NIH_PAPER_SEED = 48_066


def nih_paper_split() -> np.ndarray:
    """Return train, val or test for NIH patient ids 1…30805, at index id − 1."""
    order = np.random.RandomState(NIH_PAPER_SEED).permutation(NIH_PATIENTS)
    split = np.empty(NIH_PATIENTS, dtype=object)
    split[order[:24_644]], split[order[24_644:27_724]], split[order[27_724:]] = "train", "val", "test"
    return split


def split_source(
    table: SourceTable, fractions: tuple[float, float, float], study_seed: int, cohort_seed: int
) -> pd.Series:
    """Return the split of each row: train, val, test or unused.

    Rows with a given split keep it; ``train_val`` is divided among these two by their fractions, blank among all three.
    """
    rows = table.rows
    split = rows["split"].astype(object)
    train, val, _ = fractions
    for given, cuts in (("", (train, train + val)), ("train_val", (train / (train + val), 1.0))):
        chosen = rows["split"] == given
        if not chosen.any():
            continue
        codes, patients = pd.factorize(rows.loc[chosen, "patient_id"], sort=True)
        order = stream(study_seed, "split", table.name, cohort_seed).permutation(len(patients))
        first, second = (int(cut * len(patients) + 1e-9) for cut in cuts)
        by_patient = np.empty(len(patients), dtype=object)
        by_patient[order[:first]], by_patient[order[first:second]], by_patient[order[second:]] = "train", "val", "test"
        split[chosen] = by_patient[codes]
    return split
