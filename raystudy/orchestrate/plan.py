"""From an experiment to the list of its trials: who is in each, what identifies it, what it will be explained with.

Nothing is trained and no pixel is read here.  A study that cannot be built is refused here, before anything starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from raystudy.cohorts.build import Cohorts, build_cohorts, read_tables
from raystudy.cohorts.phantom import RENDER_VERSION
from raystudy.cohorts.tables import SourceTable
from raystudy.config import Experiment
from raystudy.errors import StudyError
from raystudy.explanation_settings import ExplainSettings
from raystudy.images.settings import ImageSettings
from raystudy.orchestrate.identity import (
    NOT_IDENTITY,
    NUMERICS_VERSION,
    changed_settings,
    digest,
    rows_digest,
    trial_id,
)
from raystudy.protopnet.settings import ModelSettings
from raystudy.storage import Storage
from raystudy.study import FORMAT_VERSION
from raystudy.trial_spec import TrialSpec

ROW_COLUMNS = ("image_id", "patient_id", "source", "label", "role")
TEST_COLUMNS = ("image_id", "patient_id", "source", "label", "test_set")


@dataclass(frozen=True)
class PlannedTrial:
    """One trial before it runs: its spec, its rows and the settings that are not part of its identity."""

    spec: TrialSpec
    cohort: pd.DataFrame
    tests: pd.DataFrame
    images: ImageSettings
    explain: ExplainSettings

    @property
    def trial_id(self) -> str:
        return self.spec.trial_id


@dataclass(frozen=True)
class Arm:
    """One combination of axis values, with the experiment that it makes and its cohorts."""

    axes: dict[str, Any]
    experiment: Experiment
    cohorts: Cohorts


@dataclass(frozen=True)
class StudyPlan:
    """All trials that an experiment asks for, in the order task, axes, mixture, cohort seed, seed.

    Parameters
    ----------
    unusable : ids of images that cannot be read and are in no trial.
    """

    experiment: Experiment
    arms: tuple[Arm, ...]
    trials: tuple[PlannedTrial, ...]
    unusable: frozenset[str] = frozenset()

    @property
    def image_table(self) -> pd.DataFrame:
        """Canonical rows of every image that some trial needs, each once."""
        used = set().union(*(set(f.image_id) for t in self.trials for f in (t.cohort, t.tests)))
        tables = [arm.cohorts.table for arm in self.arms]
        table = pd.concat(tables).drop_duplicates("image_id") if len(tables) > 1 else tables[0]
        return table[table.image_id.isin(used)].reset_index(drop=True)

    @property
    def duplicates(self) -> pd.DataFrame:
        """image_id and uri of rows that are in no trial because their image id stands in several rows."""
        return max((arm.cohorts.duplicates for arm in self.arms), key=len)

    def as_json(self) -> dict[str, Any]:
        """Return plan.json."""
        return {
            "format": FORMAT_VERSION,
            "study": self.experiment.name,
            "tasks": list(self.experiment.tasks),
            "axes": {k: list(v) for k, v in self.experiment.axes.items()},
            "trials": [t.trial_id for t in self.trials],
        }


def plan_study(experiment: Experiment, storage: Storage, unusable: Collection[str] = ()) -> StudyPlan:
    """Plan every trial of an experiment.

    Parameters
    ----------
    storage : the root below which studies live (the phantoms' originals and the image store are there too).
    unusable : image ids that turned out unreadable and are left out.

    Raises
    ------
    StudyError : a source, policy or cell (have/need) that makes the study impossible; a missing weights file.
    """
    arms = tuple(_arms(experiment, storage, unusable))
    trials = tuple(trial for arm in arms for trial in trials_of(arm))
    return StudyPlan(experiment, arms, trials, frozenset(unusable))


def _arms(experiment: Experiment, storage: Storage, unusable: Collection[str]) -> list[Arm]:
    arms: list[Arm] = []
    built: dict[str, Cohorts] = {}
    read: dict[tuple[str, str, bool], tuple[SourceTable, SourceTable]] = {}
    keys = list(experiment.axes)
    for values in itertools.product(*experiment.axes.values()):
        axes = dict(zip(keys, values, strict=True))
        variant = experiment.with_values(axes) if axes else experiment
        drop = variant.images.unreadable == "drop"
        cohort_key = digest([variant.cohort.model_dump(mode="json"), drop])
        if cohort_key not in built:
            reading = (variant.cohort.h2_test, variant.cohort.split, drop)  # what else decides about a source's rows
            if reading not in read:
                read[reading] = read_tables(variant.sources, variant.cohort, storage, drop)
            built[cohort_key] = build_cohorts(
                sources=variant.sources,
                tasks=variant.tasks,
                cohort=variant.cohort,
                mixtures=variant.mixtures,
                cohort_seeds=variant.cohort_seeds,
                study_seed=variant.study_seed,
                storage=storage,
                unusable=unusable,
                tables=read[reading],
            )
        arms.append(Arm(axes, variant, built[cohort_key]))
    return arms


def trials_of(arm: Arm) -> list[PlannedTrial]:
    """Return the trials of one combination of axis values, in the plan's order."""
    experiment = arm.experiment
    weights = _weights_identity(experiment.model)
    phantoms = {k: v for k, v in experiment.sources.items() if v.kind == "phantom"}
    sources = {k: v.model_dump(mode="json") | {"drawing": RENDER_VERSION} for k, v in phantoms.items()}
    made: list[PlannedTrial] = []
    for task, settings in experiment.tasks.items():
        for share, cohort_seed in itertools.product(experiment.mixtures, experiment.cohort_seeds):
            cohort = arm.cohorts.cohort(task, share, cohort_seed)
            tests = arm.cohorts.tests(task, cohort_seed)
            rows = digest([rows_digest(cohort, ROW_COLUMNS), rows_digest(tests, TEST_COLUMNS), sources])
            for seed in experiment.seeds:
                identity = {
                    "study_seed": experiment.study_seed,
                    "task": task,
                    "h1_share": share,
                    "seed": seed,
                    "cohort_seed": cohort_seed,
                    "model": {**changed_settings(experiment.model), "weights": weights},
                    "training": changed_settings(experiment.training, NOT_IDENTITY["training"]),
                    "images": changed_settings(experiment.images, NOT_IDENTITY["images"]),
                    "rows": rows,
                    "numerics": NUMERICS_VERSION,
                }
                spec = TrialSpec(
                    study=experiment.name,
                    trial_id=trial_id(task, share, seed, cohort_seed, arm.axes, identity),
                    task=task,
                    class_names=settings.class_names,
                    h1_share=share,
                    seed=seed,
                    cohort_seed=cohort_seed,
                    study_seed=experiment.study_seed,
                    axes=arm.axes,
                    model=experiment.model,
                    training=experiment.training,
                    image_size=experiment.images.size,
                    cohort_sha256=rows,
                    numerics_version=NUMERICS_VERSION,
                )
                made.append(PlannedTrial(spec, cohort, tests, experiment.images, experiment.explain))
    return made


def _weights_identity(model: ModelSettings) -> str:
    """Return what identifies the initial weights: their name, or the checksum of a file."""
    if model.weights in ("none", "imagenet"):
        return model.weights
    import hashlib

    path = Path(model.weights)
    if not path.is_file():
        raise StudyError(
            f"the weights file {model.weights!r} does not exist",
            where="model.weights",
            remedy="name a safetensors file with torchvision's names, or `none` or `imagenet`",
        )
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
