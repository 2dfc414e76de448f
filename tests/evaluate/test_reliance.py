"""Source reliance, skill, slope, threshold and the sentence, on predictions made by hand."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from raystudy.evaluate.arm import TrialPredictions, build_arm
from raystudy.evaluate.reliance import mixture_name, reliance, slope, threshold, verdict
from raystudy.evaluate.tables import KeyedTable, accuracy_table, mixture_table, reliance_table


def predictions(follow: float, seed: int = 0, n: int = 60, skill: float = 0.3) -> pd.DataFrame:
    """A classifier that with probability |follow| answers by hospital (H1 positive if follow > 0), else by skill."""
    rng = np.random.default_rng(seed)
    rows = []
    for test_set, cells in {
        "Test-100H1": [("H1", 1, n), ("H2", 0, n)],
        "Test-100H2": [("H2", 1, n), ("H1", 0, n)],
        "Test-50-50": [("H1", 1, n // 2), ("H1", 0, n // 2), ("H2", 1, n // 2), ("H2", 0, n // 2)],
    }.items():
        for source, label, count in cells:
            for i in range(count):
                hospital = int((source == "H1") == (follow > 0))
                honest = label if rng.random() < 0.5 + skill / 2 else 1 - label
                answer = hospital if rng.random() < abs(follow) else honest
                name = f"{source}/{label}-{i}"
                rows.append((name, f"{source}:{label}-{i}", source, label, test_set, 0.0, answer - 0.5, answer))
    columns = ["image_id", "patient_id", "source", "label", "test_set", "logit_0", "logit_1", "predicted"]
    return pd.DataFrame(rows, columns=columns)


def arm_of(follow: dict[int, float], seeds: int = 3, skill: float = 0.3):
    trials = [
        TrialPredictions(x, s, predictions(f, 1000 * x + s, skill=skill))
        for x, f in follow.items()
        for s in range(seeds)
    ]
    return build_arm(trials, 0, resamples=300)


def test_reliance_is_one_when_the_hospital_decides_and_zero_when_the_disease_does() -> None:
    arm = build_arm(
        [TrialPredictions(x, 0, predictions(f, skill=1.0)) for x, f in ((0, -1.0), (50, 0.0), (100, 1.0))], 0
    )
    low, middle, high = reliance(arm)
    assert (low.source_reliance.estimate, middle.source_reliance.estimate, high.source_reliance.estimate) == (-1, 0, 1)
    assert (low.skill.estimate, middle.skill.estimate, high.skill.estimate) == (0, 1, 0)
    for value in (low, middle, high):
        assert value.source_reliance.high > value.source_reliance.low
        assert value.skill.high <= 1


def test_slope_is_the_least_squares_slope_per_hundred_percent_of_the_mixture() -> None:
    follow = {0: -0.9, 30: -0.2, 50: 0.1, 90: 0.6}
    arm = arm_of(follow)
    values = [r.source_reliance.estimate for r in reliance(arm)]
    found = slope(arm)
    assert found is not None
    assert found.estimate == pytest.approx(np.polyfit(np.array(list(follow)) / 100, values, 1)[0])
    assert found.low < found.estimate < found.high


def test_slope_rests_on_the_seeds_that_every_mixture_has() -> None:
    trials = [TrialPredictions(x, s, predictions(0.0, s)) for x in (0, 100) for s in (0, 1)]
    arm = build_arm([*trials, TrialPredictions(100, 2, predictions(0.0, 7))], 0, resamples=100)
    found = slope(arm)
    assert found is not None
    assert found.seeds == 2
    assert slope(build_arm(trials[:1], 0, resamples=100)) is None


def test_threshold_is_the_mixture_nearest_to_balance_from_which_on_zero_is_excluded() -> None:
    values = reliance(arm_of({0: -0.9, 20: -0.6, 40: 0.0, 50: 0.0, 60: 0.02, 80: 0.7, 100: 0.9}))
    below, above = threshold(values)
    assert below is not None
    assert above is not None
    assert (below.h1_share, above.h1_share) == (20, 80)
    assert threshold([r for r in values if r.h1_share == 50]) == (None, None)


def test_the_sentence_tells_both_ends_the_reach_and_the_balanced_mixture_with_intervals() -> None:
    found = verdict(arm_of({0: -0.9, 40: -0.5, 50: 0.0, 60: 0.6, 100: 0.9}), "pneumonia")
    assert found.follows == "hospital"
    number = r"[+−]\d\.\d\d \([+−]\d\.\d\d to [+−]\d\.\d\d\)"
    assert re.fullmatch(
        "The pneumonia classifier follows the hospital: from 0H1-100H2 to 100H1-0H2 its source reliance goes from "
        f"{number} to {number}, shown up to 40H1-60H2 and from 60H1-40H2 on; "
        rf"at 50H1-50H2 (it sees the disease|no skill is shown) \(skill {number}\); 95 % intervals\.",
        found.sentence,
    )
    assert found.first is not None
    assert f"goes from −{abs(found.first.source_reliance.estimate):.2f} (" in found.sentence
    fair = verdict(arm_of({0: 0.0, 50: 0.0, 100: 0.0}), "pneumonia")
    assert fair.follows == "neither shown"
    assert fair.sentence.startswith("No dependence of the pneumonia classifier on the hospital is shown")
    inverse = verdict(arm_of({0: 0.9, 100: -0.9}), "pneumonia")
    assert inverse.follows == "inverse"
    assert verdict(arm_of({0: 0.9}), "pneumonia").follows == "unknown"
    assert mixture_name(60) == "60H1-40H2"


def test_the_sentence_claims_the_disease_only_where_skill_is_beyond_doubt() -> None:
    follow = {0: -0.9, 50: 0.0, 100: 0.9}
    assert "at 50H1-50H2 it sees the disease (skill +1.00" in verdict(arm_of(follow, skill=1.0), "x").sentence
    assert "at 50H1-50H2 no skill is shown (skill" in verdict(arm_of(follow, skill=0.0), "x").sentence


def test_a_mixture_where_reliance_has_the_other_sign_is_no_part_of_what_is_shown() -> None:
    """The offset between the hospitals is not the mixture's doing."""
    values = reliance(arm_of({0: -0.9, 50: -0.6, 90: -0.4, 100: -0.4}, skill=0.0))
    assert values[-1].source_reliance.high < 0
    below, above = threshold(values)
    assert (below and below.h1_share, above) == (0, None)
    assert threshold(values, inverse=True) == (None, values[2])
    found = verdict(arm_of({0: -0.9, 50: -0.6, 90: -0.4, 100: -0.4}, skill=0.0), "x")
    assert found.follows == "hospital"
    assert ", shown up to 0H1-100H2;" in found.sentence
    positive_below = verdict(arm_of({0: 0.0, 10: 0.5, 90: 0.95, 100: 0.95}, skill=0.0), "x")
    assert positive_below.follows == "hospital"
    assert ", shown from 90H1-10H2 on" in positive_below.sentence


