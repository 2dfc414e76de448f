"""The MLflow mirror: one writer a study, fed from the study directory (DESIGN.md rule 1).

In flow the events, results, explanations and tables of a study directory; out flow an MLflow parent run for the study
and a run for every trial, found again by tag.  A cursor in the study directory says what is already there, and every
metric carries its event's own time and step, so that sending twice changes nothing.  MLflow being down, slow or wrong
never touches training: the mirror tries again later.  No film and no patient id is sent unless ``tracking.images``.
This is the only module that imports mlflow.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

import mlflow
import requests
from mlflow.entities import Metric, Param, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from raystudy.config import Tracking
from raystudy.errors import StudyError
from raystudy.study import Study

OLDEST, FIRST_UNKNOWN = (3, 1), (4, 0)  # versions of MLflow whose interface this module speaks
INTERVAL_SECONDS = 5.0
BATCH = 900  # metrics a request; MLflow takes 1,000 entries at most
TEST_METRICS = {"Test-100H1": "test_100h1", "Test-100H2": "test_100h2", "Test-50-50": "test_50_50"}
EVENT_METRICS = (
    "val_accuracy",
    "val_cross_entropy",
    "images_per_second",
    "total",
    "cross_entropy",
    "cluster",
    "separation",
    "l1",
)
PRIVATE_FIGURES = ("figures/films_",)  # figures that show films
_Unavailable = (MlflowException, requests.RequestException, OSError)
log = logging.getLogger("raystudy.tracking")


class Mirror:
    """Keeps an MLflow store equal to a study directory, from a thread of its own.

    `sync` sends what is new and raises when MLflow does not answer; the thread logs that once and tries again.
    """

    def __init__(self, study: Study, settings: Tracking, interval: float = INTERVAL_SECONDS) -> None:
        self.study, self.settings, self.interval = study, settings, interval
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._silent = False
        self._store: _Store | None = None

    def start(self) -> None:
        """Mirror in the background until `close`."""
        self._thread = threading.Thread(target=self._loop, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        wait = self.interval
        while not self._stop.wait(wait):
            wait = self.interval if self._try() else min(60.0, 2 * wait)

    def _try(self) -> bool:
        try:
            self.sync()
        except (*_Unavailable, StudyError) as error:
            if not self._silent:
                log.warning("MLflow at %s does not answer (%s); training goes on", self.settings.uri, _short(error))
            self._silent = True
            return False
        self._silent = False
        return True

    def sync(self) -> None:
        """Send everything that is not there yet."""
        if self._store is None:
            self._store = _Store(self.study, self.settings)
        self._store.sync()

    def close(self) -> bool:
        """Stop the thread and send what is left; False when MLflow does not answer (repair: `report --sync`)."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        return self._try()


def sync_study(study: Study, settings: Tracking) -> None:
    """Repair the mirror of a study: forget the cursor and send everything again; what is there stays as it is.

    Raises
    ------
    StudyError : MLflow does not answer.
    """
    cursor = _cursor_path(settings)
    if study.storage.exists(cursor):
        study.storage.delete(cursor)
    try:
        _Store(study, settings).sync()
    except _Unavailable as error:
        raise StudyError(
            f"MLflow does not answer: {_short(error)}",
            where=settings.uri,
            remedy="start the server, or name another with --tracking-uri, then `raystudy report EXPERIMENT --sync`",
        ) from None


def check_server(uri: str) -> None:
    """Refuse an MLflow whose version this raystudy does not speak, or that does not answer."""
    for what, version in (("library", mlflow.__version__), *_server_version(uri)):
        number = tuple(int(p) for p in version.split(".")[:2] if p.isdigit())
        if not OLDEST <= number < FIRST_UNKNOWN:
            raise StudyError(
                f"MLflow {what} {version} is not supported",
                where=uri,
                remedy=f"use MLflow {OLDEST[0]}.{OLDEST[1]} or newer, below {FIRST_UNKNOWN[0]}",
            )


