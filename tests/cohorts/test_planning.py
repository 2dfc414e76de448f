from __future__ import annotations

import subprocess
import sys
from functools import cache
from math import sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raystudy.cohorts.build import Cohorts
from raystudy.cohorts.labels import label_rows
from raystudy.cohorts.planning import attainable, exact_half_width, half_width, plan_cohorts, policies
from raystudy.cohorts.settings import CohortSettings, TaskSettings
from raystudy.cohorts.sources import read_source
from raystudy.errors import StudyError
from raystudy.storage import open_storage
from tests.cohorts.hospitals import TASKS, draw, hospital, real_sources, real_tables, shared, source

PAPER = {"train": 1099, "val": 187, "test": 145}


@cache
def real_cohorts() -> Cohorts:
    return draw(real_tables(), mixtures=tuple(range(0, 101, 10)), **PAPER)


def test_real_tables_give_the_paper_counts() -> None:
    have = {(c.task, c.split, c.source, c.label): c.have for c in real_cohorts().cells}
    assert [have["pneumonia", s, "H1", 1] for s in PAPER] == [1099, 187, 145]
    assert [have["pneumonia", s, "H1", 0] for s in PAPER] == [40161, 5244, 4923]
    assert sum(have["pneumonia", s, "H2", 1] for s in PAPER) == 4675
    assert sum(have["pneumonia", s, "H2", 0] for s in PAPER) == 141085
    assert sum(have["abnormality", s, "H1", 1] for s in PAPER) == 51759
    assert sum(have["abnormality", s, "H1", 0] for s in PAPER) == 60361
    assert sum(have["abnormality", s, "H2", 1] for s in PAPER) == 161009
    assert sum(have["abnormality", s, "H2", 0] for s in PAPER) == 16974


def test_plan_of_the_real_tables_has_no_overlap_and_the_paper_totals() -> None:
    plan = plan_cohorts(real_cohorts(), TASKS, real_sources(), CohortSettings(**PAPER))
    assert plan.overlap == 0
    totals = plan.counts.groupby(["task", "h1_share", "split", "test_set"])["images"].sum()
    assert set(totals.xs("train", level="split")) == {2198}
    assert set(totals.xs("val", level="split")) == {374}
    assert set(totals.xs("test", level="split")) == {290}
    assert len(plan.counts.query("task == 'pneumonia' and h1_share == 10 and split == 'train'")) == 4
    assert {t.images for t in plan.tests} == {290}
    assert all(t.half_width < t.half_width_clustered for t in plan.tests)  # some patients give several films
    assert plan.policies[6].effect.endswith("kept: H1 0 of 60361, H2 7421 of 16974")
    assert "pneumonia 8 positive" in plan.sources["H2"][-1]  # the official validation films, which are not used
    assert plan.sources["H1"][-1] == "split paper_counts"


def test_patients_in_two_splits_are_counted() -> None:
    cohorts = draw((hospital("H1", 0, 300), hospital("H2", 1, 300)), mixtures=(0, 50))
    assert plan_cohorts(cohorts, TASKS, {}, cohorts.settings).overlap == 0
    films = cohorts.cohort("pneumonia", 50, 0)  # torn in place: the plan counts what the trials will get
    trained, checked = (films.index[films["role"] == role] for role in ("train", "val"))
    tested = cohorts.tests("pneumonia", 0)["patient_id"]
    films.loc[checked[0], "patient_id"] = films.loc[trained[0], "patient_id"]
    films.loc[trained[-1], "patient_id"] = tested.iloc[0]
    assert plan_cohorts(cohorts, TASKS, {}, cohorts.settings).overlap == 2


def test_official_valid_is_refused_with_have_8_need_145() -> None:
    official = CohortSettings(h2_test="official_valid")
    tables = real_tables()[0], read_source("H2", real_sources()["H2"], official, open_storage("nowhere"))
    with pytest.raises(StudyError) as refusal:
        draw(tables, h2_test="official_valid", **PAPER)
    assert "test H2 positive: have 8, need 145" in str(refusal.value)
    assert "cohort.h2_test: holdout" in str(refusal.value)
    shrunk = draw(tables, h2_test="official_valid", shrink=True, **PAPER)
    assert shrunk.size("pneumonia", "test", 0) == 8
    assert set(shrunk.tests("pneumonia", 0)["test_set"].value_counts()) == {16}


@pytest.mark.parametrize(
    ("chosen", "positive", "negative"),
    [
        ({"views": "all"}, 4675 + 1364, None),
        ({"uncertain": "ones"}, 4675 + 15981, None),
        ({"negatives": "explicit_zero"}, 4675, 1875),
        ({"negatives": "explicit_zero_other_pathology"}, 4675, 902),
        ({"normal_without_devices": True, "negatives": "no_finding"}, 4675, 9553),
        ({"negatives": "no_finding"}, 4675, 16974),
    ],
)
def test_policies_take_the_counted_films_of_chexpert(
    chosen: dict[str, Any], positive: int, negative: int | None
) -> None:
    rows = real_tables()[1].rows.query("split == ''")
    task = TaskSettings.model_validate({"negatives": chosen.get("negatives")})
    labels = label_rows(
        rows, task, "H2", CohortSettings.model_validate({k: v for k, v in chosen.items() if k != "negatives"})
    )
    assert (labels == 1).sum() == positive
    assert negative is None or (labels == 0).sum() == negative


