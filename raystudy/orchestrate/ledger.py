"""What the study directory says is still to do, and the marks that orchestration leaves there.

Written here: experiment.yaml, cohorts/, plan.json, the missing trials' spec.json; later failed.json of a trial or an
explanation job, and stop.json, the wish that a running study ends with checkpoints.  Everything that a worker needs is
read back from these files, so a worker is told nothing but names.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import yaml

from raystudy.errors import DamagedFileError
from raystudy.explanation_jobs import JOBS, Job, explained, job_directory
from raystudy.images.store import form_of, pixels_key
from raystudy.orchestrate.assignment import FAILED, RETRIED, STOPPED, Rows, TrialRows
from raystudy.orchestrate.identity import digest
from raystudy.orchestrate.plan import PlannedTrial, StudyPlan
from raystudy.results import DONE, MODEL, REMEDIES, RESULT, damaged_files, read_result, write_sealed
from raystudy.storage import Storage
from raystudy.study import PLAN, Study, parquet_bytes, read_mark
from raystudy.trial_files import keep_spec

WRITERS = 16


@dataclass
class Ledger:
    """The bookkeeping of one plan in one study directory."""

    study: Study
    plan: StudyPlan
    rows: dict[str, TrialRows] = field(default_factory=dict[str, TrialRows])
    _files: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    _ended: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict[str, tuple[str, dict[str, Any]]])

    def open(self) -> None:
        """Read what is there, and check what is finished: damaged explanations count as missing, checkpoints go.

        Raises
        ------
        StudyError : the directory was written by a newer raystudy; a result is damaged.
        """
        self.study.refuse_newer()
        self._files = self.study.files()
        with ThreadPoolExecutor(WRITERS) as pool:
            for _ in pool.map(self._check_ended, self.plan.trials):
                pass

    def write_plan(self, trials: Iterable[PlannedTrial] | None = None) -> None:
        """Write plan.json and experiment.yaml; ``trials`` replaces the plan's own (a search adds to them)."""
        wanted = tuple(trials) if trials is not None else self.plan.trials
        explain = {t.trial_id: {job: _name(job, t) for job in JOBS} for t in wanted if t.explain.enabled}
        rows = {t.trial_id: _row_files(t) for t in wanted}
        plan = {**self.plan.as_json(), "trials": [t.trial_id for t in wanted], "explain": explain, "rows": rows}
        text = yaml.safe_dump(self.plan.experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        storage = self.study.storage
        write_sealed(storage, PLAN, plan, ())
        storage.write_bytes("experiment.yaml", text.encode())

    def missing_trials(self, only_failed: bool = False) -> list[PlannedTrial]:
        """Return the trials without a result, in the plan's order."""
        return [
            t
            for t in self.plan.trials
            if not {"result.json", STOPPED} & self.files(t) and (not only_failed or {FAILED, RETRIED} & self.files(t))
        ]

    def missing_explanations(self, only_failed: bool = False) -> list[tuple[PlannedTrial, Job]]:
        """Return the explanation jobs that finished trials still lack."""
        missing: list[tuple[PlannedTrial, Job]] = []
        for trial in self.plan.trials:
            names = self.files(trial)
            if self.state(trial) != "finished" or not trial.explain.enabled:
                continue
            for job in JOBS:
                folder = job_directory(job, trial.explain)
                if f"{folder}/done.json" not in names and (not only_failed or f"{folder}/{FAILED}" in names):
                    missing.append((trial, job))
        return missing

    def state(self, trial: PlannedTrial) -> str:
        """Return how a trial ended (``finished``, ``diverged``, ``stopped``) as of ``open``, or ``waiting``."""
        if trial.trial_id in self._ended:
            return self._ended[trial.trial_id][0]
        return "stopped" if STOPPED in self.files(trial) else "waiting"

    def tests(self, trial: PlannedTrial) -> dict[str, Any]:
        """Return n, correct and accuracy by test set as of ``open``; nothing of a trial that is not finished."""
        return self._ended.get(trial.trial_id, ("", {}))[1]

    def image_keys(self) -> dict[str, str]:
        """Return the names of the plan's films that the study keeps, by their form; none where they are damaged."""
        try:
            kept = {form_of(key): key for key in self.study.image_keys() or ()}
        except DamagedFileError:
            return {}
        return {form: kept[form] for form in kept.keys() & _forms(self.plan.trials)}

    def films_known(self) -> bool:
        """Whether the report finds the films of what is finished, or begun."""
        return _forms(t for t in self.plan.trials if self.files(t)) <= self.image_keys().keys()

    def strangers(self) -> list[str]:
        """Return the trials of the directory that the plan does not ask for; they are kept."""
        return sorted(set(self._files) - {t.trial_id for t in self.plan.trials})

    def files(self, trial: PlannedTrial) -> set[str]:
        """Return the names in a trial's directory as of ``open``."""
        return self._files.get(trial.trial_id, set())

    def prepare_trials(self, trials: Iterable[PlannedTrial]) -> None:
        """Write rows and specs of trials that are about to run (or be explained).

        The rows of the plan's other trials are looked after, too: what is missing or damaged is written anew.
        """
        contents: dict[str, bytes] = {}
        trials = list(trials)
        sums: dict[int, Rows] = {}
        for trial in (t for t in (*self.plan.trials, *trials) if t.trial_id not in self.rows):
            cohort, tests = _row_files(trial)
            self.rows[trial.trial_id] = TrialRows(
                _rows(cohort, trial.cohort, contents, sums), _rows(tests, trial.tests, contents, sums)
            )
        with ThreadPoolExecutor(WRITERS) as pool:
            for _ in pool.map(lambda item: self._write_rows(*item), contents.items()):
                pass
            for _ in pool.map(lambda t: keep_spec(self.study.trial(t.trial_id), t.spec), trials):
                pass

    def mark_failed(self, trial_id: str, error: str, attempts: int) -> None:
        """Record that a trial failed for good; the next run tries it again."""
        mark = {"error": error, "attempts": attempts, "time": time.time()}
        write_sealed(self.study.trial(trial_id), FAILED, mark, ())

    def _check_ended(self, trial: PlannedTrial) -> None:
        if RESULT in self.files(trial):
            self._check_finished(trial)
        elif STOPPED in self.files(trial):
            read_mark(self.study.trial(trial.trial_id), STOPPED)

    def _check_finished(self, trial: PlannedTrial) -> None:
        """Look at every byte of a finished trial (object storage looks after its models itself)."""
        directory, names = self.study.trial(trial.trial_id), self.files(trial)
        substitute = stand_in(directory)
        result = substitute or read_result(directory) or {}
        self._ended[trial.trial_id] = str(result.get("status")), dict(result.get("tests", {}))
        if substitute:
            return
        for name in damaged_files(directory, left_out=() if directory.is_local else (MODEL,)):
            what = "the file is missing, or does not match its checksum"
            raise DamagedFileError(what, where=directory.address(name), remedy=REMEDIES[RESULT])
        keep_spec(directory, trial.spec)
        if any(n.startswith("checkpoint/") for n in names):  # its worker died before it cleared them
            from raystudy.checkpoint import Checkpoints  # torch

            Checkpoints(directory.child("checkpoint"), trial.spec.fingerprint()).clear()
        for job in JOBS:
            done = f"{job_directory(job, trial.explain)}/{DONE}"
            if done in names and not explained(job, directory, trial.explain):
                names.discard(done)

    def _write_rows(self, path: str, content: bytes) -> None:
        storage = self.study.storage
        try:
            if storage.read_bytes(path) == content:
                return
        except FileNotFoundError:
            pass
        storage.write_bytes(path, content)


def stand_in(directory: Storage) -> dict[str, Any] | None:
    """Return a result that something else than a trial wrote: it has neither schema nor checksum."""
    try:
        result = dict(directory.read_json(RESULT))
    except (ValueError, TypeError):
        return None
    return None if {"schema", "checksum"} & result.keys() else result


def _forms(trials: Iterable[PlannedTrial]) -> set[str]:
    return {form_of(pixels_key(settings)) for settings in {t.images for t in trials}}


def _name(job: Job, trial: PlannedTrial) -> str:
    return job_directory(job, trial.explain).split("/", 1)[1]


def _row_files(trial: PlannedTrial) -> list[str]:
    """Return where a trial's cohort and test rows lie; axes that decide who is drawn get a mark of their own."""
    more = [f"cohort{trial.spec.cohort_seed}"] if trial.spec.cohort_seed else []
    deciding = {k: v for k, v in trial.spec.axes.items() if k.startswith("cohort.")}
    more += [digest(deciding)[:6]] if deciding else []
    parts = (f"h1_{trial.spec.h1_share:03d}", "test")
    return [f"cohorts/{'-'.join([trial.spec.task, part, *more])}.parquet" for part in parts]


def _rows(path: str, frame: pd.DataFrame, contents: dict[str, bytes], sums: dict[int, Rows]) -> Rows:
    if id(frame) not in sums:  # trials of one mixture share their frame
        content = parquet_bytes(frame)
        if contents.setdefault(path, content) != content:
            raise ValueError(f"two different cohorts would be written as {path}")
        sums[id(frame)] = Rows(path, hashlib.sha256(content).hexdigest())
    return sums[id(frame)]
