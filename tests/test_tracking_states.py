"""How trials that failed, ended, were killed or deleted are shown in MLflow, and that what goes on keeps its run."""

import shutil
import time
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from raystudy.config import Tracking
from raystudy.results import write_sealed
from raystudy.storage import open_storage
from raystudy.study import Study
from raystudy.tracking import Line, Store, sync_study
from raystudy.tracking_values import event_numbers, event_time
from tests.mlflow_view import assert_mirrored_once, replay, runs
from tests.sqlite_store import mirror_all
from tests.tiny_study import TinyStudy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own, of its SQLAlchemy


def test_a_parameter_that_changed_becomes_a_tag(tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking) -> None:
    study = tiny_study.copy(tmp_path)
    mirror_all(study, sqlite)
    trial_id = study.trial_ids()[0]
    spec = study.trial(trial_id).read_json("spec.json")
    spec["training"]["threads"] = 2  # no part of a trial's identity
    study.trial(trial_id).write_json("spec.json", spec)
    sync_study(study, sqlite)
    run = next(r for r in runs(sqlite.uri, "tiny") if r.data.tags["raystudy.trial_id"] == trial_id)
    assert run.data.params["training.threads"] == "1"
    assert run.data.tags["raystudy.now.training.threads"] == "2"


def test_epochs_that_ran_again_after_a_crash_count_once() -> None:
    def epoch(n: int, time: float, accuracy: float = 50.0) -> dict[str, object]:
        return {"event": "epoch", "epoch": n, "time": time, "val_accuracy": accuracy}

    events = [epoch(1, 1.0), epoch(2, 2.0), {"event": "resumed", "epoch": 1, "time": 3.0}, epoch(2, 4.0), epoch(3, 5.0)]
    whole, position = event_numbers(events, [-1, 0, 0])
    assert [(n.step, n.time) for n in whole] == [(1, 1000), (2, 2000), (3, 5000)]
    assert event_numbers([epoch(3, 6.0)], position)[0] == []


