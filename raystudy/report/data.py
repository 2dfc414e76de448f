"""What a report is made of, read from the study directory alone: finished trials, their tables and explanations."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from raystudy.errors import StudyError
from raystudy.evaluate.reliance import Verdict, verdict
from raystudy.evaluate.tables import (
    KeyedTable,
    accuracy_table,
    arms,
    faithfulness_mixture_table,
    faithfulness_table,
    mixture_table,
    reliance_table,
)
from raystudy.results import DONE, PREDICTIONS, sealed
from raystudy.storage import Storage
from raystudy.study import Study, StudyStatus


@dataclass(frozen=True)
class FinishedTrial:
    """One finished trial of the plan; ``explained``: every explanation job that the plan asks for is done, too."""

    trial_id: str
    spec: dict[str, Any]
    result: dict[str, Any]
    prototypes: Storage | None
    faithfulness: Storage | None
    explained: bool

    @property
    def keys(self) -> dict[str, object]:
        """The key columns of its rows in every table."""
        spec = self.spec
        keys: dict[str, object] = {"study": spec["study"], "trial_id": self.trial_id}
        keys |= {name: spec[name] for name in ("task", "h1_share", "seed", "cohort_seed")}
        return keys | {f"axis.{k}": _plain(v) for k, v in sorted(spec["axes"].items())}

    @property
    def arm(self) -> tuple[tuple[str, object], ...]:
        return tuple((k, v) for k, v in self.keys.items() if k not in ("trial_id", "h1_share", "seed"))


@dataclass(frozen=True)
class ReportData:
    """All numbers of a report."""

    study: Study
    experiment: dict[str, Any]
    status: StudyStatus
    trials: tuple[FinishedTrial, ...]
    accuracy: pd.DataFrame
    mixtures: pd.DataFrame
    reliance: pd.DataFrame
    faithfulness: pd.DataFrame
    faithfulness_mixtures: pd.DataFrame
    specificity: pd.DataFrame
    mask_shares: pd.DataFrame
    verdicts: tuple[tuple[dict[str, object], Verdict], ...] = field(default=())

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(str(t.spec["task"]) for t in self.trials))

    def of_task(self, task: str) -> list[FinishedTrial]:
        return [t for t in self.trials if t.spec["task"] == task]


def read_report_data(study: Study) -> ReportData:
    """Read everything and compute the tables.

    Raises
    ------
    StudyError : no trial is finished.
    """
    files, jobs = study.files(), study.plan().get("explain", {})
    trials: list[FinishedTrial] = []
    n_diverged = 0
    for trial_id, spec, result in study.finished():
        if result["status"] != "finished":
            n_diverged += 1
            continue
        wanted, names = jobs.get(trial_id, {}), files.get(trial_id, set())
        done = {job: folder for job, folder in wanted.items() if f"explain/{folder}/done.json" in names}
        places = {job: sealed(study.trial(trial_id).child("explain", folder), DONE) for job, folder in done.items()}
        prototypes, faithfulness = places.get("prototypes"), places.get("faithfulness")
        trials.append(FinishedTrial(trial_id, spec, result, prototypes, faithfulness, len(done) == len(wanted)))
    if not trials and n_diverged:
        raise StudyError(
            f"no trial of this study is finished, so there is nothing to report: {n_diverged} diverged",
            where=study.storage.uri,
            remedy="`raystudy status EXPERIMENT` tells when; lower the learning rates and run again",
        )
    if not trials:
        raise StudyError(
            "no trial of this study is finished, so there is nothing to report",
            where=study.storage.uri,
            remedy="`raystudy run EXPERIMENT` first; `raystudy status EXPERIMENT` tells how far it is",
        )
    experiment = study.experiment()
    seed = int(experiment["study_seed"])
    with ThreadPoolExecutor(8) as pool:
        frames = list(pool.map(lambda t: _predictions(study, t), trials))
        pairs = list(pool.map(_pairs, trials))
        specific = [row for rows in pool.map(_specificity, trials) for row in rows]
        masks = [m for m in pool.map(_mask_shares, trials) if m is not None]
    predictions = [KeyedTable(t.keys, f) for t, f in zip(trials, frames, strict=True)]
    explained = [KeyedTable(t.keys, f) for t, f in zip(trials, pairs, strict=True) if f is not None]
    return ReportData(
        study,
        experiment,
        study.status(),
        tuple(trials),
        accuracy_table(predictions, seed),
        mixture_table(predictions, seed),
        reliance_table(predictions, seed),
        faithfulness_table(explained, seed),
        faithfulness_mixture_table(explained, seed),
        pd.DataFrame(specific),
        pd.concat(masks, ignore_index=True) if masks else pd.DataFrame(),
        tuple((keys, verdict(arm, str(keys["task"]))) for keys, arm in arms(predictions, seed)),
    )


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool) else str(value)


def _predictions(study: Study, trial: FinishedTrial) -> pd.DataFrame:
    return sealed(study.trial(trial.trial_id)).read_table(PREDICTIONS).to_pandas()


def _pairs(trial: FinishedTrial) -> pd.DataFrame | None:
    return None if trial.faithfulness is None else trial.faithfulness.read_table("pairs.parquet").to_pandas()


def _specificity(trial: FinishedTrial) -> list[dict[str, object]]:
    if trial.prototypes is None:
        return []
    rules = trial.prototypes.read_json("specificity.json")
    return [{**trial.keys, "rule": rule, **values} for rule, values in rules.items()]


def _mask_shares(trial: FinishedTrial) -> pd.DataFrame | None:
    if trial.prototypes is None or not trial.prototypes.exists("mask_share.parquet"):
        return None
    frame = trial.prototypes.read_table("mask_share.parquet").to_pandas()
    return frame.assign(**{k: v for k, v in trial.keys.items() if k in ("trial_id", "task", "h1_share", "seed")})
