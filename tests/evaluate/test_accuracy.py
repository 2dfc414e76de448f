"""AUROC against its definition, counts by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raystudy.evaluate.accuracy import auroc, concordance, score_test_sets


def naive_auroc(scores: list[int], labels: list[int]) -> float:
    wins = [
        (a > b) + 0.5 * (a == b)
        for a, i in zip(scores, labels, strict=True)
        for b, j in zip(scores, labels, strict=True)
        if i == 1 and j == 0
    ]
    return sum(wins) / len(wins)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=2, max_size=40))
def test_auroc_equals_the_share_of_won_pairs_with_ties_as_one_half(rows: list[tuple[int, int]]) -> None:
    scores, labels = [r[0] for r in rows], [r[1] for r in rows]
    if len(set(labels)) < 2:
        assert np.isnan(auroc(scores, labels))
        return
    assert auroc(scores, labels) == pytest.approx(naive_auroc(scores, labels), abs=1e-12)
    assert concordance(scores, labels).mean() == pytest.approx(naive_auroc(scores, labels), abs=1e-12)


def test_auroc_is_one_when_every_positive_scores_higher_and_a_half_when_all_tie() -> None:
    assert auroc([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]) == 1
    assert auroc([3, 3, 3], [0, 1, 1]) == 0.5


def test_auroc_refuses_nan_and_foreign_labels() -> None:
    with pytest.raises(ValueError, match="NaN"):
        auroc([np.nan, 1.0], [0, 1])
    with pytest.raises(ValueError, match="0 or 1"):
        auroc([0.0, 1.0], [0, 2])


def test_test_sets_are_scored_apart_from_logit_difference() -> None:
    table = pd.DataFrame(
        {
            "test_set": ["B", "A", "A", "A", "B"],
            "label": [1, 0, 1, 1, 0],
            "logit_0": [0.0, 1.0, 0.0, 2.0, 0.0],
            "logit_1": [1.0, 0.0, 1.0, 1.5, 0.5],
            "predicted": [1, 0, 1, 0, 1],
        }
    )
    scores = score_test_sets(table)
    assert list(scores) == ["A", "B"]
    assert (scores["A"].n, scores["A"].correct, scores["A"].accuracy) == (3, 2, pytest.approx(200 / 3))
    assert scores["A"].auroc == 1  # margins -1 (negative), 1 and -0.5 (positives)
    assert scores["B"].auroc == 1  # margins 1 and 0.5
