from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raystudy.cohorts.labels import label_rows
from raystudy.cohorts.settings import CohortSettings, TaskSettings
from raystudy.cohorts.vocabulary import NO_FINDING, PATHOLOGIES, SUPPORT_DEVICES, bits, names
from tests.cohorts.hospitals import hospital

POLICIES = [
    "other_pathology", "any_nonpneumonia", "other_or_no_finding", "explicit_zero", "explicit_zero_other_pathology",
    "no_finding",
]  # fmt: skip


def one(found: list[str], task: TaskSettings, view: str = "PA", **more: Any) -> int:
    """Return the label of a single row."""
    masks = {k: bits(more.pop(k, [])) for k in ("uncertain", "negated")}
    row = {"found": bits(found), **masks, "patient_id": "H1:p", "view": view}
    return int(label_rows(pd.DataFrame([row]), task, "H1", CohortSettings(**more))[0])


def slow_label(row: dict[str, Any], task: TaskSettings, policy: str, settings: CohortSettings) -> int:
    """The same rules, one row at a time, as they are written down."""
    found, uncertain, negated = (set(names(row[k])) for k in ("found", "uncertain", "negated"))
    if settings.views == "frontal" and row["view"] == "LATERAL":
        return -1
    if task.positive == "any_pathology":
        ill = found & set(PATHOLOGIES) or (settings.uncertain == "ones" and uncertain & set(PATHOLOGIES))
        label = 1 if ill else 0 if NO_FINDING in found else -1
    else:
        unsure = task.positive in uncertain
        if task.positive in found or (unsure and settings.uncertain == "ones"):
            return 1
        if unsure and settings.uncertain == "drop":
            return -1
        others = found & set(PATHOLOGIES) - {task.positive}
        zero = task.positive in negated or unsure  # what is still unsure here was made a zero
        allowed = {
            "other_pathology": bool(others) and NO_FINDING not in found,
            "any_nonpneumonia": True,
            "other_or_no_finding": bool(others) or NO_FINDING in found,
            "explicit_zero": zero,
            "explicit_zero_other_pathology": zero and bool(others),
            "no_finding": NO_FINDING in found,
        }
        label = 0 if allowed[policy] else -1
    if label == 0 and settings.normal_without_devices and {NO_FINDING, SUPPORT_DEVICES} <= found:
        return -1
    return label


@given(
    st.integers(0, 2**32),
    st.sampled_from(POLICIES),
    st.sampled_from(["drop", "ones", "zeros"]),
    st.booleans(),
    st.sampled_from(["frontal", "all"]),
    st.sampled_from(["pneumonia", "effusion", "any_pathology"]),
)
def test_labels_follow_the_written_rules(
    seed: int, policy: str, uncertain: str, devices: bool, views: str, positive: str
) -> None:
    task = TaskSettings.model_validate(
        {"positive": positive, "negatives": None if positive == "any_pathology" else policy}
    )
    settings = CohortSettings.model_validate(
        {"uncertain": uncertain, "normal_without_devices": devices, "views": views}
    )
    rows = hospital("H1", seed, patients=12).rows
    expected = [slow_label(dict(row), task, policy, settings) for row in rows.to_dict("records")]
    assert label_rows(rows, task, "H1", settings).tolist() == expected


def test_uncertain_pneumonia_is_left_out_of_both_classes_by_default() -> None:
    for found in ([], ["effusion"], ["no_finding"]):
        assert one(found, TaskSettings(), uncertain=["pneumonia"]) == -1
        assert one(found, TaskSettings(negatives="any_nonpneumonia"), uncertain=["pneumonia"]) == -1


def test_support_devices_are_no_pathology() -> None:
    assert one(["support_devices"], TaskSettings()) == -1
    assert one(["support_devices"], TaskSettings(positive="any_pathology")) == -1
    assert one(["support_devices", "no_finding"], TaskSettings(positive="any_pathology")) == 0


def test_frontal_film_of_unknown_direction_is_kept_and_lateral_is_not() -> None:
    assert one(["pneumonia"], TaskSettings(), view="") == 1
    assert one(["pneumonia"], TaskSettings(), view="LATERAL") == -1


def test_patients_with_a_positive_film_can_be_kept_from_the_negatives() -> None:
    rows = pd.DataFrame(
        {
            "found": [bits(["pneumonia"]), bits(["effusion"]), bits(["effusion"])],
            "uncertain": 0,
            "negated": 0,
            "patient_id": ["H1:a", "H1:a", "H1:b"],
            "view": "PA",
        }
    )
    allow = label_rows(rows, TaskSettings(), "H1", CohortSettings())
    exclude = label_rows(rows, TaskSettings(), "H1", CohortSettings(positive_patients_as_negatives="exclude"))
    assert allow.tolist() == [1, 0, 0]
    assert exclude.tolist() == [1, -1, 0]


@pytest.mark.parametrize("policy", POLICIES[:-1])
def test_abnormality_takes_no_other_negatives_than_no_finding(policy: str) -> None:
    with pytest.raises(ValueError, match="no_finding"):
        TaskSettings.model_validate({"positive": "any_pathology", "negatives": policy})


def test_each_source_can_have_its_own_negatives() -> None:
    task = TaskSettings.model_validate({"negatives": {"H2": "no_finding"}})
    assert (task.negatives_for("H1"), task.negatives_for("H2")) == ("other_pathology", "no_finding")
    assert task.class_names == ("no pneumonia", "pneumonia")
