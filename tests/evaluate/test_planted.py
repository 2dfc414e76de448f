"""Relevance inside planted masks: by hand, by simulation, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from raystudy.evaluate.planted import concentration


def test_the_ratio_of_weighted_means_by_hand() -> None:
    found = concentration([0.3, 0.6], [0.1, 0.2], [3, 1], ["a", "b"])
    assert (found.relevance, found.area, found.ratio) == pytest.approx((0.375, 0.125, 3.0))
    assert (found.low, found.high, found.n_films) == pytest.approx((3.0, 3.0, 2))  # 3 in both films: nothing varies


def test_masks_of_one_area_have_students_interval_of_the_mean() -> None:
    shares = np.array([0.1, 0.4, 0.25, 0.3])
    found = concentration(shares, np.full(4, 0.1), np.ones(4), list("abcd"))
    wanted = ttest_1samp(shares / 0.1, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_rows_of_one_film_are_one_unit() -> None:
    alone = concentration([0.3, 0.1], [0.1, 0.1], [1, 1], ["a", "b"])
    twice = concentration([0.3, 0.3, 0.1, 0.1], [0.1] * 4, [1] * 4, ["a", "a", "b", "b"])
    assert (twice.low, twice.high, twice.n_films) == pytest.approx((alone.low, alone.high, 2))
    assert alone.low == 0  # a share has no negative limit


def test_one_film_has_no_interval() -> None:
    found = concentration([0.3, 0.2], [0.1, 0.1], [1, 1], ["a", "a"])
    assert (found.low, found.high, found.n_films) == (None, None, 1)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        area = draw.uniform(0.05, 0.15, 12)
        found = concentration(draw.beta(4, 12, 12), area, np.ones(12), np.arange(12))
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 0.25 / 0.1 <= found.high
    assert 0.92 < inside / 2000 < 0.97


@pytest.mark.parametrize(
    "rows",
    [([], [], [], []), ([0.1], [0.1, 0.2], [1], ["a"]), ([np.nan], [0.1], [1], ["a"]), ([0.1], [0.0], [1], ["a"])],
)
def test_what_has_no_ratio_is_refused(rows: tuple[list[float], list[float], list[int], list[str]]) -> None:
    with pytest.raises(ValueError, match=r"one row a prototype|must be finite"):
        concentration(*rows)