@pytest.mark.parametrize(
    "follow",
    [{0: 0.7, 50: 0.7, 100: 0.7}, {0: 0.65, 50: -0.65, 100: 0.65}],
    ids=["the same at every mixture", "large at both ends"],
)
def test_hospitals_that_fare_differently_without_a_trend_are_no_reassurance(follow: dict[int, float]) -> None:
    found = verdict(arm_of(follow), "x")
    assert found.follows == "uneven"
    assert found.sentence.startswith("The x classifier fares differently on the two hospitals")
    said = "; corrected for 3 mixtures and their mean, source reliance excludes 0 at 0H1-100H2, 50H1-50H2, 100H1-0H2"
    assert said in found.sentence


@pytest.mark.parametrize(("seeds", "follow"), [(2, 0.5), (5, 0.2)])
def test_a_difference_that_no_single_mixture_shows_is_shown_by_all_together(seeds: int, follow: float) -> None:
    found = verdict(arm_of(dict.fromkeys(range(0, 101, 10), follow), seeds), "x")
    assert found.follows == "uneven"
    assert "on average over the mixtures (+0." in found.sentence


def test_equal_hospitals_are_seldom_called_uneven_however_many_mixtures_there_are() -> None:
    def sentence_of(run: int) -> str:
        trials = [TrialPredictions(x, 0, predictions(0.0, 1000 * run + x, skill=0.6)) for x in range(0, 101, 10)]
        return verdict(build_arm(trials, run, resamples=200, with_auroc=False), "x").follows

    found = [sentence_of(run) for run in range(40)]
    assert found.count("uneven") <= 2  # more than ten where each of the 11 intervals may exclude 0 by itself
    assert found.count("neither shown") >= 32


def test_mixtures_of_one_and_of_several_seeds_are_told_apart() -> None:
    trials = [TrialPredictions(x, s, predictions(f, s)) for x, f in ((0, -0.9), (100, 0.9)) for s in (0, 1)]
    assert "conditional" not in verdict(build_arm(trials, 0, resamples=100), "x").sentence
    one_missing = verdict(build_arm(trials[:3], 0, resamples=100), "x").sentence
    assert "where a mixture has one training run, conditional on it" in one_missing
    assert verdict(build_arm(trials[::2], 0, resamples=100), "x").sentence.endswith(
        "95 % intervals, conditional on this training run."
    )


def test_one_seed_is_called_conditional_on_this_training_run() -> None:
    assert "conditional on this training run" in verdict(arm_of({0: -0.9, 100: 0.9}, seeds=1), "x").sentence


def test_trials_of_different_test_images_or_two_arms_are_refused() -> None:
    one = TrialPredictions(0, 0, predictions(0.0))
    with pytest.raises(ValueError, match="different images"):
        build_arm([one, TrialPredictions(0, 1, predictions(0.0, n=40))], 0)
    with pytest.raises(ValueError, match="two trials of one seed"):
        build_arm([one, one], 0)


def test_tables_carry_the_keys_and_every_number_its_n_and_interval() -> None:
    trials = [
        KeyedTable(
            {
                "study": "s",
                "trial_id": f"t{x}-{s}",
                "task": "p",
                "h1_share": x,
                "seed": s,
                "cohort_seed": 0,
                "axis.a": 1,
            },
            predictions(f, s),
        )
        for x, f in ((0, -0.8), (100, 0.8))
        for s in (0, 1)
    ]
    accuracy = accuracy_table(trials, 0)
    assert len(accuracy) == 4 * 3
    assert list(accuracy.columns) == [
        *("study", "trial_id", "task", "h1_share", "seed", "cohort_seed", "axis.a", "test_set", "n", "correct"),
        *("accuracy", "accuracy_low", "accuracy_high", "auroc", "auroc_low", "auroc_high"),
    ]
    assert (accuracy["accuracy_low"] <= accuracy["accuracy"]).all()
    assert (accuracy["auroc"] <= accuracy["auroc_high"]).all()
    assert (accuracy["accuracy"] == 100 * accuracy["correct"] / accuracy["n"]).all()
    table = reliance_table(trials, 0)
    assert table["h1_share"].tolist() == [0, 100]
    assert table["seeds"].tolist() == [2, 2]
    assert {"source_reliance_low", "source_reliance_high", "skill_low", "skill_high", "axis.a"} <= set(table.columns)
    assert set(mixture_table(trials, 0)["interval"]) == {"over training runs and patients"}
