"""Average drop (AD) and increase (AI) of a prototype's score when its least active half is masked (method.md c).

In: pairs (image, prototype, method, draw) with the score s on the image and o on the masked image (`pairs.parquet`).
Out: ``AD = 100/(nK) sum max(0, s - o)/s`` (lower is better), ``AI = 100/(nK) sum [s < o]`` (higher is better), with
intervals over test patients (and training runs, where there are several).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from raystudy.evaluate.intervals import (
    RESAMPLES,
    Floats,
    Interval,
    Patients,
    Share,
    combination_interval,
    share_interval,
)

METHODS = ("protopnet", "prp", "random")


@dataclass(frozen=True)
class Faithfulness:
    """AD and AI (percent) of one method on one test set, with n; ``unique_*``: every unique prototype counts once.

    n_images : images; n_pairs : (image, prototype) pairs, duplicates counted, of one training run.
    """

    method: str
    n_images: int
    n_pairs: int
    average_drop: Interval
    average_increase: Interval
    unique_average_drop: float
    unique_average_increase: float


def relative_drop(score: ArrayLike, score_masked: ArrayLike) -> NDArray[np.float64]:
    """Return ``max(0, s - o)/s`` element by element.

    Raises
    ------
    ValueError where a score is not positive or a number is not finite: the log similarity is at least 0.0077.
    """
    s, o = _scores(score, score_masked)
    return np.maximum(0.0, s - o) / s


def increased(score: ArrayLike, score_masked: ArrayLike) -> NDArray[np.bool_]:
    """Return ``s < o`` element by element; a tie is no increase."""
    s, o = _scores(score, score_masked)
    return s < o


def average_drop(score: ArrayLike, score_masked: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Return AD in percent over all pairs; ``weight``: how often each pair counts (a prototype's multiplicity)."""
    return 100.0 * _mean(relative_drop(score, score_masked), weight)


def average_increase(score: ArrayLike, score_masked: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Return AI in percent over all pairs; ``weight`` as in `average_drop`."""
    return 100.0 * _mean(increased(score, score_masked), weight)


def summarise(runs: Sequence[pd.DataFrame], study_seed: int, *, resamples: int = RESAMPLES) -> dict[str, Faithfulness]:
    """Summarise `pairs.parquet` of one or more training runs on the same images, by method.

    Parameters
    ----------
    runs : one table per seed, columns image_id, patient_id, source, prototype, multiplicity, method, draw, score,
        score_masked.

    Returns
    -------
    {method: Faithfulness}, methods in the order of `METHODS`.

    Raises
    ------
    ValueError where the runs were explained on different images.
    """
    shares = faithfulness_shares(runs, study_seed, resamples=resamples)
    found: dict[str, Faithfulness] = {}
    for method, (drop, increase) in shares.items():
        columns = [_Pairs(run, method) for run in runs]
        first = columns[0]
        found[method] = Faithfulness(
            method,
            len(set(first.image)),
            int(first.weight[first.draw == first.draw.min()].sum()),
            _percent(share_interval(drop)),
            _percent(share_interval(increase)),
            float(np.mean([average_drop(c.score, c.masked) for c in columns])),
            float(np.mean([average_increase(c.score, c.masked) for c in columns])),
        )
    return found


def method_difference(
    runs: Sequence[pd.DataFrame], study_seed: int, methods: tuple[str, str] = ("prp", "protopnet")
) -> tuple[Interval, Interval]:
    """Return AD and AI of the first method minus the second, in points, paired by image, noise and training run."""
    shares = faithfulness_shares(runs, study_seed)
    one, other = shares[methods[0]], shares[methods[1]]
    drop, increase = (
        _percent(combination_interval((a, b), (1.0, -1.0), bounds=(-1.0, 1.0))) for a, b in zip(one, other, strict=True)
    )
    return drop, increase


def faithfulness_shares(
    runs: Sequence[pd.DataFrame], study_seed: int, *, resamples: int = RESAMPLES
) -> dict[str, tuple[Share, Share]]:
    """Return {method: (drop, increase)}, each 0..1, in the crossed design: means over an image's pairs and draws."""
    present = [m for m in METHODS if (runs[0]["method"] == m).any()]
    parts = {m: [_Pairs(run, m) for run in runs] for m in present}
    found: dict[str, tuple[Share, Share]] = {}
    if not parts:
        return found
    first = parts[present[0]][0]
    ids, first_row = np.unique(first.image, return_index=True)
    patients = [str(p) for p in first.patient[first_row]]
    sources = [str(p) for p in first.source[first_row]]
    weights, n_patients, n_strata = Patients(patients, study_seed, resamples).image_weights(patients, sources)
    seeds = tuple(range(len(runs)))
    for method, columns in parts.items():
        both: list[Share] = []
        for measure in (relative_drop, increased):
            values = np.stack([c.image_means(ids, measure(c.score, c.masked)) for c in columns], axis=1)  # N, k
            resampled = weights @ values / len(ids)
            yes_or_no = measure is increased
            both.append(Share(seeds, values.mean(axis=0), resampled, n_patients, n_strata, yes_or_no))
        found[method] = (both[0], both[1])
    return found


class _Pairs:
    """The columns of one method's pairs."""

    def __init__(self, pairs: pd.DataFrame, method: str) -> None:
        rows = np.flatnonzero(np.asarray(pairs["method"]) == method)
        self.image = np.asarray(pairs["image_id"])[rows].astype(str)
        self.patient = np.asarray(pairs["patient_id"])[rows]
        self.source = np.asarray(pairs["source"])[rows]
        self.draw = np.asarray(pairs["draw"])[rows]
        self.weight = np.asarray(pairs["multiplicity"], dtype=np.float64)[rows]
        self.score = np.asarray(pairs["score"], dtype=np.float64)[rows]
        self.masked = np.asarray(pairs["score_masked"], dtype=np.float64)[rows]

    def image_means(self, ids: NDArray[np.str_], values: NDArray[np.float64] | NDArray[np.bool_]) -> Floats:
        """Return (N,) means by image, weighted by multiplicity, in the order of ``ids``."""
        names, row = np.unique(self.image, return_inverse=True)
        if not np.array_equal(names, ids):
            raise ValueError("the training runs were explained on different images")
        return np.bincount(row, weights=self.weight * values) / np.bincount(row, weights=self.weight)


def _mean(values: NDArray[np.float64] | NDArray[np.bool_], weight: ArrayLike | None) -> float:
    counts = np.ones(values.shape) if weight is None else np.asarray(weight, dtype=np.float64)
    return float((values * counts).sum() / counts.sum())


def _percent(value: Interval) -> Interval:
    return Interval(100 * value.estimate, 100 * value.low, 100 * value.high, value.seeds)


def _scores(score: ArrayLike, score_masked: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    s, o = np.asarray(score, dtype=np.float64), np.asarray(score_masked, dtype=np.float64)
    if s.shape != o.shape:
        raise ValueError(f"scores and masked scores must have one shape, got {s.shape} and {o.shape}")
    if not (np.isfinite(s).all() and np.isfinite(o).all()):
        raise ValueError("scores must be finite")
    if (s <= 0).any():
        raise ValueError("scores must be positive: AD divides by the score on the unmasked image")
    return s, o
