"""What the driver's metrics say while a trial is tried again, or hangs before its first word."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from raystudy.errors import StudyError
from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.metrics import StudyMetrics
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.progress import Silent
from raystudy.orchestrate.sweep import TrialNews
from raystudy.orchestrate.watch import ENDS, Watch
from raystudy.storage import Storage, open_storage
from raystudy.study import Study
from tests.orchestrate import tiny, works

TRIAL = "pneumonia-h1_050-seed0-abcdef"


class Kept:
    """Stands for Ray's gauge and keeps what was set."""

    values: ClassVar[dict[str, float]] = {}

    def __init__(self, name: str, description: str, tags: tuple[str, ...]) -> None:
        self.info = {"name": name}

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[self.info["name"] + tags.get("trial_id", "") + tags.get("state", "")] = value


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A trial that waits."""
    monkeypatch.setattr("raystudy.orchestrate.metrics.Gauge", Kept)
    monkeypatch.setattr(Kept, "values", {})
    trial: Any = SimpleNamespace(trial_id=TRIAL, spec=SimpleNamespace(task="pneumonia", h1_share=50))
    study = Study(open_storage(tmp_path))
    found = Watch(study, Silent(), {TRIAL: "waiting"}, StudyMetrics("s", on_cluster=False))
    found.begin([trial])
    return found


@pytest.fixture
def watch(waiting: Watch) -> Watch:
    """A trial that runs."""
    waiting.trial(TrialNews(TRIAL, "running"))
    return waiting


def look(watch: Watch) -> dict[str, float]:
    watch._looked = 0.0
    watch.tick()
    return Kept.values


def test_a_retry_counts_while_the_trial_is_tried_again_and_once_only(watch: Watch) -> None:
    assert look(watch)["raystudy_retries_total"] == 0
    event = {"time": time.time(), "event": "retry", "attempt": 1, "error": "out of memory"}
    watch.study.trial(TRIAL).append_event("events", event)
    assert look(watch)["raystudy_retries_total"] == 1
    watch.trial(TrialNews(TRIAL, "finished"))
    assert look(watch)["raystudy_retries_total"] == 1


def test_a_trial_whose_machine_died_waits_until_it_runs_again(watch: Watch) -> None:
    event = {"time": time.time(), "event": "epoch", "epoch": 1, "epochs": 9, "images_per_second": 250.0}
    watch.study.trial(TRIAL).append_event("events", event)
    look(watch)
    watch._spoke[TRIAL] -= 700
    assert look(watch)[f"raystudy_images_per_second{TRIAL}"] == 250
    watch.trial(TrialNews(TRIAL, "retry", "the slot died"))
    now = look(watch)
    assert (now["raystudy_trialswaiting"], now["raystudy_trialsrunning"]) == (1, 0)
    assert now[f"raystudy_images_per_second{TRIAL}"] == now[f"raystudy_last_event_seconds{TRIAL}"] == 0
    watch.trial(TrialNews(TRIAL, "running"))
    watch.study.trial(TRIAL).append_event("events", {**event, "epoch": 2})
    now = look(watch)
    assert (now["raystudy_trialswaiting"], now["raystudy_trialsrunning"]) == (0, 1)
    assert (now[f"raystudy_epoch{TRIAL}"], now[f"raystudy_images_per_second{TRIAL}"]) == (2, 250)
    assert now["raystudy_retries_total"] == 1


def test_a_death_that_the_slot_told_of_before_it_died_too_is_one_retry(watch: Watch) -> None:
    directory = watch.study.trial(TRIAL)
    retry = {"time": time.time(), "event": "retry", "attempt": 1, "error": "the task's process died"}
    directory.append_event("events", retry)
    watch.trial(TrialNews(TRIAL, "retry", "the slot died"))
    assert look(watch)["raystudy_retries_total"] == 1
    watch.trial(TrialNews(TRIAL, "running"))
    watch.trial(TrialNews(TRIAL, "retry", "the slot died"))  # before the trial's first word
    assert look(watch)["raystudy_retries_total"] == 2
    watch.trial(TrialNews(TRIAL, "running"))
    directory.append_event("events", retry)
    directory.append_event("events", {"time": time.time(), "event": "started", "epoch": 1, "epochs": 9})
    watch.trial(TrialNews(TRIAL, "retry", "the slot died"))
    assert look(watch)["raystudy_retries_total"] == 4


def test_a_trial_that_never_says_anything_is_heard_as_silent(watch: Watch) -> None:
    watch._spoke[TRIAL] -= 700
    assert look(watch)[f"raystudy_last_event_seconds{TRIAL}"] > 600


@pytest.mark.parametrize("end", ENDS)
def test_a_trial_that_ended_is_neither_running_nor_silent(end: Any, watch: Watch) -> None:
    event = {"time": time.time(), "event": "epoch", "epoch": 1, "epochs": 9, "images_per_second": 250.0}
    watch.study.trial(TRIAL).append_event("events", event)
    look(watch)
    watch._spoke[TRIAL] -= 1200
    assert look(watch)[f"raystudy_last_event_seconds{TRIAL}"] > 900  # the alert fires
    assert Kept.values[f"raystudy_images_per_second{TRIAL}"] == 250
    watch.trial(TrialNews(TRIAL, end, "the worker died"))
    assert look(watch)[f"raystudy_last_event_seconds{TRIAL}"] == 0
    assert Kept.values[f"raystudy_images_per_second{TRIAL}"] == 0


def test_the_accuracies_of_trials_that_were_finished_before_are_there_from_the_start(
    films: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raystudy.orchestrate.metrics.Gauge", Kept)
    monkeypatch.setattr(Kept, "values", {})
    root = open_storage(place)
    plan = plan_study(tiny.experiment(films, place), root)
    finished, diverged, missing = (t.trial_id for t in plan.trials)
    study = Study(root.child("tiny"))
    tests = {"Test-50-50": {"n": 4, "correct": 3, "accuracy": 75.0}}
    result = {"status": "finished", "tests": tests, "selected": {"val_accuracy": 50.0}}
    study.trial(finished).write_json("result.json", result)
    study.trial(diverged).write_json("result.json", {"status": "diverged"})
    run_study(plan, root, work=works.null)
    assert Kept.values[f"raystudy_accuracy{finished}"] == 75
    assert not {f"raystudy_accuracy{diverged}"} & Kept.values.keys()
    assert Kept.values["raystudy_trialsfinished"] == 2
    assert Kept.values["raystudy_trialsdiverged"] == 1
    assert Kept.values[f"raystudy_images_per_second{missing}"] == 0


def test_trials_that_a_search_ended_are_counted(watch: Watch) -> None:
    watch.trial(TrialNews(TRIAL, "stopped"))
    assert Kept.values["raystudy_trialsstopped"] == 1
    assert Kept.values["raystudy_trialsrunning"] == 0


def test_what_earlier_runs_said_is_neither_a_retry_nor_a_checkpoint_of_this_one(waiting: Watch) -> None:
    directory, now = waiting.study.trial(TRIAL), time.time()
    directory.append_event("events", {"time": now, "event": "checkpoint", "seconds": 9.0})
    directory.append_event("events", {"time": now, "event": "retry", "attempt": 1, "error": "out of memory"})
    waiting.trial(TrialNews(TRIAL, "retry", "the slot died"))  # before it began
    waiting.trial(TrialNews(TRIAL, "failed", "the slot died"))
    assert waiting.failures == {TRIAL: "the slot died"}
    assert look(waiting)["raystudy_retries_total"] == 1
    assert Kept.values["raystudy_checkpoints_total"] == Kept.values["raystudy_checkpoint_seconds_total"] == 0
    assert Kept.values["raystudy_trialsfailed"] == 1


def test_what_earlier_runs_said_is_not_counted_where_the_storage_is_away_as_the_trial_begins(
    waiting: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*told: object) -> None:
        raise StudyError("no answer", where="storage", remedy="wait")

    directory = waiting.study.trial(TRIAL)
    directory.append_event("events", {"time": time.time(), "event": "checkpoint", "seconds": 9.0})
    with monkeypatch.context() as broken:
        broken.setattr(Storage, "read_events", away)
        waiting.trial(TrialNews(TRIAL, "running"))
    assert look(waiting)["raystudy_checkpoints_total"] == 0
    directory.append_event("events", {"time": time.time(), "event": "checkpoint", "seconds": 2.0})
    assert look(waiting)["raystudy_checkpoint_seconds_total"] == 2
