r"""95 % intervals that respect the crossed design of a study.

One draw of test patients is shared by all training seeds, mixtures and test sets; a training run (seed) is shared by
all patients.  Write the seed-wise estimate as a two-way layout over seeds s = 1..k and patients p = 1..n,

    y[s,p] = mu + a[s] + b[p] + e[s,p],        Var = A, B, E,

so that the mean over both has variance  A/k + B/n + E/(kn).  Three things can be measured:

* resampling patients (the same resample for every seed) of the seed mean:   V = B/n + E/(kn);
* resampling patients of single seeds, averaged:    (B + E)/n,  hence  I = E/(kn) = (that - V)/(k - 1);
* the sample variance of the k seed estimates (divisor k - 1, the k/(k-1) correction of a variance over resampled
  seeds), divided by k:    S = A/k + E/(kn), on k - 1 degrees of freedom.

V + S counts the interaction twice.  (a-bar + e-bar) and b-bar are independent with variances S and V - I, so the
half-width of Cochran's combination, each part with its own quantile, is  h^2 = z^2 (V - I) + t(k-1)^2 S.  It is floored
by the patients' part alone:

    h^2 = reach^2 + max(0, t(k-1)^2 S - z^2 I),        reach = z sqrt(V) where nothing is degenerate.

With one seed nothing is known about A: the interval is the patients' part, "conditional on this training run".

A share (accuracy, AUROC) of 0 or 100 % has V = 0.  Its reach is Wilson's, whose n p (1-p) is replaced by the measured
sum of squares n^2 V with n patients: equal to Wilson's interval for independent binary patients, to z sqrt(V) for
large n, and never of width zero.  A mean of measured shares (a relative drop) has reach t(n-1) sqrt(V).  Where V is far
from p (1-p)/n (an AUROC, a mean over prototypes, films of few patients) both would stop short of the nearer bound; the
reach is therefore at least that of Wilson's interval for n* = p (1-p)/V independent binary patients (the effective
sample size of survey statistics, Korn and Graubard 1998).  A linear combination (difference, slope) combines the
reaches of its shares by MOVER (Zou and Donner 2008) with the correlations of the resamples, so pairing by patient is
kept.

Patients are resampled with independent Exp(1) weights (Bayesian cluster bootstrap, Rubin 1981): no stratum is ever
empty, and every estimate is a ratio of matrix products with one weight matrix.  Class and hospital counts of a test set
are fixed by design, so an estimate is put together from its (source, label) strata with fixed shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit  # the normal and Student's quantiles; scipy.stats is slow to import

from raystudy.streams import stream

Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000
CONDITIONAL = "conditional on this training run"
CROSSED = "over training runs and patients"
MIXED = "over training runs and patients; where a mixture has one training run, conditional on it"


def label_of(seeds: Iterable[int]) -> str:
    """Say what intervals from so many seeds each cover."""
    single = {n == 1 for n in seeds}
    return MIXED if len(single) > 1 else CONDITIONAL if True in single else CROSSED


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, from so many seeds."""

    estimate: float
    low: float
    high: float
    seeds: int

    @property
    def label(self) -> str:
        """What the interval covers."""
        return label_of([self.seeds])

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside the interval."""
        return value < self.low or value > self.high


@dataclass(frozen=True)
class Share:
    """A share of the design (an accuracy or AUROC in 0..1), seed by seed, with its resamples.

    estimates : (k,); resampled : (B, k), the same B resamples of patients in every share of a study;
    patients : the number of independent units; strata : into how many groups of fixed size they fall.
    outcomes : whether it is made of yes/no outcomes (Wilson-type limits) or of a measured quantity such as a drop.
    """

    seeds: tuple[int, ...]
    estimates: Floats
    resampled: Floats
    patients: int
    strata: int = 1
    outcomes: bool = True

    def __post_init__(self) -> None:
        k = len(self.seeds)
        if k == 0 or self.estimates.shape != (k,) or self.resampled.ndim != 2 or self.resampled.shape[1] != k:
            raise ValueError("a share needs one estimate and one column of resamples per seed")
        if self.patients < 1:
            raise ValueError("a share needs at least one patient")

    def of(self, seeds: Sequence[int]) -> Share:
        """Return the same share for some of its seeds."""
        at = [self.seeds.index(s) for s in seeds]
        return replace(self, seeds=tuple(seeds), estimates=self.estimates[at], resampled=self.resampled[:, at])


@dataclass(frozen=True)
class Components:
    """Variances of the mean over seeds: V, I and S of the module's text."""

    patients: float
    interaction: float
    seeds: float


