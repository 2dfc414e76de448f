"""Planted truth: how much more relevance a planted mask holds than its area (phantom studies).

In: the share of positive relevance and of area inside the mask, one row a unique prototype on its source film.
Out: the ratio of the two means with a 95 % interval over the films.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit  # Student's quantiles

from raystudy.evaluate.intervals import LEVEL

FEWEST_FILMS = 3


@dataclass(frozen=True)
class Concentration:
    """Mean shares (0..1) of relevance and area, their ratio (1: no aim), its limits (None: too few films), films."""

    relevance: float
    area: float
    ratio: float
    low: float | None
    high: float | None
    n_films: int


def concentration(
    positive_share: ArrayLike, area_share: ArrayLike, multiplicity: ArrayLike, films: ArrayLike
) -> Concentration:
    """Return how relevance gathers in a mask, over unique prototypes weighted by multiplicity.

    The interval is that of a ratio estimator (Cochran 1977, chapter 6) on the logarithmic scale, with films as
    independent units and t(n* - 1), where n* = (sum W)^2 / sum W^2 is the effective number of films of weight W: ratios
    are skewed, and a few films may carry most prototypes.  It speaks of other films of the same training runs, not of
    other runs.  There is none for fewer than ``FEWEST_FILMS`` effective films, nor for a ratio of 0.

    Parameters
    ----------
    positive_share, area_share : (U,) share of positive relevance and of the film inside the mask.
    multiplicity : (U,) how many prototypes each row stands for.
    films : (U,) image ids; rows of one film vary together.

    Raises
    ------
    ValueError : no row, lengths that differ, a number that is not finite, or masks without area.
    """
    y, x, w = (np.asarray(a, dtype=np.float64) for a in (positive_share, area_share, multiplicity))
    names = np.asarray(films)
    if y.ndim != 1 or not len(y) or not y.shape == x.shape == w.shape == names.shape:
        raise ValueError(f"one row a prototype is needed, got {y.shape}, {x.shape}, {w.shape} and {names.shape}")
    if not (np.isfinite(y).all() and np.isfinite(x).all() and (w > 0).all() and (x >= 0).all() and x.sum() > 0):
        raise ValueError("shares must be finite, multiplicities positive and the masks must have an area")
    _, film = np.unique(names, return_inverse=True)
    relevance, area = np.average(y, weights=w), np.average(x, weights=w)
    ratio = float(relevance / area)
    n = int(film.max()) + 1
    low = high = None
    weight = np.bincount(film, weights=w * x)
    effective = float(weight.sum() ** 2 / (weight**2).sum())
    if effective >= FEWEST_FILMS and ratio > 0:
        residual = np.bincount(film, weights=w * (y - ratio * x))  # a film, sums to 0
        error = np.sqrt(effective / (effective - 1) * (residual**2).sum()) / weight.sum()
        reach = float(np.exp(stdtrit(effective - 1, 0.5 + LEVEL / 2) * error / ratio))
        low, high = ratio / reach, ratio * reach
    return Concentration(float(relevance), float(area), ratio, low, high, n)