def _server_version(uri: str) -> list[tuple[str, str]]:
    if urlsplit(uri).scheme not in ("http", "https"):
        return []
    try:
        answer = requests.get(f"{uri.rstrip('/')}/version", timeout=10)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise StudyError(
            f"MLflow does not answer: {_short(error)}",
            where=uri,
            remedy="start `mlflow server`, or use sqlite:///mlflow.db",
        ) from None
    return [("server", answer.text.strip())]


def _cursor_path(settings: Tracking) -> str:
    return f"tracking/{hashlib.sha256(settings.uri.encode()).hexdigest()[:12]}.json"


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


class _Store:
    """One MLflow store as seen from one study: its runs by tag, and what has been sent."""

    def __init__(self, study: Study, settings: Tracking) -> None:
        self.study, self.settings = study, settings
        self.client = MlflowClient(tracking_uri=settings.uri)
        name = settings.experiment or study.name
        with contextlib.redirect_stderr(io.StringIO()):  # a new sqlite file tells of every migration
            found = self.client.get_experiment_by_name(name)
        try:
            self.experiment_id = found.experiment_id if found else self.client.create_experiment(name)
        except MlflowException:  # made by another study at this moment
            self.experiment_id = self.client.get_experiment_by_name(name).experiment_id  # type: ignore[union-attr]
        self.runs = {run.data.tags.get("raystudy.trial_id", ""): run.info.run_id for run in self._runs()}
        self.sent: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError):
            self.sent = study.storage.read_json(_cursor_path(settings))

    def _runs(self) -> Iterator[Any]:
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id],
                f"tags.`raystudy.study` = '{self.study.name}'",
                ViewType.ACTIVE_ONLY,
                max_results=1000,
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def run(self, trial_id: str) -> str:
        """Return the run of a trial ("" = the study's own), made when no run has its tag."""
        if trial_id not in self.runs:
            # A creation that timed out may have succeeded: look before making another.
            self.runs |= {r.data.tags.get("raystudy.trial_id", ""): r.info.run_id for r in self._runs()}
        if trial_id not in self.runs:
            tags = {"raystudy.study": self.study.name, "raystudy.trial_id": trial_id}
            if trial_id:
                tags["mlflow.parentRunId"] = self.run("")
            made = self.client.create_run(self.experiment_id, tags=tags, run_name=trial_id or self.study.name)
            self.runs[trial_id] = made.info.run_id
        return self.runs[trial_id]

    def sync(self) -> None:
        before = json.dumps(self.sent, sort_keys=True)
        try:
            files = self.study.files()
            self.run("")
            for trial_id in self.study.trial_ids():
                self._sync_trial(trial_id, files.get(trial_id, set()))
            self._sync_report()
        finally:
            if json.dumps(self.sent, sort_keys=True) != before:
                self.study.storage.write_json(_cursor_path(self.settings), self.sent)

    def _sync_trial(self, trial_id: str, names: set[str]) -> None:
        sent = self.sent.setdefault(trial_id, {"events": 0, "parts": []})
        if "spec.json" not in names or "closed" in sent["parts"]:
            return
        directory = self.study.trial(trial_id)
        events = directory.read_events("events", sent["events"])
        if not events and sent["events"] == 0:
            return
        run = self.run(trial_id)
        if "params" not in sent["parts"]:
            self.client.log_batch(run, params=_params(directory.read_json("spec.json")))
            sent["parts"].append("params")
        for start in range(0, len(events), BATCH // len(EVENT_METRICS)):
            chunk = events[start : start + BATCH // len(EVENT_METRICS)]
            metrics = [m for event in chunk for m in _event_metrics(event)]
            if metrics:
                self.client.log_batch(run, metrics=metrics)
            sent["events"] += len(chunk)
        self._set_status(run, names, sent)
        if "result.json" in names and "result" not in sent["parts"]:
            self._send_result(run, trial_id)
            sent["parts"].append("result")
        for name in sorted(n for n in names if n.startswith("explain/faithfulness-") and n.endswith("/done.json")):
            if name not in sent["parts"]:
                self._send_faithfulness(run, trial_id, name)
                sent["parts"].append(name)

    def _set_status(self, run: str, names: set[str], sent: dict[str, Any]) -> None:
        status = "FINISHED" if "result.json" in names else "FAILED" if "failed.json" in names else "RUNNING"
        if sent.get("status") != status:
            self.client.set_terminated(run, status) if status != "RUNNING" else self.client.update_run(run, status)
            sent["status"] = status

    def _send_result(self, run: str, trial_id: str) -> None:
        directory = self.study.trial(trial_id)
        result, events = directory.read_json("result.json"), directory.read_events("events")
        self.client.set_tag(run, "raystudy.status", result["status"])
        if result["status"] != "finished":
            return
        time = int(1000 * float(events[-1]["time"])) if events else 0
        values = {f"accuracy_{TEST_METRICS.get(k, k)}": v["accuracy"] for k, v in result["tests"].items()}
        values["selected_val_accuracy"] = result["selected"]["val_accuracy"]
        self.client.log_batch(run, metrics=[Metric(k, float(v), time, 0) for k, v in sorted(values.items())])
        for name in ("model.safetensors", "spec.json"):
            self._artifact(run, name, directory.read_bytes(name))

    def _send_faithfulness(self, run: str, trial_id: str, name: str) -> None:
        from raystudy.evaluate.faithfulness import summarise

        directory = self.study.trial(trial_id)
        spec, done = directory.read_json("spec.json"), directory.read_json(name)
        pairs = directory.read_table(name.replace("done.json", "pairs.parquet")).to_pandas()
        metrics = []
        events = directory.read_events("events")
        time = int(1000 * float(done.get("time") or (events[-1]["time"] if events else 0)))
        for value in summarise([pairs], int(spec["study_seed"])).values():
            metrics.append(Metric(f"average_drop_{value.method}", value.average_drop.estimate, time, 0))
            metrics.append(Metric(f"average_increase_{value.method}", value.average_increase.estimate, time, 0))
        self.client.log_batch(run, metrics=metrics)

    def _sync_report(self) -> None:
        """Send tables and figures of the report to the study's run; pages and pictures with films only when allowed."""
        sent = self.sent.setdefault("", {"report": {}})
        for path in self.study.storage.list("report"):
            private = path.endswith(".html") or any(p in path for p in PRIVATE_FIGURES)
            if private and not self.settings.images:
                continue
            data = self.study.storage.read_bytes(path)
            checksum = hashlib.sha256(data).hexdigest()
            if sent["report"].get(path) != checksum:
                self._artifact(self.run(""), path, data)
                sent["report"][path] = checksum
        status = self.study.status()
        if status.trials and status.counts["finished"] + status.counts["diverged"] == len(status.trials):
            self.client.set_terminated(self.run(""), "FINISHED")

    def _artifact(self, run: str, path: str, data: bytes) -> None:
        folder, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / name
            file.write_bytes(data)
            self.client.log_artifact(run, str(file), folder or None)


def _params(spec: dict[str, Any], prefix: str = "") -> list[Param]:
    """Return a spec as flat parameters: ``training.epochs``, ``task``, ``h1_share``, …"""
    out: list[Param] = []
    for key, value in sorted(spec.items()):
        if isinstance(value, dict):
            out += _params(value, f"{prefix}{key}.")
        else:
            out.append(Param(f"{prefix}{key}", str(value)))
    return out


def _event_metrics(event: dict[str, Any]) -> list[Metric]:
    """Return an event's numbers as metrics at the event's own time; the step counts completed epochs."""
    time, step = int(1000 * float(event["time"])), int(event.get("epoch") or 0)
    stage = "last_layer_" if event.get("stage") == "last_layer" and event["event"] != "progress" else ""
    found = []
    for key in EVENT_METRICS:
        value = event.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            found.append(Metric(f"{stage}{key}", float(value), time, step))
    return found


__all__ = ["Mirror", "check_server", "sync_study"]