def test_full_tables_are_planned_within_ten_seconds_and_1500_megabytes() -> None:
    """One process reads both tables (335,534 rows), draws 22 cohorts and counts them."""
    shared("data", "metadata")
    code = (
        "import time\n"
        "from tests.cohorts.test_planning import *\n"
        "plan_cohorts(real_cohorts(), TASKS, real_sources(), CohortSettings(**PAPER))\n"
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(time.process_time(), peak)"  # ru_maxrss would tell of the process that started this one
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    seconds, kilobytes = map(float, done.stdout.split())
    assert kilobytes < 1.5e6
    # CPU time, imports included: 5 s on an idle core; a busy sibling core slows this one down.
    assert seconds < 20


def test_counts_of_a_plan_are_those_of_the_frames() -> None:
    cohorts = draw((hospital("H1", 0, 300), hospital("H2", 1, 300)), mixtures=(0, 35), max_per_patient=2)
    plan = plan_cohorts(cohorts, TASKS, {}, cohorts.settings)
    for row in plan.counts.to_dict("records"):
        task, share = row["task"], row["h1_share"]
        frame = cohorts.tests(task, 0) if share < 0 else cohorts.cohort(task, share, 0)
        chosen = frame["label"] == int(row["class"] == "positive")
        chosen &= (frame["source"] == row["source"]) & (frame["role"] == row["split"])
        if row["h1_share"] < 0:
            chosen &= frame["test_set"] == row["test_set"]
        assert (chosen.sum(), frame.loc[chosen, "patient_id"].nunique()) == (row["images"], row["patients"])
    assert plan.images == len(cohorts.table)
    assert plan.overlap == 0


def test_half_width_is_the_normal_one_and_counts_a_patient_once_when_clustered() -> None:
    assert half_width(290) == pytest.approx(100 * 1.959964 * sqrt(0.25 / 290), abs=1e-4)
    assert exact_half_width(10) == pytest.approx(31.29, abs=0.005)  # 5 of 10: 18.71 % to 81.29 %
    assert exact_half_width(1) == pytest.approx(48.75, abs=0.005)  # 0 of 1: 0 % to 97.5 %
    rows = hospital("H1", 3, 400), hospital("H2", 4, 400)
    for test in plan_cohorts(draw(rows), TASKS, {}, CohortSettings()).tests:
        films = draw(rows).tests(test.task, 0).query("test_set == @test.name")
        sizes = films["patient_id"].value_counts().to_numpy()
        assert test.half_width_clustered == pytest.approx(half_width(len(films) ** 2 / np.sum(sizes**2)))


def test_policies_are_all_fifteen_and_name_what_was_chosen() -> None:
    chosen = policies(TASKS, unread_sources(), CohortSettings(h2_test="official_valid"))
    assert [p.number for p in chosen] == list(range(1, 17))  # the sixteenth is matching on view
    assert chosen[0].value == "official_valid"


def unread_sources() -> dict[str, Any]:
    return {"H1": source(kind="nih", root="x"), "H2": source(kind="chexpert", root="y")}


def test_63_89_of_290_is_not_attainable_and_288_is_nearest() -> None:
    answer = attainable(63.89, 290)
    assert not answer.ok
    assert answer.nearest == (184, 288)
    assert [k for k, _ in (answer.below, answer.above)] == [185, 186]


@given(st.integers(1, 400), st.integers(0, 400), st.integers(0, 3))
def test_every_true_accuracy_is_attainable_as_printed(n: int, k: int, decimals: int) -> None:
    k = min(k, n)
    assert attainable(f"{100 * k / n:.{decimals}f}", n).ok


@settings(max_examples=50)
@given(st.integers(2000, 8000), st.integers(30, 120))
def test_nearest_n_is_the_first_that_a_search_finds(hundredths: int, n: int) -> None:
    def fits(m: int) -> bool:  # |100 k/m − p| ≤ half a hundredth, in integers
        return any(abs(20000 * k - 2 * hundredths * m) <= m for k in range(m + 1))

    answer = attainable(f"{hundredths / 100:.2f}", n)
    distance = abs(answer.nearest[1] - n)
    assert answer.ok == fits(n)
    assert fits(answer.nearest[1])
    assert not any(fits(m) for m in range(max(1, n - distance + 1), n + distance))


@pytest.mark.parametrize(("percent", "n"), [("101", 5), ("-1", 5), ("abc", 5), ("nan", 5), (50.0, 0), ("1e-9", 5)])
def test_impossible_questions_are_refused(percent: str | float, n: int) -> None:
    with pytest.raises(ValueError):
        attainable(percent, n)
