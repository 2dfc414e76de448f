"""Phantom originals: the films of synthetic hospitals that a plan needs are written before they are prepared."""

from __future__ import annotations

import os

import pandas as pd

from raystudy.cohorts.phantom import missing_films, write_films
from raystudy.config import Experiment
from raystudy.orchestrate.progress import Display
from raystudy.storage import Storage


def write_phantom_originals(experiment: Experiment, image_table: pd.DataFrame, storage: Storage, shown: Display) -> int:
    """Write the originals that the study needs and that are missing; return how many were written.

    Parameters
    ----------
    image_table : canonical rows of the study.
    storage : the root below which studies live.
    """
    missing: dict[str, list[str]] = {}
    for name, source in experiment.sources.items():
        if source.kind == "phantom":
            ids = image_table.loc[image_table["source"] == name, "image_id"].tolist()
            missing[name] = missing_films(source.settings, name, storage, ids)
    total, before = sum(len(ids) for ids in missing.values()), 0
    workers = len(os.sched_getaffinity(0))
    for name, ids in missing.items():
        settings = getattr(experiment.sources[name], "settings")  # noqa: B009 (only phantoms stand in `missing`)
        done = before

        def told(written: int, _: int, done: int = done) -> None:
            shown.count("phantom films", done + written, total)

        if ids:
            before += write_films(settings, name, storage, ids, workers=workers, progress=told)
    return total