class Patients:
    """The one draw of test patients, and its resamples.

    Parameters
    ----------
    patient_ids : ids of the test images' patients, in any order and with repeats.
    study_seed : the experiment's ``study_seed``; the weights come from its stream ``patient resamples``.
    """

    def __init__(self, patient_ids: Sequence[str], study_seed: int, resamples: int = RESAMPLES) -> None:
        self.ids = sorted(set(patient_ids))
        if not self.ids:
            raise ValueError("there are no patients to resample")
        self._row = {name: i for i, name in enumerate(self.ids)}
        draw = stream(study_seed, "patient resamples")
        self.weights: Floats = draw.standard_exponential((len(self.ids), resamples)).T  # B, P

    def rows(self, patient_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the column of `weights` of each id."""
        return np.array([self._row[p] for p in patient_ids], dtype=np.int64)

    def image_weights(self, patient_ids: Sequence[str], strata: Sequence[object]) -> tuple[Floats, int, int]:
        """Return (B, N) weights of images that sum to the image count within every stratum, with n of patients, strata.

        Parameters
        ----------
        patient_ids : (N,) patient of each image.  strata : (N,) hashable, e.g. (source, label).
        """
        weights = self.weights[:, self.rows(patient_ids)]  # B, N
        names = list(strata)
        for name in set(names):
            member = np.array([s == name for s in names])
            weights[:, member] *= member.sum() / weights[:, member].sum(axis=1, keepdims=True)
        return weights, len(set(patient_ids)), len(set(names))


def components(estimates: Floats, resampled: Floats) -> Components:
    """Return the variance components of the mean over seeds.

    Parameters
    ----------
    estimates : (k,) one estimate a seed.  resampled : (B, k) the same under B resamples of patients.
    """
    k = estimates.size
    patients = float(resampled.mean(axis=1).var())
    if k == 1:
        return Components(patients, 0.0, 0.0)
    single = float(resampled.var(axis=0).mean())
    interaction = min(max(0.0, (single - patients) / (k - 1)), patients)
    return Components(patients, interaction, float(estimates.var(ddof=1)) / k)


def share_reach(share: Share, level: float = LEVEL) -> tuple[float, float]:
    """Return the distances from the estimate to the patients' limits, downwards and upwards.

    Outcomes: Wilson's limits with the measured variance; a measured quantity: t(n-1) sqrt(V), without any variation as
    outcomes.  Both reach at least as far as Wilson's limits for the effective number of patients p (1-p)/V.
    """
    z = float(ndtri(0.5 + level / 2))
    n, p = share.patients, float(share.estimates.mean())
    stratum = max(2.0, n / share.strata)
    # Exp(1) weights give s^2/(m+1) with the divisor-m variance s^2 of m patients; unbiased is s^2/(m-1).
    variance = float(share.resampled.mean(axis=1).var()) * (stratum + 1) / (stratum - 1)
    if share.outcomes or variance < 1e-18 or n < 2:
        quantile = z
        limits = [_wilson(p, n, n * variance, z)]
    else:
        quantile = float(stdtrit(n - 1, 0.5 + level / 2))
        half = quantile * float(np.sqrt(variance))
        limits = [(max(0.0, p - half), min(1.0, p + half))]
    if variance >= 1e-18 and 0 < p < 1:
        limits.append(_wilson(p, p * (1 - p) / variance, p * (1 - p), quantile))
    return p - min(low for low, _ in limits), max(high for _, high in limits) - p


def _wilson(p: float, n: float, spread: float, quantile: float) -> tuple[float, float]:
    """Return Wilson's limits of a share p of n patients whose p (1-p) is ``spread``: n times the variance of p."""
    squared = quantile * quantile
    centre = (n * p + squared / 2) / (n + squared)
    half = quantile / (n + squared) * float(np.sqrt(n * spread + squared / 4))
    return max(0.0, centre - half), min(1.0, centre + half)


def share_interval(share: Share) -> Interval:
    """Return the interval of one share over its patients and seeds (0..1)."""
    return combination_interval([share], [1.0], bounds=(0.0, 1.0))


def combination_interval(
    shares: Sequence[Share],
    coefficients: Sequence[float],
    *,
    offset: float = 0.0,
    bounds: tuple[float, float] | None = None,
    level: float = LEVEL,
) -> Interval:
    """Return the interval of ``offset + sum(c * share)`` for shares of one design: same seeds, same resamples.

    Raises
    ------
    ValueError where the shares have different seeds.
    """
    seeds = shares[0].seeds
    if any(s.seeds != seeds for s in shares):
        raise ValueError("a combination needs the same seeds in every share")
    c = np.asarray(coefficients, dtype=np.float64)
    estimates = np.stack([s.estimates for s in shares], axis=1) @ c  # k
    resampled = np.stack([s.resampled for s in shares], axis=2) @ c  # B, k
    means = np.stack([s.resampled.mean(axis=1) for s in shares])  # M, B
    reaches = np.array([share_reach(s, level) for s in shares])  # M, 2: down, up
    correlation = _correlation(means)
    down = np.where(c > 0, c * reaches[:, 0], c * reaches[:, 1])
    up = np.where(c > 0, c * reaches[:, 1], c * reaches[:, 0])
    squared = np.array([down @ correlation @ down, up @ correlation @ up]).clip(0.0)
    low, high = np.sqrt(squared + seed_part(estimates, resampled, level))
    theta = offset + float(estimates.mean())
    least, most = bounds or (-np.inf, np.inf)
    return Interval(theta, max(least, theta - float(low)), min(most, theta + float(high)), len(seeds))


def seed_part(estimates: Floats, resampled: Floats, level: float = LEVEL) -> float:
    """Return max(0, t(k-1)^2 S - z^2 I); 0 for one seed."""
    k = estimates.size
    if k == 1:
        return 0.0
    parts = components(estimates, resampled)
    z, t = float(ndtri(0.5 + level / 2)), float(stdtrit(k - 1, 0.5 + level / 2))
    return max(0.0, t * t * parts.seeds - z * z * parts.interaction)


def _correlation(rows: Floats) -> Floats:
    """Return the (M, M) correlation of the rows; a constant row correlates with nothing but itself."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    length = np.sqrt((centred * centred).sum(axis=1))
    moving = length > 1e-12 * np.sqrt(rows.shape[1])
    unit = np.where(moving[:, None], centred / np.where(moving, length, 1.0)[:, None], 0.0)
    correlation = unit @ unit.T
    np.fill_diagonal(correlation, 1.0)
    return correlation
