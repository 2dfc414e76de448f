"""What networks start from is there and fits before anything is decoded or trained (DESIGN.md rule 6)."""

from __future__ import annotations

from collections.abc import Iterable

from raystudy.protopnet.settings import ModelSettings


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
