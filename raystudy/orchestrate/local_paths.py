"""Paths of an experiment that exist on this machine only are refused before its study goes to another machine's Ray."""

from __future__ import annotations

from raystudy.config import Experiment
from raystudy.errors import StudyError
from raystudy.storage import open_storage


def refuse_local_paths(experiment: Experiment, where: str) -> None:
    """Refuse storage and sources that lie on this machine, and weights files, which are read nowhere else.

    Parameters
    ----------
    where : the cluster, for the message.

    Raises
    ------
    StudyError : a local path, also one that is written as ``file://``; a weights file.
    """
    tree = experiment.model_dump(mode="json")
    places: dict[str, str] = {"storage": tree["storage"]}
    for name, source in tree["sources"].items():
        places |= {f"sources.{name}.{key}": source[key] for key in ("root", "images") if source.get(key)}
    for key, value in places.items():
        if open_storage(value).is_local:
            raise StudyError(
                f"{key} is the local path {value!r}, which the cluster's machines do not see",
                where=where,
                remedy=f"put it on object storage and name it: --set {key}=s3://bucket/path",
            )
    searched = (tree["search"] or {"space": {}})["space"].get("model.weights", {})
    weights = {
        "model.weights": [tree["model"]["weights"]],
        "axes.model.weights": tree["axes"].get("model.weights", []),
        "search.space.model.weights": searched.get("choice") or [],
    }
    for key, values in weights.items():
        for value in values:
            if value not in ("none", "imagenet"):
                raise StudyError(
                    f"{key} is the file {value!r}, which the cluster's machines do not see",
                    where=where,
                    remedy="use `imagenet` or `none`: a weights file is for Ray on this machine",
                )
