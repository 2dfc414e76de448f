"""The MLflow mirror: one writer a study, fed from the study directory (DESIGN.md rule 1).

In flow the events, results, explanations and tables of a study directory; out flow an MLflow parent run for the study
and a run for every trial, found again by tag.  A cursor in the study directory says what is already there, and every
number carries its event's own time and step, so that sending twice changes nothing.  MLflow being down, slow or wrong
never touches training: the mirror tries again later.  No film and no patient id is sent unless ``tracking.images``.
This is the only module that imports mlflow.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # a repeated "create run" would make two; the mirror looks first

import alembic.util
import requests
import sqlalchemy.exc
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from raystudy.config import Tracking
from raystudy.errors import DamagedFileError, StudyError
from raystudy.results import DONE, read_result, read_sealed, sealed, write_sealed
from raystudy.storage import EVENT_READERS, Storage
from raystudy.study import Study, failures, read_mark
from raystudy.tracking_identity import ID, PARENT, STARTED, STUDY, TRIAL, adopted, known_as, study_id
from raystudy.tracking_server import check_server, first_line
from raystudy.tracking_values import (
    MOST_NUMBERS,
    Number,
    event_numbers,
    event_time,
    faithfulness_numbers,
    parameters,
    result_numbers,
)

OPENS_AS = {"mlflow.experimentKind": "custom_model_development"}  # the page of runs shows parameters and metrics
EVENTS_A_BATCH = 1000 // MOST_NUMBERS  # MLflow takes 1,000 metrics a request
PARAMS_A_BATCH = 100
LONGEST_NAME = 250  # of a run: MLflow's tables take no more; the tag holds the whole id
ERROR = "raystudy.error"  # a tag: why the trial failed; raystudy.error.JOB: why its explanation did
FAILED = "failed.json"
PRIVATE = ("report/figures/films", "report/index.html", "report/tables/planted_truth.csv")  # of the report: films, ids

T = TypeVar("T")


def known_tables() -> set[str]:
    """Return the names of all tables that the installed MLflow makes in a database."""
    import mlflow.store.db.utils  # noqa: F401 (knows every table)
    from mlflow.store.db.base_sql_model import Base

    return set(Base.metadata.tables)


class GivenUpError(Exception):
    """The study has ended and does not wait for MLflow any longer."""


def _failures() -> tuple[type[Exception], ...]:
    """Return everything by which an MLflow store says that it is not there or not well."""
    known: list[type[Exception]] = [MlflowException, requests.RequestException, OSError, ImportError]
    known += [sqlalchemy.exc.SQLAlchemyError, alembic.util.CommandError]
    with contextlib.suppress(ImportError):  # artifacts on S3
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        known += [Boto3Error, BotoCoreError, ClientError]
    return tuple(known)


UNAVAILABLE = _failures()


def sync_study(study: Study, settings: Tracking, given_up: threading.Event | None = None) -> None:
    """Repair the mirror of a study: forget the cursor and send everything again; what is there stays as it is.

    Parameters
    ----------
    given_up : set when the study's lock, which is held meanwhile, is lost: the mirror has one writer.

    Raises
    ------
    StudyError : the lock was lost; MLflow does not answer, or is of a version that is not known.
    """
    check_server(settings.uri, must_answer=False)
    try:
        Store(study, settings, Line(given_up), anew=True).sync(final=True)
    except GivenUpError:
        remedy = "leave it to that one: its mirror catches up"
        raise StudyError("a driver took this study over", where=study.storage.uri, remedy=remedy) from None
    except UNAVAILABLE as error:
        raise StudyError(
            f"MLflow does not answer: {first_line(error)}",
            where=settings.uri,
            remedy="start the server, or name another with --tracking-uri, then `raystudy report EXPERIMENT --sync`",
        ) from None


def _cursor_path(settings: Tracking) -> str:
    return f"tracking/{hashlib.sha256(settings.uri.encode()).hexdigest()[:12]}.json"


class Line:
    """The line to a store: when it was heard last, and whether anybody still waits."""

    def __init__(self, given_up: threading.Event | None = None) -> None:
        self.heard = time.monotonic()
        self.given_up = given_up or threading.Event()

    def __call__(self, request: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        if self.given_up.is_set():
            raise GivenUpError
        answer = request(*args, **kwargs)
        self.heard = time.monotonic()
        return answer


class Store:
    """One MLflow store as seen from one study: its runs by tag, and what has been sent.

    A trial's run is named by the study's id, the trial and the time of its first event: a trial that was deleted and
    trained anew has a run of its own, and one whose creation timed out is found again.  A trial that failed before its
    first event has a run without that time, which it keeps when it begins.
    """

    def __init__(self, study: Study, settings: Tracking, line: Line, *, anew: bool = False) -> None:
        self.study, self.settings, self.ask = study, settings, line
        self.at_rest = anew  # no trial can be running: a repair holds the study's lock
        for name in ("alembic", "mlflow.store.db.utils"):  # a new database tells of every migration
            logging.getLogger(name).setLevel(logging.ERROR)
        self.client = MlflowClient(tracking_uri=settings.uri)
        self.experiment_id = self._experiment(settings.experiment or study.name)
        self.cursor: dict[str, Any] = {"sent": {}}
        with contextlib.suppress(DamagedFileError):  # then everything is sent again, which changes nothing
            self.cursor = read_sealed(study.storage, _cursor_path(settings)) or self.cursor
        self.sent: dict[str, Any] = {} if anew else copy.deepcopy(self.cursor["sent"])
        self.began: dict[str, int] = {}  # when a trial's first event was written, in ms
        self.runs: dict[tuple[str, str], str] = {}
        self.parents: dict[str, str | None] = {}  # of the runs that were found
        self.found: dict[str, tuple[str, dict[str, str]]] = {}  # status and tags of the same
        listed = list(self._list_runs())
        self.id = study_id(study.storage, lambda: known_as((r.data.tags for r in listed), self._began(listed)))
        self._find_runs(listed)

    def _experiment(self, name: str) -> str:
        found = self.ask(self.client.get_experiment_by_name, name)
        if found is None:
            try:
                folder = _artifact_folder(self.settings.uri, name)
                return self.ask(self.client.create_experiment, name, folder, tags=OPENS_AS)
            except MlflowException:  # made by another study at this moment
                found = self.ask(self.client.get_experiment_by_name, name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self.ask(self.client.restore_experiment, found.experiment_id)
        return found.experiment_id

    def _find_runs(self, listed: list[Any]) -> None:
        """Learn the study's runs; of two with one name (a creation timed out and came late) the cursor's stays."""
        known = {sent.get("run") for sent in self.cursor["sent"].values()}
        mine = [run for run in listed if run.data.tags.get(ID) == self.id]
        old = [run for run in listed if ID not in run.data.tags]
        mine += adopted(old, mine, self.cursor["sent"], self._began(old), self._failed_at)
        for run in sorted(mine, key=lambda r: (r.info.run_id not in known, r.info.run_id)):
            name = (run.data.tags.get(TRIAL, ""), run.data.tags.get(STARTED, ""))
            if name in self.runs:
                self.ask(self.client.delete_run, run.info.run_id)
                continue
            if ID not in run.data.tags:
                self.ask(self.client.set_tag, run.info.run_id, ID, self.id)
            self.runs[name] = run.info.run_id
            self.parents[run.info.run_id] = run.data.tags.get(PARENT)
            self.found[run.info.run_id] = (run.info.status, run.data.tags)
        self.live = set(self.runs.values())

    def _began(self, runs: list[Any]) -> dict[str, int]:
        """Return when the trials of these runs began in this study, in ms."""
        files = self.study.files() if runs else {}
        self._look_when_they_began({t: files[t] for r in runs if (t := r.data.tags.get(TRIAL)) in files})
        return self.began

    def _failed_at(self, trial_id: str) -> int | None:
        with contextlib.suppress(FileNotFoundError, DamagedFileError, ValueError):  # a tag may name anything
            return _failed_at(self.study.trial(trial_id))
        return None

    def _list_runs(self) -> Iterator[Any]:
        token = None
        condition = f"tags.`{STUDY}` = '{self.study.name}'"
        while True:
            page = self.ask(
                self.client.search_runs, [self.experiment_id], condition, ViewType.ACTIVE_ONLY, 1000, None, token
            )
            yield from page
            token = page.token
            if not token:
                return

    def run(self, trial_id: str, started: int | None = None, failed_at: int | None = None) -> str:
        """Return the run of a trial ("" = the study's own), made when no run has its name.

        Parameters
        ----------
        started : when the trial's first event was written, in ms; None: it has none, and failed at ``failed_at``.
        """
        name = (trial_id, str(started or ""))
        if name not in self.runs and started and (trial_id, "") in self.runs:  # it failed before it began; now it has
            self.runs[name] = self.runs.pop((trial_id, ""))
            self.ask(self.client.set_tag, self.runs[name], STARTED, name[1])
        if name not in self.runs:  # after a failure the store is looked at anew, so a timed out creation was found
            tags = {ID: self.id, STUDY: self.study.name, TRIAL: name[0], STARTED: name[1]}
            if trial_id:
                tags[PARENT] = self.run("")
            made = self.ask(
                self.client.create_run,
                self.experiment_id,
                started or failed_at,
                tags,
                run_name=(trial_id or self.study.name)[:LONGEST_NAME],
            )
            self.runs[name] = made.info.run_id
            self.live.add(made.info.run_id)
        return self.runs[name]

    def sync(self, final: bool) -> None:
        """Send everything that is not there yet; the report only when it is final."""
        try:
            plan, files = self.study.plan(), self.study.files()
            self._look_when_they_began({t: files.get(t, set()) for t in plan["trials"]})
            for trial_id in plan["trials"]:
                self._sync_trial(trial_id, files.get(trial_id, set()), plan.get("explain", {}).get(trial_id, {}))
            status = _study_status([files.get(t, set()) for t in plan["trials"]])
            if final:
                self._sync_study(status)
            elif status == "RUNNING" and ("", "") in self.runs:  # it was shown as killed while nobody worked on it
                self._set_status(self.run(""), status, 0, self._sent_of_study())
        finally:
            cursor = {"study": self.id, "sent": copy.deepcopy(self.sent)}
            if any(self.cursor.get(key) != value for key, value in cursor.items()):
                write_sealed(self.study.storage, _cursor_path(self.settings), cursor, ())
                self.cursor = cursor

    def _look_when_they_began(self, files: Mapping[str, set[str]]) -> None:
        """Read the first event of every trial that has begun, once."""
        begun = [t for t, names in files.items() if t not in self.began and _has_events(names)]
        with ThreadPoolExecutor(EVENT_READERS) as pool:
            firsts = pool.map(lambda t: self.study.trial(t).first_event("events"), begun)
            self.began |= {t: event_time(first) for t, first in zip(begun, firsts, strict=True) if first is not None}

    def _sync_trial(self, trial_id: str, names: set[str], jobs: dict[str, str]) -> None:
        sent, started = self.sent.get(trial_id, {}), self.began.get(trial_id)
        if sent.get("run") not in self.live or (started is not None and sent["started"] != started):
            sent = {}  # nothing was sent, somebody deleted the run, or the trial was deleted and trained anew
        if "spec.json" not in names or not (_has_events(names) or FAILED in names):
            return
        directory, explained = self.study.trial(trial_id), jobs.get("faithfulness")
        failed, done = failures(directory, names, jobs), f"explain/{explained}/done.json"
        if not self.settings.images:  # the text may name films
            failed = {what: error.partition(":")[0] for what, error in failed.items()}
        if sent.get("result") and (done not in names or explained == sent.get("faithfulness")):
            self._send_failures(failed, sent)
            return
        if not sent:
            if started is None:  # its first event is damaged, or it failed before it wrote one
                readable = directory.read_events("events")[:1] if _has_events(names) else []
                if not readable and FAILED not in names:
                    return
                started = event_time(readable[0]) if readable else None
            run = self.run(trial_id, started, _failed_at(directory) if started is None else None)
            status, tags = self.found.get(run, ("RUNNING", {}))
            sent = {"run": run, "started": started, "events": 0, "position": [-1, 0, 0], "status": status}
            sent["failed"] = {k.removeprefix(ERROR)[1:]: v for k, v in tags.items() if k.startswith(ERROR)}
        self.sent[trial_id] = sent
        run = sent["run"]
        if "params" not in sent:
            self._send_parameters(run, parameters(directory.read_json("spec.json")))
            sent["params"] = True
        self._send_events(run, directory, names, sent)
        self._send_failures(failed, sent)
        if "result.json" in names and not sent.get("result"):
            self._send_result(run, directory, sent["ended"])
            sent["result"] = True
        if done in names and explained != sent.get("faithfulness"):
            self._send_faithfulness(run, directory, f"explain/{explained}")
            sent["faithfulness"] = explained

    def _send_parameters(self, run: str, wanted: dict[str, str]) -> None:
        """Send parameters; MLflow refuses another value of one that is there, so that becomes a tag."""
        known = self.ask(self.client.get_run, run).data.params
        params = [Param(key, value) for key, value in wanted.items() if key not in known]
        for start in range(0, len(params), PARAMS_A_BATCH):
            self.ask(self.client.log_batch, run, params=params[start : start + PARAMS_A_BATCH])
        changed = [RunTag(f"raystudy.now.{k}", v) for k, v in wanted.items() if known.get(k, v) != v]
        if changed:
            self.ask(self.client.log_batch, run, tags=changed)

    def _send_events(self, run: str, directory: Storage, names: set[str], sent: dict[str, Any]) -> None:
        events = directory.read_events("events", sent["events"])
        for start in range(0, len(events), EVENTS_A_BATCH):
            chunk = events[start : start + EVENTS_A_BATCH]
            numbers, position = event_numbers(chunk, sent["position"])
            self._send_numbers(run, numbers)
            sent["position"], sent["events"] = position, sent["events"] + len(chunk)
        if events:
            sent["last"] = [event_time(events[-1]), events[-1]["event"]]
        when, last = sent.get("last", [0, ""])
        if "result.json" in names:
            when = sent["ended"] = _written(directory, "result.json")
        elif FAILED in names:
            when = _failed_at(directory) or when
        self._set_status(run, _run_status(names, last), when, sent)

    def _send_failures(self, failed: dict[str, str], sent: dict[str, Any]) -> None:
        """Tag a run with what failed of its trial, and why; take away what has been mended."""
        for what in sorted({*failed, *sent["failed"]}):
            tag = f"{ERROR}.{what}".rstrip(".")
            if what not in failed:
                if tag in self.ask(self.client.get_run, sent["run"]).data.tags:
                    self.ask(self.client.delete_tag, sent["run"], tag)
            elif sent["failed"].get(what) != failed[what]:
                self.ask(self.client.set_tag, sent["run"], tag, failed[what])
        sent["failed"] = failed

    def _set_status(self, run: str, status: str, when: int, sent: dict[str, Any]) -> None:
        if status == "RUNNING" and self.at_rest:
            status = "KILLED"
        if sent["status"] == status:
            return
        if status == "RUNNING":
            self.ask(self.client.update_run, run, status)
        else:
            self.ask(self.client.set_terminated, run, status, when or None)
        sent["status"] = status

    def _send_numbers(self, run: str, numbers: list[Number]) -> None:
        if numbers:
            self.ask(self.client.log_batch, run, metrics=[Metric(n.key, n.value, n.time, n.step) for n in numbers])

    def _send_final(self, run: str, values: dict[str, float], when: int) -> None:
        """Send values that a run has once, unless they are there."""
        known = self.ask(self.client.get_run, run).data.metrics
        self._send_numbers(run, [Number(k, v, when) for k, v in values.items() if known.get(k) != v])

    def _send_result(self, run: str, directory: Storage, ended: int) -> None:
        result = read_result(directory)
        assert result is not None  # its name was listed
        self.ask(self.client.set_tag, run, "raystudy.status", result["status"])
        if result["status"] != "finished":
            self.ask(self.client.set_terminated, run, "FAILED", ended)
            return
        self._send_final(run, result_numbers(result), ended)
        for name in ("model.safetensors", "spec.json"):
            self._send_artifact(run, name, sealed(directory).read_bytes(name))

    def _send_faithfulness(self, run: str, directory: Storage, folder: str) -> None:
        spec = directory.read_json("spec.json")
        pairs = sealed(directory.child(*folder.split("/")), DONE).read_table("pairs.parquet").to_pandas()
        numbers = faithfulness_numbers(pairs, int(spec["study_seed"]))
        self._send_final(run, numbers, _written(directory, f"{folder}/done.json"))

    def _sent_of_study(self) -> dict[str, Any]:
        run = self.run("")
        if self.sent.get("", {}).get("run") != run:
            self.sent[""] = {"run": run, "files": {}, "status": self.found.get(run, ("RUNNING",))[0]}
        return self.sent[""]

    def _sync_study(self, status: str) -> None:
        """Send the resolved experiment, tables and figures; pages and pictures with films only when that is allowed."""
        run, sent = self.run(""), self._sent_of_study()
        for child, parent in self.parents.items():
            if run not in (child, parent):  # it had a parent that is gone
                self.ask(self.client.set_tag, child, PARENT, run)
        storage = self.study.storage
        for path in [*(p for p in ("experiment.yaml",) if storage.exists(p)), *storage.list("report")]:
            if path.startswith(PRIVATE) and not self.settings.images:
                continue
            data = storage.read_bytes(path)
            checksum = hashlib.sha256(data).hexdigest()
            if sent["files"].get(path) != checksum:
                self._send_artifact(run, path, data)
                sent["files"][path] = checksum
        ended = max((int(s.get("ended", s.get("last", [0])[0])) for s in self.sent.values()), default=0)
        self._set_status(run, status, ended, sent)

    def _send_artifact(self, run: str, path: str, data: bytes) -> None:
        folder, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / name
            file.write_bytes(data)
            self.ask(self.client.log_artifact, run, str(file), folder or None)


def _has_events(names: set[str]) -> bool:
    return any(n.split("/")[0] == "events" for n in names)


def _run_status(names: set[str], last_event: str) -> str:
    if "result.json" in names:
        return "FAILED" if last_event == "diverged" else "FINISHED"
    if "stopped.json" in names:  # by a search, perhaps before the trial could say so
        return "KILLED"
    if FAILED in names:
        return "FAILED"
    return "KILLED" if last_event == "interrupted" else "RUNNING"


def _study_status(trials: list[set[str]]) -> str:
    """Return the status of a study whose trials have these files: failed when nothing but failures is left of it."""
    ended = [names & {"result.json", "stopped.json", FAILED} for names in trials]
    if not all(ended):
        return "RUNNING"
    return "FAILED" if any(names == {FAILED} for names in ended) else "FINISHED"


def _failed_at(directory: Storage) -> int:
    """Return when a trial failed, in ms; 0 where its mark says nothing of it."""
    return event_time({"time": 0, **read_mark(directory, FAILED)})


def _written(directory: Storage, path: str) -> int:
    """Return when a file was written, in ms."""
    file_system, base = directory.filesystem()
    return int(file_system.get_file_info(f"{base}/{path}").mtime_ns // 1_000_000)


def _artifact_folder(uri: str, experiment: str) -> str | None:
    """Return where artifacts lie beside a SQLite file; a server knows a place of its own."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///").split("?")[0]).resolve().parent / "mlruns" / experiment).as_uri()


__all__ = ["UNAVAILABLE", "GivenUpError", "Line", "Store", "check_server", "first_line", "sync_study"]
