"""What networks start from is there and fits before anything is decoded or trained (DESIGN.md rule 6)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

from raystudy.config import Search
from raystudy.errors import StudyError
from raystudy.protopnet.settings import ModelSettings

FITTING = ("weights", "backbone", "backbone_layers")  # of the model: what initial weights must be there for


def searched_models(models: Iterable[ModelSettings], search: Search) -> list[ModelSettings]:
    """Return the networks that a search can suggest, as far as their initial weights go.

    Parameters
    ----------
    models : those without searched values.
    """
    ranges = {name: search.space[f"model.{name}"] for name in FITTING if f"model.{name}" in search.space}
    choices = {name: found.choice for name, found in ranges.items() if found.choice is not None}
    values = [dict(zip(choices, chosen, strict=True)) for chosen in itertools.product(*choices.values())]
    return [replace(model, **chosen) for model in dict.fromkeys(models) for chosen in values]


def check_searched_weights(models: Iterable[ModelSettings], search: Search, *, local: bool) -> None:
    """Load the initial weights of each network that a search can suggest.

    Parameters
    ----------
    models : those without searched values.
    local : as of `check_initial_weights`.

    Raises
    ------
    StudyError : a file is missing, damaged, or of another network; it names the searched values.
    """
    searched = [name for name in FITTING if f"model.{name}" in search.space]
    for model in searched_models(models, search):
        try:
            check_initial_weights([model], local=local)
        except StudyError as error:
            if not searched:
                raise
            values = ", ".join(f"model.{name} = {getattr(model, name)}" for name in searched)
            raise StudyError(
                f"{error.where}: {error.what}, with {values}",
                where="search.space",
                remedy=f"weights must fit every searched network: leave a value out; or {error.remedy}",
            ) from None


def check_initial_weights(models: Iterable[ModelSettings], *, local: bool) -> None:
    """Load each network's initial weights once.

    Parameters
    ----------
    local : trials run on this machine; elsewhere the ImageNet file is the workers' own business.

    Raises
    ------
    StudyError : a file is missing, damaged, or of another network.
    """
    for model in dict.fromkeys(models):
        if model.weights == "none" or (model.weights == "imagenet" and not local):
            continue
        from raystudy.protopnet.model import ProtoPNet  # torch: only where there is something to load
        from raystudy.protopnet.weights import start_from_weights

        start_from_weights(ProtoPNet.from_settings(model), model)
