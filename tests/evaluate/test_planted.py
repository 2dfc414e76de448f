"""Relevance inside planted masks: by hand, by simulation, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from raystudy.evaluate.planted import concentration


def test_the_ratio_of_weighted_means_by_hand() -> None:
    found = concentration([0.3, 0.6], [0.1, 0.2], [3, 1], ["a", "b"])
    assert (found.relevance, found.area, found.ratio) == pytest.approx((0.375, 0.125, 3.0))
    assert (found.low, found.high, found.n_films) == (None, None, 2)  # two films tell no spread


def test_masks_of_one_area_have_students_interval_of_the_mean_on_the_logarithmic_scale() -> None:
    shares = np.array([0.1, 0.4, 0.25, 0.3])
    found = concentration(shares, np.full(4, 0.1), np.ones(4), list("abcd"))
    wanted = ttest_1samp(shares / 0.1, 0).confidence_interval(0.95)
    reach = np.exp((wanted.high - found.ratio) / found.ratio)  # d log r = dr / r
    assert (found.low, found.high) == pytest.approx((found.ratio / reach, found.ratio * reach))


def test_rows_of_one_film_are_one_unit() -> None:
    alone = concentration([0.3, 0.1, 0.2], [0.1] * 3, [1] * 3, list("abc"))
    twice = concentration([0.3, 0.3, 0.1, 0.1, 0.2, 0.2], [0.1] * 6, [1] * 6, list("aabbcc"))
    assert (twice.low, twice.high, twice.n_films) == pytest.approx((alone.low, alone.high, 3))
    assert alone.low is not None
    assert 0 < alone.low < alone.ratio


def test_few_films_or_none_with_relevance_have_no_interval() -> None:
    found = concentration([0.3, 0.2], [0.1, 0.1], [1, 1], ["a", "a"])
    assert (found.low, found.high, found.n_films) == (None, None, 1)
    heavy = concentration([0.3, 0.2, 0.1], [0.1] * 3, [98, 1, 1], list("abc"))  # one film carries nearly all
    assert (heavy.low, heavy.high) == (None, None)
    silent = concentration([0.0] * 5, [0.1] * 5, [1] * 5, list("abcde"))
    assert (silent.ratio, silent.low, silent.high) == (0, None, None)


@pytest.mark.parametrize("case", ["ordinary", "skewed", "few", "unequal"])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(case: str) -> None:
    draw, inside, n = np.random.default_rng(1), 0, {"few": 4, "unequal": 6}.get(case, 12)
    told = 0
    for _ in range(2000):
        area, weight = draw.uniform(0.05, 0.15, n), np.ones(n)
        share, truth = draw.beta(4, 12, n), 2.5
        if case in ("skewed", "few"):
            share, truth = draw.beta(0.5, 4.5, n), 1.0
        if case == "unequal":
            weight, share, truth = draw.integers(1, 10, n).astype(float), area * draw.gamma(2, 1, n), 2.0
        found = concentration(share, area, weight, np.arange(n))
        if found.low is not None and found.high is not None:
            told += 1
            inside += found.low <= truth <= found.high
    assert told > 1500
    assert 0.915 < inside / told < 0.98


@pytest.mark.parametrize(
    "rows",
    [([], [], [], []), ([0.1], [0.1, 0.2], [1], ["a"]), ([np.nan], [0.1], [1], ["a"]), ([0.1], [0.0], [1], ["a"])],
)
def test_what_has_no_ratio_is_refused(rows: tuple[list[float], list[float], list[int], list[str]]) -> None:
    with pytest.raises(ValueError, match=r"one row a prototype|must be finite"):
        concentration(*rows)