def test_an_interrupted_trial_is_shown_as_killed_and_goes_on_as_running(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study = Study(open_storage(tmp_path).child("tiny"))
    steps = replay(tiny_study.study, study)
    trial_id = next(steps).split()[0]
    for event, status in (("interrupted", "KILLED"), ("resumed", "RUNNING")):
        study.trial(trial_id).append_event("events", {"time": time.time(), "event": event, "epoch": 0})
        mirror_all(study, sqlite, at_rest=False)
        (run,) = [r for r in runs(sqlite.uri, "tiny") if r.data.tags["raystudy.trial_id"] == trial_id]
        assert run.info.status == status


def test_a_trial_that_a_search_stopped_is_shown_as_killed_though_it_had_no_time_to_say_so(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study = Study(open_storage(tmp_path).child("tiny"))
    trial_id = next(t for t, event in map(str.split, replay(tiny_study.study, study)) if event == "epoch")
    mirror_all(study, sqlite, at_rest=False)
    assert run_of(sqlite, trial_id).info.status == "RUNNING"
    study.trial(trial_id).write_json("stopped.json", {"epoch": 1, "value": 55.0})
    mirror_all(study, sqlite)
    (*_, last) = study.trial(trial_id).read_events("events")
    run = run_of(sqlite, trial_id)
    assert (run.info.status, run.info.end_time) == ("KILLED", event_time(last))


def test_a_repair_shows_what_a_killed_driver_left_as_killed_until_it_goes_on(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study = Study(open_storage(tmp_path).child("tiny"))
    steps = replay(tiny_study.study, study)
    trial_id = next(t for t, event in map(str.split, steps) if event == "epoch")
    Store(study, sqlite, Line()).sync(final=False)  # and the driver was killed

    def states() -> set[str]:
        return {run.info.status for run in runs(sqlite.uri, "tiny")}

    assert (len(runs(sqlite.uri, "tiny")), states()) == (2, {"RUNNING"})
    for _ in range(2):
        sync_study(study, sqlite)
        assert states() == {"KILLED"}
        (*_, last) = study.trial(trial_id).read_events("events")
        assert {run.info.end_time for run in runs(sqlite.uri, "tiny")} == {event_time(last)}
    study.trial(trial_id).append_event("events", {"time": time.time(), "event": "resumed", "epoch": 1})
    Store(study, sqlite, Line()).sync(final=False)  # a driver goes on
    assert states() == {"RUNNING"}
    for _ in steps:
        pass
    mirror_all(study, sqlite)
    assert_mirrored_once(study, sqlite.uri)


def test_what_a_driver_leaves_unfinished_is_shown_as_killed_unless_another_one_goes_on(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study = Study(open_storage(tmp_path).child("tiny"))
    next(e for e in replay(tiny_study.study, study) if e.endswith(" epoch"))  # and the trial's process dies
    for at_rest, status in ((False, "RUNNING"), (True, "KILLED"), (False, "RUNNING"), (True, "KILLED")):
        mirror_all(study, sqlite, at_rest=at_rest)
        assert [run.info.status for run in runs(sqlite.uri, "tiny")] == [status, status]


def begun_trial(study: Study, trial_id: str, came: Study, since: float) -> None:
    """Write a trial's spec and its first two events anew, as of another time."""
    directory = study.trial(trial_id)
    directory.delete_tree()
    directory.write_bytes("spec.json", came.trial(trial_id).read_bytes("spec.json"))
    for n, event in enumerate(came.trial(trial_id).read_events("events")[:2]):
        directory.append_event("events", {**event, "time": since + n})


@pytest.mark.parametrize("was", ["begun", "finished"])
def test_a_trial_that_was_deleted_and_trained_anew_has_a_run_of_its_own(
    was: str, tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study = tiny_study.copy(tmp_path)
    trial_id = study.trial_ids()[0]
    if was == "begun":
        begun_trial(study, trial_id, tiny_study.study, 1000.0)
    for since in (None, 2000.0, 3000.0):
        if since is not None:
            begun_trial(study, trial_id, tiny_study.study, since)
        mirror_all(study, sqlite)
    found = [r for r in runs(sqlite.uri, "tiny") if r.data.tags["raystudy.trial_id"] == trial_id]
    started = {r.info.start_time for r in found}
    assert started >= {2_000_000, 3_000_000}
    assert len(found) == len(started) == 3
    client = MlflowClient(tracking_uri=sqlite.uri)
    for run in found:
        assert [m.step for m in client.get_metric_history(run.info.run_id, "val_accuracy")][:1] == [1]


def test_a_damaged_first_event_makes_no_second_run(tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking) -> None:
    study = tiny_study.copy(tmp_path)
    mirror_all(study, sqlite)
    directory = study.trial(study.trial_ids()[0])
    directory.write_bytes("events", b"?" + directory.read_bytes("events")[1:])
    mirror_all(study, sqlite)
    assert_mirrored_once(study, sqlite.uri)


def run_of(settings: Tracking, trial_id: str) -> Run:
    (run,) = [r for r in runs(settings.uri, "tiny") if r.data.tags["raystudy.trial_id"] == trial_id]
    return run


def test_a_trial_that_failed_before_its_first_event_is_there_and_goes_on_in_the_same_run(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study = tiny_study.copy(tmp_path)
    trial_id = study.trial_ids()[0]
    directory, came = study.trial(trial_id), tiny_study.study.trial(trial_id)
    directory.delete_tree()
    directory.write_bytes("spec.json", came.read_bytes("spec.json"))
    for error in ("ValueError: told", "TypeError: told"):  # the words may name films and stay here
        mark = {"error": error, "attempts": 1, "time": 5000.0}
        write_sealed(directory, "failed.json", mark, ())
        mirror_all(study, sqlite)
        run = run_of(sqlite, trial_id)
        assert (run.info.status, run.info.start_time, run.info.end_time) == ("FAILED", 5_000_000, 5_000_000)
        assert run.data.tags["raystudy.error"] == error.removesuffix(": told")
        assert run.data.params["task"] == "pneumonia"
    sync_study(study, sqlite)
    assert run_of(sqlite, trial_id).info.run_id == run.info.run_id
    directory.delete("failed.json")
    shutil.copytree(came.uri, directory.uri, dirs_exist_ok=True)
    mirror_all(study, sqlite)
    assert_mirrored_once(study, sqlite.uri)
    assert run_of(sqlite, trial_id).info.run_id == run.info.run_id
    assert "raystudy.error" not in run_of(sqlite, trial_id).data.tags
    sync_study(study, sqlite)
    assert_mirrored_once(study, sqlite.uri)


def test_a_failed_explanation_is_told_until_it_is_made(tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking) -> None:
    study = tiny_study.copy(tmp_path)
    trial_id = study.trial_ids()[0]
    directory = study.trial(trial_id)
    folder = f"explain/{study.plan()['explain'][trial_id]['faithfulness']}"
    done = directory.read_bytes(f"{folder}/done.json")
    mirror_all(study, sqlite)
    directory.delete(f"{folder}/done.json")
    write_sealed(directory, f"{folder}/failed.json", {"error": "MemoryError: told", "attempts": 4, "time": 1.0}, ())
    mirror_all(study, sqlite)
    assert run_of(sqlite, trial_id).data.tags["raystudy.error.faithfulness"] == "MemoryError"
    assert run_of(sqlite, trial_id).info.status == "FINISHED"  # the training
    messages = [t.message for t in study.status().trials]
    assert messages == ["explanation faithfulness failed: MemoryError: told", "", ""]
    directory.write_bytes(f"{folder}/done.json", done)
    mirror_all(study, sqlite)
    assert "raystudy.error.faithfulness" not in run_of(sqlite, trial_id).data.tags
    assert not any(t.message for t in study.status().trials)
    assert_mirrored_once(study, sqlite.uri)


def test_a_study_with_failed_trials_alone_left_is_shown_as_failed_until_they_are_done(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study = tiny_study.copy(tmp_path)
    directory = study.trial(study.trial_ids()[0])
    result = directory.read_bytes("result.json")

    def status() -> str:
        mirror_all(study, sqlite)
        (run,) = [r for r in runs(sqlite.uri, "tiny") if not r.data.tags.get("raystudy.trial_id")]
        return run.info.status

    directory.delete("result.json")
    assert status() == "KILLED"
    directory.write_json("failed.json", {"error": "killed", "attempts": 1})
    assert status() == "FAILED"
    directory.delete("failed.json")
    directory.write_json("stopped.json", {})  # by a search
    assert status() == "FINISHED"
    directory.delete("stopped.json")
    directory.write_bytes("result.json", result)
    assert status() == "FINISHED"
