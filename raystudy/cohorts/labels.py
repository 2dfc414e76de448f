"""From findings to classes: positive, negative, or left out, by the task and the policies."""

from __future__ import annotations

import numpy as np
import pandas as pd

from raystudy.cohorts.settings import ANY_PATHOLOGY_TASK, CohortSettings, Negatives, TaskSettings
from raystudy.cohorts.vocabulary import ANY_PATHOLOGY, BIT, NO_FINDING, SUPPORT_DEVICES

POSITIVE, NEGATIVE, LEFT_OUT = 1, 0, -1


def label_rows(rows: pd.DataFrame, task: TaskSettings, source: str, cohort: CohortSettings) -> np.ndarray:
    """Return 1 (positive), 0 (negative) or −1 (left out) for each row, int8.

    Parameters
    ----------
    rows : int64 masks found, uncertain, negated, and patient_id, view.
    """
    found, uncertain = rows["found"].to_numpy(), rows["uncertain"].to_numpy()
    if task.positive == ANY_PATHOLOGY_TASK:
        labels = _abnormality(found, uncertain, cohort)
    else:
        labels = _finding(rows, BIT[task.positive], task.negatives_for(source), cohort)
    if cohort.normal_without_devices:
        labels[(labels == NEGATIVE) & (found & BIT[NO_FINDING] != 0) & (found & BIT[SUPPORT_DEVICES] != 0)] = LEFT_OUT
    if cohort.views == "frontal":
        labels[(rows["view"] == "LATERAL").to_numpy()] = LEFT_OUT
    if cohort.positive_patients_as_negatives == "exclude":
        ill = rows["patient_id"].isin(rows.loc[labels == POSITIVE, "patient_id"]).to_numpy()
        labels[ill & (labels == NEGATIVE)] = LEFT_OUT
    return labels


def _abnormality(found: np.ndarray, uncertain: np.ndarray, cohort: CohortSettings) -> np.ndarray:
    abnormal = found & ANY_PATHOLOGY != 0
    if cohort.uncertain == "ones":
        abnormal = abnormal | (uncertain & ANY_PATHOLOGY != 0)
    normal = (found & BIT[NO_FINDING] != 0) & ~abnormal
    return np.where(abnormal, POSITIVE, np.where(normal, NEGATIVE, LEFT_OUT)).astype(np.int8)


def _finding(rows: pd.DataFrame, bit: int, policy: Negatives, cohort: CohortSettings) -> np.ndarray:
    found, unsure = rows["found"].to_numpy(), rows["uncertain"].to_numpy() & bit != 0
    positive = found & bit != 0
    if cohort.uncertain == "ones":
        positive = positive | unsure
    none, other = found & BIT[NO_FINDING] != 0, found & ANY_PATHOLOGY & ~bit != 0
    explicit = rows["negated"].to_numpy() & bit != 0
    if cohort.uncertain == "zeros":
        explicit = explicit | unsure
    negative = {
        "other_pathology": other & ~none,
        "other_or_no_finding": other | none,
        "any_nonpneumonia": np.ones(len(rows), bool),
        "explicit_zero": explicit,
        "explicit_zero_other_pathology": explicit & other,
        "no_finding": none,
    }[policy]
    negative = negative & ~positive
    if cohort.uncertain == "drop":
        negative = negative & ~unsure
    return np.where(positive, POSITIVE, np.where(negative, NEGATIVE, LEFT_OUT)).astype(np.int8)
