from __future__ import annotations

from itertools import combinations

import pandas as pd
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from raystudy.cohorts.build import Cohorts
from raystudy.cohorts.mixtures import TEST_SETS, cell_sizes
from raystudy.cohorts.settings import TaskSettings
from raystudy.cohorts.tables import SourceTable
from raystudy.errors import StudyError
from tests.cohorts.hospitals import build, draw, hospital, source

SEEDS = st.integers(0, 2**31 - 1)
MIXTURES = st.lists(st.integers(0, 100), min_size=1, max_size=4, unique=True).map(tuple)
POLICIES = st.fixed_dictionaries(
    {},
    optional={
        "nesting": st.sampled_from(["prefix", "independent"]),
        "rounding": st.sampled_from(["half_up", "floor_each_cell"]),
        "max_per_patient": st.integers(1, 3),
        "match_view": st.booleans(),
        "views": st.sampled_from(["frontal", "all"]),
        "uncertain": st.sampled_from(["drop", "ones", "zeros"]),
    },
)


PATIENTS = 160  # a hospital: enough for most policies


def two(seed: int, **more: object) -> tuple[SourceTable, SourceTable]:
    return hospital("H1", seed, **more), hospital("H2", seed + 1, **more)  # pyright: ignore[reportArgumentType]


def cell(frame: pd.DataFrame, source: str, label: int) -> set[str]:
    return set(frame.loc[(frame["source"] == source) & (frame["label"] == label), "image_id"])


def drawn(seed: int, mixtures: tuple[int, ...], given_split: bool, policies: dict[str, object]) -> Cohorts:
    """Draw; an example whose hospitals cannot fill a cell does not count."""
    try:
        return draw(two(seed, patients=PATIENTS, split=given_split), mixtures=mixtures, study_seed=seed, **policies)
    except StudyError as error:
        if "too few" in str(error) or "without any" in str(error):
            reject()
        raise


@settings(max_examples=30)
@given(SEEDS, MIXTURES, st.booleans(), POLICIES)
def test_no_patient_stands_in_two_splits_and_no_film_twice(
    seed: int, mixtures: tuple[int, ...], given_split: bool, policies: dict[str, object]
) -> None:
    cohorts = drawn(seed, mixtures, given_split, policies)
    for task in ("pneumonia", "abnormality"):
        tests = cohorts.tests(task, 0)
        for x in mixtures:
            trial = cohorts.cohort(task, x, 0)
            assert not trial["image_id"].duplicated().any()
            patients = [set(trial.loc[trial["role"] == r, "patient_id"]) for r in ("train", "val")]
            for a, b in combinations([*patients, set(tests["patient_id"])], 2):
                assert not a & b
        assert not tests.duplicated(["image_id", "test_set"]).any()


@settings(max_examples=30)
@given(SEEDS, st.integers(0, 100), st.booleans(), POLICIES)
def test_classes_balance_and_shares_mirror_at_any_mixture(
    seed: int, x: int, given_split: bool, policies: dict[str, object]
) -> None:
    cohorts = drawn(seed, (x,), given_split, policies)
    for task in ("pneumonia", "abnormality"):
        frames = dict(iter(cohorts.cohort(task, x, 0).groupby("role")))
        wanted = {"train": x, "val": x}
        frames |= dict(iter(cohorts.tests(task, 0).groupby("test_set")))
        wanted |= TEST_SETS
        assert set(frames) == set(wanted)
        for name, frame in frames.items():
            n = cohorts.size(task, name if name in ("train", "val") else "test", 0)
            sizes = cell_sizes(wanted[str(name)], n, cohorts.settings.rounding)
            for (k, label), size in sizes.items():
                assert len(cell(frame, ("H1", "H2")[k], label)) == size
            assert (frame["label"] == 1).sum() == (frame["label"] == 0).sum()
            if cohorts.settings.rounding == "half_up":
                assert len(frame) == 2 * n


@settings(max_examples=40)
@given(SEEDS, st.integers(0, 100), st.integers(0, 100))
def test_neighbouring_mixtures_share_a_prefix(seed: int, a: int, b: int) -> None:
    low, high = sorted((a, b))
    cohorts = drawn(seed, tuple({low, high}), False, {})
    for task in ("pneumonia", "abnormality"):
        fewer, more = cohorts.cohort(task, low, 0), cohorts.cohort(task, high, 0)
        assert cell(fewer, "H1", 1) <= cell(more, "H1", 1)
        assert cell(fewer, "H2", 0) <= cell(more, "H2", 0)
        assert cell(fewer, "H2", 1) >= cell(more, "H2", 1)
        assert cell(fewer, "H1", 0) >= cell(more, "H1", 0)


@settings(max_examples=25)
@given(SEEDS, POLICIES)
def test_same_seed_gives_the_same_cohort_whatever_else_is_asked(seed: int, policies: dict[str, object]) -> None:
    assume(policies.get("nesting") != "independent")
    one = drawn(seed, (30,), False, policies)
    more = draw(two(seed, patients=PATIENTS), mixtures=(0, 30, 70), study_seed=seed, cohort_seeds=(0,), **policies)
    pd.testing.assert_frame_equal(one.cohort("pneumonia", 30, 0), more.cohort("pneumonia", 30, 0))
    pd.testing.assert_frame_equal(one.tests("abnormality", 0), more.tests("abnormality", 0))


