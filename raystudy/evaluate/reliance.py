"""Source reliance: does the classifier follow the disease or the hospital?

SRI = (accuracy on Test-100H1 - accuracy on Test-100H2) / 100: +1 where every film of H1 is called positive and every
film of H2 negative whatever the disease, -1 the other way round, 0 where both sets fare alike.
Skill = (accuracy on Test-100H1 + accuracy on Test-100H2) / 100 - 1: 1 for perfect, 0 for chance or pure source
following.  The slope is the least-squares slope of SRI over the mixture x, per 100 % of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raystudy.evaluate.arm import Arm, common_seeds
from raystudy.evaluate.intervals import CROSSED, LEVEL, Floats, Interval, Share, combination_interval, label_of

FIRST, SECOND = "Test-100H1", "Test-100H2"
DIFFERENCE = (1.0, -1.0)  # of the two, which is SRI


@dataclass(frozen=True)
class Reliance:
    """Source reliance and skill at one mixture."""

    h1_share: int
    seeds: tuple[int, ...]
    source_reliance: Interval
    skill: Interval


@dataclass(frozen=True)
class Verdict:
    """What a page may say in one sentence, and what it rests on.

    follows : ``hospital`` (the slope's interval lies above 0), ``inverse`` (below 0), ``uneven`` (0 inside, but the
    hospitals fare differently at some mixture or on average, by intervals that hold together), ``neither shown`` or
    ``unknown`` (fewer than two mixtures).
    below, above : the mixtures nearest to 50 on either side from which on outwards SRI's interval lies on the slope's
    side of 0; None where there is none.
    """

    task: str
    follows: str
    slope: Interval | None
    below: Reliance | None
    above: Reliance | None
    first: Reliance | None
    last: Reliance | None
    sentence: str


def reliance(arm: Arm) -> list[Reliance]:
    """Return SRI and skill of every mixture with both tests, ascending in x."""
    found: list[Reliance] = []
    for x, pair in _pairs(arm).items():
        bounds = (-1.0, 1.0)
        found.append(
            Reliance(
                x,
                pair[0].seeds,
                combination_interval(pair, DIFFERENCE, bounds=bounds),
                combination_interval(pair, (1.0, 1.0), offset=-1.0, bounds=bounds),
            )
        )
    return found


def slope(arm: Arm) -> Interval | None:
    """Return the slope of SRI per 100 % of x with its interval, from the seeds that every mixture has.

    None for fewer than two mixtures or no common seed.
    """
    pairs = _pairs(arm)
    if len(pairs) < 2:
        return None
    x = np.array(list(pairs), dtype=np.float64) / 100
    return _over_mixtures(pairs, (x - x.mean()) / ((x - x.mean()) ** 2).sum(), LEVEL)


def threshold(values: list[Reliance], *, inverse: bool = False) -> tuple[Reliance | None, Reliance | None]:
    """Return the mixtures nearest to 50, below and above, from which on outwards SRI is shown to follow the hospital.

    That is an interval below 0 where H1 gives the smaller part of the positives and above 0 where it gives the larger;
    ``inverse``: the other way round.
    """
    below = _outermost_run([r for r in values if r.h1_share < 50], 1 if inverse else -1)
    above = _outermost_run([r for r in values if r.h1_share > 50][::-1], -1 if inverse else 1)
    return below, above


def verdict(arm: Arm, task: str) -> Verdict:
    """Say in one sentence whether the classifier of ``task`` follows the hospital.

    Parameters
    ----------
    task : name of the positive class or task, as the sentence shall call it.
    """
    values = reliance(arm)
    line = slope(arm)
    first, last = (values[0], values[-1]) if values else (None, None)
    if line is None or first is None or last is None:
        sentence = f"Too few mixtures of {task} are finished to say whether its classifier follows the hospital."
        return Verdict(task, "unknown", line, None, None, first, last, sentence)
    ends = (
        f"from {mixture_name(first.h1_share)} to {mixture_name(last.h1_share)} its source reliance goes from "
        f"{_interval(first.source_reliance)} to {_interval(last.source_reliance)}"
    )
    label = label_of([line.seeds, first.source_reliance.seeds, last.source_reliance.seeds])
    rests_on = f"; 95 % intervals{'' if label == CROSSED else f', {label}'}."
    if not line.excludes(0.0):
        trend = f"{ends}, slope {_interval(line)}"
        odd = _unequal(arm)
        if odd:
            uneven = "fares differently on the two hospitals, but is not shown to follow the mixture"
            sentence = f"The {task} classifier {uneven}: {trend}{odd}"
            return Verdict(task, "uneven", line, None, None, first, last, sentence + rests_on)
        sentence = f"No dependence of the {task} classifier on the hospital is shown: {trend}"
        return Verdict(task, "neither shown", line, None, None, first, last, sentence + rests_on)
    follows = "hospital" if line.low > 0 else "inverse"
    below, above = threshold(values, inverse=follows == "inverse")
    verb = "follows the hospital" if follows == "hospital" else "goes against the hospital"
    sentence = f"The {task} classifier {verb}: {ends}{_reach(below, above)}{_at_balance(values)}"
    return Verdict(task, follows, line, below, above, first, last, sentence + rests_on)


def _reach(below: Reliance | None, above: Reliance | None) -> str:
    """Say at which mixtures this is shown by their own intervals."""
    parts = [f"up to {mixture_name(below.h1_share)}"] if below else []
    parts += [f"from {mixture_name(above.h1_share)} on"] if above else []
    return f", shown {' and '.join(parts)}" if parts else ", shown by the trend, at no single mixture"


def _unequal(arm: Arm) -> str:
    """Say where SRI differs from 0: on average over the mixtures, or at some; nothing where it is not shown to.

    The intervals hold together (Bonferroni): half of what may err is the mean's, half the mixtures'.  The mean sees
    what is the same at every mixture and too weak, or its seeds too few, to be shown at one.
    """
    pairs = _pairs(arm)
    allowed = (1 - LEVEL) / 2
    each = {x: combination_interval(p, DIFFERENCE, level=1 - allowed / len(pairs)) for x, p in pairs.items()}
    names = ", ".join(mixture_name(x) for x, interval in each.items() if interval.excludes(0.0))
    found = [f"at {names}"] if names else []
    mean = _over_mixtures(pairs, np.full(len(pairs), 1 / len(pairs)), 1 - allowed)
    if mean is not None and mean.excludes(0.0):
        found.append(f"on average over the mixtures ({mean.estimate:+.2f})".replace("-", "−"))
    corrected = f"; corrected for {len(pairs)} mixtures and their mean, source reliance excludes 0"
    return f"{corrected} {' and '.join(found)}" if found else ""


def _at_balance(values: list[Reliance]) -> str:
    """Say what is seen of the disease at 50H1-50H2, where the hospital tells nothing about the class."""
    for value in values:
        if value.h1_share == 50:
            sees = "it sees the disease" if value.skill.low > 0 else "no skill is shown"
            return f"; at {mixture_name(50)} {sees} (skill {_interval(value.skill)})"
    return ""


def mixture_name(h1_share: int) -> str:
    """Return the name of a mixture, xH1-yH2."""
    return f"{h1_share}H1-{100 - h1_share}H2"


def _pairs(arm: Arm) -> dict[int, tuple[Share, Share]]:
    """Return the accuracies on both one-hospital tests of every mixture that has both, ascending."""
    return {x: pair for x in arm.mixtures if (pair := _pair(arm, x)) is not None}


def _over_mixtures(pairs: dict[int, tuple[Share, Share]], weights: Floats, level: float) -> Interval | None:
    """Return the interval of a weighted sum of the mixtures' SRI, from the seeds that all have; None for none."""
    shares = [share for pair in pairs.values() for share in pair]
    seeds = common_seeds(shares)
    if not seeds:
        return None
    coefficients = [sign * weight for weight in weights for sign in DIFFERENCE]
    return combination_interval([share.of(seeds) for share in shares], coefficients, level=level)


def _pair(arm: Arm, x: int) -> tuple[Share, Share] | None:
    """Return the accuracies on both one-hospital tests for their common seeds."""
    one, two = arm.shares(FIRST, x), arm.shares(SECOND, x)
    if one is None or two is None:
        return None
    seeds = common_seeds((one, two))
    return (one.of(seeds), two.of(seeds)) if seeds else None


def _outermost_run(inwards: list[Reliance], sign: int) -> Reliance | None:
    """Return the last of the leading mixtures (from the outside inwards) whose interval lies on this side of 0."""
    last = None
    for value in inwards:
        found = value.source_reliance
        if not (found.low > 0 if sign > 0 else found.high < 0):
            break
        last = value
    return last


def _interval(value: Interval) -> str:
    return f"{value.estimate:+.2f} ({value.low:+.2f} to {value.high:+.2f})".replace("-", "−")
