"""The crossed intervals: exact limiting cases, degenerate shares, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, t

from raystudy.evaluate.accuracy import auroc
from raystudy.evaluate.arm import _resampled_auroc
from raystudy.evaluate.intervals import (
    CONDITIONAL,
    Interval,
    Patients,
    Share,
    combination_interval,
    components,
    seed_part,
    share_interval,
    share_reach,
)

Z = norm.ppf(0.975)


def share_of(correct: np.ndarray, weights: np.ndarray) -> Share:
    """A share from (n, k) correctness, one image a patient, under (B, n) weights."""
    normed = weights / weights.sum(axis=1, keepdims=True)
    return Share(tuple(range(correct.shape[1])), correct.mean(axis=0), normed @ correct, len(correct))


def weights_of(n: int, resamples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_exponential((resamples, n))


def half_width(estimates: np.ndarray, resampled: np.ndarray) -> float:
    """The head of the module: h^2 = z^2 V + max(0, t^2 S - z^2 I)."""
    return float(np.sqrt(Z * Z * components(estimates, resampled).patients + seed_part(estimates, resampled)))


def test_without_patient_variance_the_interval_is_the_t_interval_of_the_seeds() -> None:
    estimates = np.array([0.2, 0.5, 0.3])
    half = t.ppf(0.975, 2) * np.std(estimates, ddof=1) / np.sqrt(3)  # 4.303 * 0.1528 / 1.732 = 0.3795
    assert half == pytest.approx(0.3795, abs=1e-4)
    assert half_width(estimates, np.tile(estimates, (50, 1))) == pytest.approx(half)


def test_without_seed_variance_the_interval_is_that_of_the_patients() -> None:
    column = weights_of(100, 4000) @ np.linspace(0, 1, 100) / 100
    assert half_width(np.full(4, column.mean()), np.tile(column[:, None], 4)) == pytest.approx(Z * column.std())


def test_components_of_a_two_way_layout_are_recovered() -> None:
    rng = np.random.default_rng(1)
    n, k, a, b, e = 300, 40, 0.5, 2.0, 1.5
    y = rng.normal(0, a**0.5, k) + rng.normal(0, b**0.5, (n, 1)) + rng.normal(0, e**0.5, (n, k))
    weights = weights_of(n, 4000)
    found = components(y.mean(axis=0), weights @ y / weights.sum(axis=1, keepdims=True))
    # V = B/n + E/(kn), I = E/(kn), S = A/k + E/(kn)
    assert found.interaction == pytest.approx(e / (k * n), rel=0.15)
    assert found.patients == pytest.approx(b / n + e / (k * n), rel=0.2)
    assert found.seeds == pytest.approx(a / k + e / (k * n), rel=0.3)


def test_interaction_is_taken_once_and_the_patients_part_is_never_narrowed() -> None:
    # Three orthogonal columns of +-1: resamples without a patient effect. V = 1/3, one run 1, I = (1 - 1/3)/2 = V.
    rows = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=float)
    found = components(np.array([-1.0, 0.0, 1.0]), rows)
    assert (found.patients, found.interaction, found.seeds) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    apart = half_width(np.array([-1.0, 0.0, 1.0]), rows)
    assert apart == pytest.approx(np.sqrt(t.ppf(0.975, 2) ** 2 / 3))  # z^2 V - z^2 I + t^2 S
    assert half_width(np.zeros(3), rows) == pytest.approx(Z * np.sqrt(1 / 3))


@pytest.mark.parametrize("n", [3, 4, 10])
def test_a_measured_quantity_of_few_patients_reaches_as_far_as_students_quantile(n: int) -> None:
    resampled = 0.5 + 0.01 * np.array([[-1.0], [1.0]])  # their variance is 1e-4
    share = Share((0,), np.array([0.5]), resampled, patients=n, outcomes=False)
    reach = t.ppf(0.975, n - 1) * 0.01 * np.sqrt((n + 1) / (n - 1))
    assert share_reach(share) == pytest.approx((reach, reach), rel=1e-12)


@pytest.mark.parametrize("level", [0.95, 0.995])
def test_the_level_is_that_of_the_seeds_part_and_of_the_patients_part(level: float) -> None:
    estimates, quantile = np.array([0.2, 0.5, 0.3]), 0.5 + level / 2
    seeds_alone = Share((0, 1, 2), estimates, np.tile(estimates, (50, 1)), 10**9)  # patients enough to weigh nothing
    found = combination_interval([seeds_alone], [1.0], level=level)
    assert found.high - found.estimate == pytest.approx(t.ppf(quantile, 2) * np.std(estimates, ddof=1) / np.sqrt(3))
    all_right = Share((0,), np.ones(1), np.ones((50, 1)), 100)
    z = norm.ppf(quantile)
    assert combination_interval([all_right], [1.0], level=level).low == pytest.approx(1 - z * z / (100 + z * z))


def test_one_seed_is_labelled_conditional_and_several_are_not() -> None:
    weights = weights_of(50, 200)
    correct = (np.arange(50) % 3 > 0).astype(float)[:, None]
    assert share_interval(share_of(correct, weights)).label == CONDITIONAL
    assert share_interval(share_of(np.tile(correct, 2), weights)).label != CONDITIONAL


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("k", [1, 5])
def test_a_share_without_any_variation_gets_wilsons_interval_and_not_width_zero(value: float, k: int) -> None:
    interval = share_interval(share_of(np.full((145, k), value), weights_of(145, 300)))
    wilson = binomtest(int(145 * value), 145).proportion_ci(method="wilson")
    assert (interval.low, interval.high) == (pytest.approx(wilson.low), pytest.approx(wilson.high))
    assert interval.high - interval.low > 0.02


@pytest.mark.parametrize("correct", [3, 30, 60, 97])
def test_one_seed_of_independent_patients_gets_nearly_wilsons_interval(correct: int) -> None:
    hits = (np.arange(100) < correct).astype(float)[:, None]
    interval = share_interval(share_of(hits, weights_of(100, 8000)))
    wilson = binomtest(correct, 100).proportion_ci(method="wilson")
    assert interval.low == pytest.approx(wilson.low, abs=0.006)
    assert interval.high == pytest.approx(wilson.high, abs=0.006)


def test_one_wrong_answer_never_narrows_a_perfect_cell() -> None:
    weights = weights_of(145, 300)
    perfect = np.ones((145, 5))
    blemished = perfect.copy()
    blemished[7, 2] = 0
    widths = [i.high - i.low for i in (share_interval(share_of(c, weights)) for c in (perfect, blemished))]
    assert widths[1] > widths[0]


def test_ten_films_of_one_patient_count_as_one_patient() -> None:
    patients = Patients([f"p{i}" for i in range(40)], 0, 3000)
    ids = [f"p{i}" for i in range(40) for _ in range(10)]
    hit = np.repeat(np.arange(40) % 2, 10).astype(float)
    weights, n, _ = patients.image_weights(ids, ["all"] * 400)
    interval = share_interval(Share((0,), np.array([0.5]), (weights @ hit / 400)[:, None], n))
    wilson = binomtest(20, 40).proportion_ci(method="wilson")
    assert interval.high - interval.low == pytest.approx(wilson.high - wilson.low, rel=0.06)


def test_differences_are_paired_by_patient() -> None:
    weights = weights_of(200, 2000)
    hits = (np.random.default_rng(0).random((200, 1)) < 0.7).astype(float)
    other = hits.copy()
    other[:4] = 1 - other[:4]
    pair = (share_of(hits, weights), share_of(other, weights))
    paired = combination_interval(pair, (1.0, -1.0))
    assert paired.high - paired.low < 0.06  # unpaired: 2 * 1.96 * sqrt(2 * 0.21 / 200) = 0.18


def test_a_combination_of_shares_with_different_seeds_is_refused() -> None:
    weights = weights_of(20, 50)
    one, two = share_of(np.ones((20, 1)), weights), share_of(np.ones((20, 2)), weights)
    with pytest.raises(ValueError, match="same seeds"):
        combination_interval((one, two), (1.0, -1.0))


def test_strata_of_fixed_size_carry_no_variance_between_them() -> None:
    ids = [f"p{i}" for i in range(100)]
    strata = ["H1+"] * 50 + ["H2-"] * 50
    weights, n, n_strata = Patients(ids, 0, 500).image_weights(ids, strata)
    assert weights[:, :50].sum(axis=1) == pytest.approx(50)
    hit = np.repeat([1.0, 0.0], 50)
    assert (weights @ hit / 100).std() < 1e-12
    assert (n, n_strata) == (100, 2)
    interval = share_interval(Share((0,), np.array([0.5]), (weights @ hit / 100)[:, None], n, n_strata))
    assert 0.01 < interval.high - interval.low < 0.05


def test_resamples_depend_on_the_set_of_patients_only() -> None:
    one, two = Patients(["b", "a", "a"], 5, 10), Patients(["a", "b"], 5, 10)
    assert np.array_equal(one.weights, two.weights)
    assert not np.array_equal(one.weights, Patients(["a", "b"], 6, 10).weights)


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=40)
def test_intervals_hold_their_estimate_and_stay_within_bounds(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    correct = (rng.random((30, k)) < rng.random()).astype(float)
    interval = share_interval(share_of(correct, weights_of(30, 100)))
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.high > interval.low


def coverage(a: float, b: float, e: float, k: int) -> float:
    """Share of 95 % intervals that hold the true accuracy, over draws of both training runs and patients."""
    rng, n, mean = np.random.default_rng(20_221), 150, 0.6
    truth = norm.cdf(mean / np.sqrt(a + b + e))
    hits = 0
    for _ in range(500):
        latent = rng.normal(0, a**0.5, k) + rng.normal(0, b**0.5, (n, 1)) + rng.normal(0, e**0.5, (n, k))
        share = share_of((mean + latent > 0).astype(float), rng.standard_exponential((250, n)))
        interval = share_interval(share)
        hits += interval.low <= truth <= interval.high
    return hits / 500


@pytest.mark.parametrize(
    ("a", "b", "e", "k"),
    [
        (0.0, 1.0, 1.0, 5),  # training runs differ by nothing but noise
        (0.05, 1.0, 0.3, 5),
        (0.05, 1.0, 0.3, 3),
        (0.15, 0.2, 1.0, 5),  # runs matter more than patients
        (0.0, 1.0, 0.001, 1),  # one run without variance of its own
    ],
)
def test_nominal_coverage_is_reached_in_a_two_way_random_effects_simulation(
    a: float, b: float, e: float, k: int
) -> None:
    # 500 repetitions: standard error 1 %; Cochran's combination is conservative where the seeds' part is small.
    assert 0.925 <= coverage(a, b, e, k) <= 0.995


def test_interval_excludes_values_outside_only() -> None:
    interval = Interval(0.3, 0.1, 0.5, 2)
    assert interval.excludes(0.0)
    assert interval.excludes(0.6)
    assert not interval.excludes(0.1)


def concordant(d: float, n: int, rng: np.random.Generator) -> Share:
    """AUROC of n positives and n negatives whose scores are normal and ``d`` apart, as `arm` resamples it."""
    label = np.repeat([1, 0], n)
    margin = rng.normal(d * label, 1)
    weights = rng.standard_exponential((400, 2 * n))
    return Share((0,), np.array([auroc(margin, label)]), _resampled_auroc(margin, label, weights)[:, None], n)


@pytest.mark.parametrize(("d", "n"), [(3.5, 40), (3.0, 100), (2.5, 40), (0.8, 40)])
def test_the_interval_of_an_auroc_holds_the_truth_also_near_one(d: float, n: int) -> None:
    rng, truth = np.random.default_rng(int(100 * d) + n), norm.cdf(d / np.sqrt(2))
    found = [share_interval(concordant(d, n, rng)) for _ in range(300)]
    assert np.mean([i.low <= truth <= i.high for i in found]) >= 0.93  # standard error 1.3 %
    assert np.mean([i.high < truth for i in found]) <= 0.05  # it does not stop short of 1
    assert np.median([i.high - i.low for i in found]) < 0.25


@pytest.mark.parametrize(("mean", "n"), [(0.05, 16), (0.05, 100), (0.95, 16), (0.5, 16)])
def test_the_interval_of_a_mean_over_prototypes_holds_the_truth_also_near_the_bounds(mean: float, n: int) -> None:
    """AI: a film's share of 10 prototypes whose score rose, films of different inclination."""
    rng, hits = np.random.default_rng(int(100 * mean) + n), []
    for _ in range(400):
        inclination = rng.beta(6 * mean, 6 * (1 - mean), n)
        values = (rng.binomial(10, inclination) / 10)[:, None]
        weights = rng.standard_exponential((400, n))
        weights *= n / weights.sum(axis=1, keepdims=True)
        interval = share_interval(Share((0,), values.mean(axis=0), weights @ values / n, n))
        hits.append(interval.low <= mean <= interval.high)
    assert np.mean(hits) >= 0.93


@pytest.mark.parametrize("n", [8, 16, 60])
def test_the_interval_of_a_mean_drop_holds_the_truth_where_many_drops_are_zero(n: int) -> None:
    rng, hits = np.random.default_rng(n), []
    for _ in range(400):
        values = (rng.beta(1, 3, n) * (rng.random(n) < 0.5))[:, None]
        weights = rng.standard_exponential((400, n))
        weights *= n / weights.sum(axis=1, keepdims=True)
        interval = share_interval(Share((0,), values.mean(axis=0), weights @ values / n, n, outcomes=False))
        hits.append(interval.low <= 0.125 <= interval.high)
    assert np.mean(hits) >= 0.925