def test_cohort_seed_and_study_seed_change_who_is_drawn() -> None:
    tables = two(3, patients=400, split=True)
    cohorts = draw(tables, cohort_seeds=(0, 1), test=5, train=20, val=5)
    assert cell(cohorts.cohort("pneumonia", 50, 0), "H1", 1) != cell(cohorts.cohort("pneumonia", 50, 1), "H1", 1)
    assert set(cohorts.tests("pneumonia", 0)["image_id"]) != set(cohorts.tests("pneumonia", 1)["image_id"])
    other = draw(tables, study_seed=1, test=5, train=20, val=5)
    assert cell(cohorts.cohort("pneumonia", 50, 0), "H1", 1) != cell(other.cohort("pneumonia", 50, 0), "H1", 1)


def test_independent_nesting_draws_anew_for_each_mixture_but_tests_stay() -> None:
    tables = two(5, patients=200, split=True)
    nested = draw(tables, mixtures=(40, 50), train=40, val=5, test=5)
    anew = draw(tables, mixtures=(40, 50), train=40, val=5, test=5, nesting="independent")
    assert not cell(anew.cohort("pneumonia", 40, 0), "H1", 1) <= cell(anew.cohort("pneumonia", 50, 0), "H1", 1)
    pd.testing.assert_frame_equal(anew.tests("pneumonia", 0), nested.tests("pneumonia", 0))


@settings(max_examples=25)
@given(SEEDS, st.sampled_from(["train", "val", "test"]), st.integers(1, 50))
def test_a_cell_with_too_few_films_is_refused_with_have_and_need(seed: int, split: str, excess: int) -> None:
    cohorts = drawn(seed, (0, 100), True, {})
    smallest = min(c.have for c in cohorts.cells if c.task == "pneumonia" and c.split == split)
    pneumonia = {"pneumonia": TaskSettings()}
    hospitals = two(seed, patients=PATIENTS, split=True)
    with pytest.raises(StudyError) as refusal:
        draw(hospitals, pneumonia, (0, 100), study_seed=seed, **{split: smallest + excess})
    assert f"have {smallest}, need {smallest + excess}" in str(refusal.value)
    assert f"cohort.{split}: {smallest}" in str(refusal.value)
    shrunk = draw(hospitals, pneumonia, (0, 100), study_seed=seed, shrink=True, **{split: smallest + excess})
    assert shrunk.size("pneumonia", split, 0) == smallest


def test_only_as_many_films_are_needed_as_the_mixtures_take() -> None:
    tables = two(8, patients=80, split=True)
    fits = draw(tables, mixtures=(0, 100))
    smallest = min(c.have for c in fits.cells if c.split == "train")
    halves = draw(tables, mixtures=(50,), train=smallest * 2)
    assert len(halves.cohort("pneumonia", 50, 0).query("role == 'train'")) == smallest * 4


def test_unreadable_films_are_left_out_and_the_rest_keeps_its_order() -> None:
    tables = two(9, patients=500, split=True)
    before = draw(tables, train=30, val=8, test=8)
    gone = tuple(sorted(cell(before.cohort("pneumonia", 100, 0), "H1", 1))[:3])
    after = draw(tables, train=30, val=8, test=8, unusable=gone)
    old, new = (cell(c.cohort("pneumonia", 100, 0), "H1", 1) for c in (before, after))
    assert old - new == set(gone)
    with pytest.raises(StudyError, match="too few"):
        draw(tables, train=30, val=8, test=8, unusable=tuple(tables[0].rows["image_id"]))


def test_matched_views_have_the_same_share_in_every_cell() -> None:
    cohorts = draw(two(11, patients=300, split=True), mixtures=(50,), match_view=True)
    train = cohorts.cohort("pneumonia", 50, 0).query("role == 'train'")
    for films in (train, cohorts.tests("pneumonia", 0).query("test_set == 'Test-100H1'")):
        counts = films.groupby("view")[["source", "label"]].value_counts()
        assert all(cells.max() - cells.min() <= 1 for _, cells in counts.groupby("view"))


def test_no_patient_gives_more_films_than_allowed() -> None:
    cohorts = draw(two(12, patients=150, split=True), max_per_patient=1)
    trial = cohorts.cohort("pneumonia", 50, 0)
    assert trial.groupby(["role", "label", "patient_id"]).size().max() == 1


def test_canonical_table_holds_every_film_in_use_once_with_its_findings() -> None:
    cohorts = draw(two(13, patients=80))
    table = cohorts.table
    used = {i for t in ("pneumonia", "abnormality") for x in (0, 50, 100) for i in cohorts.cohort(t, x, 0)["image_id"]}
    used |= {i for t in ("pneumonia", "abnormality") for i in cohorts.tests(t, 0)["image_id"]}
    assert set(table["image_id"]) == used
    assert table["image_id"].is_unique
    columns = ["image_id", "source", "patient_id", "uri", "view", "findings", "uncertain", "split"]
    assert list(table.columns) == columns
    positives = cohorts.cohort("pneumonia", 50, 0).query("label == 1")
    findings = table.set_index("image_id")["findings"]
    assert all("pneumonia" in findings[i] for i in positives["image_id"])


def test_a_study_with_one_hospital_is_refused() -> None:
    with pytest.raises(StudyError, match="exactly two"):
        build({"H1": source(kind="phantom")})
