"""Paths of an experiment that exist on this machine only are refused before its study goes to another machine's Ray."""

from __future__ import annotations

from raystudy.config import Experiment
from raystudy.errors import StudyError
from raystudy.storage import open_storage


def refuse_local_paths(experiment: Experiment, where: str) -> None:
    """Refuse storage, sources and weights that lie on this machine.

    Parameters
    ----------
    where : the cluster, for the message.

    Raises
    ------
    StudyError : a local path, also one that is written as ``file://``.
    """
    tree = experiment.model_dump(mode="json")
    places: dict[str, str] = {"storage": tree["storage"]}
    for name, source in tree["sources"].items():
        places |= {f"sources.{name}.{key}": source[key] for key in ("root", "images") if source.get(key)}
    if experiment.model.weights not in ("none", "imagenet"):
        places["model.weights"] = experiment.model.weights
    for key, value in places.items():
        if open_storage(value).is_local:
            raise StudyError(
                f"{key} is the local path {value!r}, which the cluster's machines do not see",
                where=where,
                remedy=f"put it on object storage and name it: --set {key}=s3://bucket/path",
            )
