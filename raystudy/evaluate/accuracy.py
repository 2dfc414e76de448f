"""Accuracy and AUROC of a trial's predictions on each test set.

In: logits and labels (`predictions.parquet`).  Out: counts and percentages.  Intervals live in `intervals`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class TestScore:
    """What one model reached on one test set: n images, n correct, accuracy in 0..100, AUROC in 0..1."""

    __test__ = False  # the name begins as a test's

    n: int
    correct: int
    accuracy: float
    auroc: float


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the probability that a positive scores above a negative, ties counting one half (Mann-Whitney).

    Parameters
    ----------
    scores : (N,) larger means more positive; here ``logit_1 - logit_0``.
    labels : (N,) 0 or 1.

    Returns
    -------
    float in 0..1; NaN where one class is absent.
    """
    values, positive = _checked(scores, labels)
    n_pos = int(positive.sum())
    n_neg = positive.size - n_pos
    if not n_pos or not n_neg:
        return float("nan")
    ranks = pd.Series(values).rank().to_numpy()  # average ranks: a tie counts one half
    return float((ranks[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def concordance(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Return (n_pos, n_neg): 1 where the positive scores higher, 1/2 on ties, 0 otherwise; its mean is the AUROC."""
    values, positive = _checked(scores, labels)
    pos, neg = values[positive][:, None], values[~positive][None, :]
    return (pos > neg) + 0.5 * (pos == neg)


def score_test_sets(predictions: pd.DataFrame) -> dict[str, TestScore]:
    """Score each test set of a `predictions.parquet` table, in the order of the sets' names.

    Parameters
    ----------
    predictions : columns label, test_set, logit_0, logit_1, predicted.
    """
    member = np.asarray(predictions["test_set"]).astype(str)
    label = np.asarray(predictions["label"])
    hit = np.asarray(predictions["predicted"]) == label
    margin = np.asarray(predictions["logit_1"], dtype=np.float64) - np.asarray(predictions["logit_0"], dtype=np.float64)
    scores: dict[str, TestScore] = {}
    for name in sorted(set(member)):
        rows = member == name
        n, correct = int(rows.sum()), int(hit[rows].sum())
        scores[name] = TestScore(n, correct, 100.0 * correct / n, auroc(margin[rows], label[rows]))
    return scores


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values = np.asarray(scores, dtype=np.float64)
    label = np.asarray(labels)
    if values.ndim != 1 or values.shape != label.shape:
        raise ValueError(f"scores and labels must be vectors of one length, got {values.shape} and {label.shape}")
    if np.isnan(values).any():
        raise ValueError("scores must not contain NaN")
    if not np.isin(label, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    return values, label.astype(bool)
