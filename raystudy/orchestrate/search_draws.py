"""What a search draws from its space, at random or by Optuna: endlessly, as some values are not valid together.

In flow the space, the study seed and the number of the suggestion, for Optuna also what is known; out flow values.  The
same input gives the same draws, whatever was drawn before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from raystudy.config import SearchRange
from raystudy.errors import StudyError
from raystudy.streams import stream, stream_seed

Ended = Literal["finished", "stopped", "diverged"]
ENDS: tuple[Ended, ...] = ("finished", "stopped", "diverged")  # the better first


@dataclass(frozen=True)
class Known:
    """An observed suggestion; the objective of one that did not finish is not comparable with one that did."""

    values: dict[str, Any]
    objective: float
    ended: Ended


def random_draws(space: dict[str, SearchRange], study_seed: int, number: int) -> Iterator[dict[str, Any]]:
    """Draw every value from a stream of its own: suggestion n does not depend on what came before."""
    for again in itertools.count():
        values: dict[str, Any] = {}
        for key, wanted in space.items():
            purpose = ("search", key, number, again) if again else ("search", key, number)
            values[key] = _at(wanted, float(stream(study_seed, *purpose).random()))
        yield values


def _at(wanted: SearchRange, share: float) -> Any:
    if wanted.choice is not None:
        return wanted.choice[min(len(wanted.choice) - 1, int(share * len(wanted.choice)))]
    if wanted.uniform is not None:
        low, high = wanted.uniform
        return low + share * (high - low)
    assert wanted.loguniform is not None
    low, high = wanted.loguniform
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))


def optuna_draws(
    space: dict[str, SearchRange], study_seed: int, number: int, known: Iterable[Known]
) -> Iterator[dict[str, Any]]:
    """Ask Optuna's TPE, told again what is known of this space, with a seed of its own: it remembers nothing.

    Asked again, it is told that what it gave is worse than anything observed; told less, it would give the same.
    """
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = stream_seed(study_seed, "search", "optuna", number) % 2**32
    memory = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    distributions = {key: _distribution(wanted) for key, wanted in space.items()}
    for one in known:
        params = {key: _parameter(space[key], value) for key, value in one.values.items()}
        told: dict[str, Any] = {"value": one.objective}
        if one.ended != "finished":  # ranks behind all that did, and without a value behind all that have one
            reached = {0: one.objective} if one.ended == "stopped" else {}
            told = {"state": optuna.trial.TrialState.PRUNED, "intermediate_values": reached}
        memory.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, **told))
    while True:
        asked = memory.ask(distributions)
        yield {key: _value(space[key], value) for key, value in asked.params.items()}
        memory.tell(asked, state=optuna.trial.TrialState.PRUNED)


def require_optuna() -> Any:
    """Return the module.

    Raises
    ------
    StudyError : it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise StudyError(
            "search.algorithm is optuna, which is not installed",
            where="search.algorithm",
            remedy="pip install 'raystudy[search]', or search.algorithm: random",
        ) from None
    return optuna


def _distribution(wanted: SearchRange) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if wanted.choice is not None:
        return CategoricalDistribution(list(range(len(wanted.choice))))
    low, high = wanted.uniform or wanted.loguniform or (0.0, 1.0)
    return FloatDistribution(low, high, log=wanted.loguniform is not None)


def _parameter(wanted: SearchRange, value: Any) -> Any:
    if wanted.choice is not None:
        return wanted.choice.index(value)
    low, high = wanted.uniform or wanted.loguniform or (value, value)
    return min(max(float(value), low), high)  # rounded, it may lie a little beyond a bound


def _value(wanted: SearchRange, parameter: Any) -> Any:
    return wanted.choice[int(parameter)] if wanted.choice is not None else float(parameter)
