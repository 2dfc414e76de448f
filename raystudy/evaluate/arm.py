"""One arm of a study: trials that differ only in mixture and seed, brought into the crossed design of `intervals`.

In: each trial's `predictions.parquet`.  Out: for every (mixture, test set) the accuracy and the AUROC as a `Share`, all
under the same resamples of the test patients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from raystudy.evaluate.accuracy import auroc, concordance
from raystudy.evaluate.intervals import RESAMPLES, Floats, Patients, Share

Cell = tuple[int, str]  # (h1_share, test_set)


@dataclass(frozen=True)
class TrialPredictions:
    """A finished trial of an arm: its mixture, its seed and its predictions on the test sets."""

    h1_share: int
    seed: int
    predictions: pd.DataFrame


@dataclass(frozen=True)
class Arm:
    """Accuracy and AUROC (0..1) of every mixture and test set, with n of images."""

    accuracy: dict[Cell, Share]
    auroc: dict[Cell, Share]
    images: dict[Cell, int]

    @property
    def mixtures(self) -> list[int]:
        """The mixtures, ascending, in percent of positives from H1."""
        return sorted({x for x, _ in self.accuracy})

    @property
    def test_sets(self) -> list[str]:
        """The test sets by name."""
        return sorted({t for _, t in self.accuracy})

    def shares(self, test_set: str, mixture: int) -> Share | None:
        """Return the accuracy share, or None where no trial of it is finished."""
        return self.accuracy.get((mixture, test_set))


def build_arm(
    trials: Iterable[TrialPredictions], study_seed: int, *, resamples: int = RESAMPLES, with_auroc: bool = True
) -> Arm:
    """Bring the trials of one arm into the crossed design.

    Parameters
    ----------
    trials : in any order; not every seed of every mixture needs to be there.
    with_auroc : leave the AUROC's resamples out where only accuracies are wanted.

    Raises
    ------
    ValueError where a (mixture, seed) comes twice, or trials were tested on different images.
    """
    ordered = sorted(trials, key=lambda t: (t.h1_share, t.seed))
    keys = [(t.h1_share, t.seed) for t in ordered]
    if len(set(keys)) != len(keys):
        raise ValueError("a mixture has two trials of one seed: trials of different arms must not be mixed")
    if not ordered:
        return Arm({}, {}, {})
    patients = Patients([p for t in ordered for p in t.predictions["patient_id"]], study_seed, resamples)
    accuracy: dict[Cell, Share] = {}
    area: dict[Cell, Share] = {}
    images: dict[Cell, int] = {}
    test_sets = sorted({str(name) for t in ordered for name in t.predictions["test_set"]})
    for test_set in test_sets:
        parts = [_rows(t.predictions, test_set) for t in ordered]
        first = parts[0]
        if any(list(p["image_id"]) != list(first["image_id"]) for p in parts):
            raise ValueError(f"the trials were tested on different images of {test_set}")
        label = first["label"].to_numpy()
        strata = list(zip(first["source"], label.tolist(), strict=True))
        names = [str(p) for p in first["patient_id"]]
        weights, n_patients, n_strata = patients.image_weights(names, strata)
        correct = np.stack([(p["predicted"].to_numpy() == label).astype(np.float64) for p in parts], axis=1)  # N, T
        resampled = weights @ correct / len(first)  # B, T
        margins = [p["logit_1"].to_numpy() - p["logit_0"].to_numpy() for p in parts]
        classes = [len({n for n, y in zip(names, label, strict=True) if y == c}) for c in (0, 1)]
        for x in sorted({t.h1_share for t in ordered}):
            at = [i for i, t in enumerate(ordered) if t.h1_share == x]
            seeds = tuple(ordered[i].seed for i in at)
            images[x, test_set] = len(first)
            accuracy[x, test_set] = Share(seeds, correct[:, at].mean(axis=0), resampled[:, at], n_patients, n_strata)
            if with_auroc and min(classes) > 0:
                areas = np.array([auroc(margins[i], label) for i in at])
                boot = np.stack([_resampled_auroc(margins[i], label, weights) for i in at], axis=1)  # B, k
                area[x, test_set] = Share(seeds, areas, boot, min(classes))
    return Arm(accuracy, area, images)


def _rows(predictions: pd.DataFrame, test_set: str) -> pd.DataFrame:
    return predictions[predictions["test_set"] == test_set].sort_values("image_id", kind="stable")


def _resampled_auroc(margin: Floats, label: NDArray[np.int8], weights: Floats) -> Floats:
    """Return (B,) weighted AUROCs: sum of w_i w_j [i above j] over positives i and negatives j."""
    wins = concordance(margin, label)  # n_pos, n_neg
    positive = np.asarray(label) == 1
    pos, neg = weights[:, positive], weights[:, ~positive]
    return ((pos @ wins) * neg).sum(axis=1) / (pos.sum(axis=1) * neg.sum(axis=1))


def common_seeds(shares: Sequence[Share]) -> tuple[int, ...]:
    """Return the seeds that every share has."""
    return tuple(s for s in shares[0].seeds if all(s in other.seeds for other in shares))
