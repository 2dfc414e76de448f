from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raystudy.cohorts.mixtures import TEST_SETS, cell_sizes, keep_per_patient, largest_cells, matched_orders

shares = st.integers(0, 100)
sizes = st.integers(0, 5000)


@given(shares, sizes)
def test_mixture_keeps_total_and_balance_when_share_does_not_divide(share: int, n: int) -> None:
    cells = cell_sizes(share, n)
    assert sum(cells.values()) == 2 * n
    assert cells[0, 1] + cells[1, 1] == cells[0, 0] + cells[1, 0] == n
    assert cells[0, 1] == floor(Fraction(share * n, 100) + Fraction(1, 2))
    assert min(cells.values()) >= 0


@given(shares, sizes)
def test_negatives_mirror_positives(share: int, n: int) -> None:
    cells = cell_sizes(share, n)
    assert cells[1, 0] == cells[0, 1]
    assert cells[0, 0] == cells[1, 1]


@given(shares, shares, sizes)
def test_larger_share_never_takes_fewer_positives_from_the_first_hospital(a: int, b: int, n: int) -> None:
    low, high = sorted((a, b))
    assert cell_sizes(low, n)[0, 1] <= cell_sizes(high, n)[0, 1]


def test_paper_mixtures_have_the_stated_sizes() -> None:
    assert cell_sizes(10, 1099) == {(0, 1): 110, (1, 1): 989, (0, 0): 989, (1, 0): 110}
    assert cell_sizes(50, 1099)[0, 1] == 550  # 549.5 rounds up
    assert [2 * n for n in (1099, 187, 145)] == [sum(cell_sizes(30, n).values()) for n in (1099, 187, 145)]


def test_floor_in_each_cell_gives_four_times_72() -> None:
    assert set(cell_sizes(TEST_SETS["Test-50-50"], 145, "floor_each_cell").values()) == {72}


@pytest.mark.parametrize("share", [-1, 101])
def test_share_outside_0_to_100_is_refused(share: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.100"):
        cell_sizes(share, 10)


@given(st.lists(shares, min_size=1, max_size=5), sizes, st.sampled_from(["half_up", "floor_each_cell"]))
def test_largest_cells_suffice_for_every_mixture(mixtures: list[int], n: int, rounding: str) -> None:
    largest = largest_cells(mixtures, n, rounding)  # pyright: ignore[reportArgumentType]
    for x in mixtures:
        assert all(size <= largest[cell] for cell, size in cell_sizes(x, n, rounding).items())  # pyright: ignore


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_no_patient_gives_more_films_than_the_limit_and_the_first_ones_stay(seed: int, limit: int) -> None:
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, 10, 40)
    order = rng.permutation(40)[:30]
    kept = keep_per_patient(order, patients, limit)
    expected, seen = [], {int(p): 0 for p in patients}
    for place in order:
        seen[int(patients[place])] += 1
        if seen[int(patients[place])] <= limit:
            expected.append(int(place))
    assert kept.tolist() == expected


@given(st.integers(0, 2**32))
def test_matched_prefixes_hold_the_same_views(seed: int) -> None:
    rng = np.random.default_rng(seed)
    views = rng.choice(np.array(["AP", "PA", ""], object), 200)
    orders = [rng.permutation(200)[: int(rng.integers(20, 150))] for _ in range(4)]
    matched = matched_orders(orders, views)
    assert len({len(m) for m in matched}) == 1
    patterns = [views[m].tolist() for m in matched]
    assert all(p == patterns[0] for p in patterns)
    for before, after in zip(orders, matched, strict=True):
        assert set(after) <= set(before)
        for view in ("AP", "PA", ""):
            kept = [p for p in after if views[p] == view]
            assert kept == [p for p in before if views[p] == view][: len(kept)]
    for view in ("AP", "PA", ""):
        assert patterns[0].count(view) == min(int((views[o] == view).sum()) for o in orders)
