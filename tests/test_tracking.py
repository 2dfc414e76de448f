"""The MLflow mirror on real stores: SQLite, and a server with PostgreSQL and S3."""

import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner, Result

import raystudy.mirror
from raystudy.cli import app
from raystudy.config import Tracking, load_experiment
from raystudy.errors import StudyError
from raystudy.lock import LOCK, locked
from raystudy.mirror import Mirror
from raystudy.orchestrate import jobs
from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.search import search_experiment
from raystudy.report.page import write_report
from raystudy.results import write_sealed
from raystudy.storage import open_storage
from raystudy.study import Study
from raystudy.tracking import Line, Store, sync_study
from raystudy.tracking_identity import ID_FILE
from raystudy.tracking_server import check_server
from raystudy.tracking_values import event_numbers, event_time
from tests.canary import files_with
from tests.mlflow_server import MLflowServer
from tests.mlflow_view import (
    artifacts,
    assert_mirrored_once,
    cursor,
    expected_numbers,
    numbers,
    replay,
    runs,
)
from tests.s3_server import free_port
from tests.sqlite_store import mirror_all
from tests.tiny_study import FILM, PATIENT, TinyStudy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own, of its SQLAlchemy


def test_a_finished_study_has_one_parent_and_a_run_a_trial_with_every_number_once(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study = tiny_study.copy(tmp_path)
    mirror_all(study, sqlite)
    assert_mirrored_once(study, sqlite.uri)


def test_what_a_search_tried_is_told_in_the_tables_and_in_mlflow(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    root = tmp_path / "studies"
    shutil.copytree(Path(tiny_study.study.storage.uri).parent / "_images", root / "_images")
    search = {"space": {"training.lr_add_on": {"uniform": [1e-3, 2e-3]}}, "trials": 2, "mixtures": [50]}
    search |= {"algorithm": "random", "scheduler": "none"}
    asked = [f"storage={root}", f"search={json.dumps(search)}", "explain.enabled=false"]
    storage = open_storage(root)
    plan = plan_study(search_experiment(load_experiment(tiny_study.file, asked)), storage)
    assert run_study(plan, storage, executor="plain").trained == 2
    study = Study(storage.child("tiny"))
    write_report(study)
    tried = {t: study.trial(t).read_json("spec.json")["axes"]["training.lr_add_on"] for t in study.trial_ids()}
    assert len(set(tried.values())) == 2
    table = pd.read_csv(root / "tiny/report/tables/accuracy.csv")
    assert dict(zip(table["trial_id"], table["axis.training.lr_add_on"], strict=True)) == tried
    mirror_all(study, sqlite)
    params = {r.data.tags["raystudy.trial_id"]: r.data.params for r in runs(sqlite.uri, "tiny")}
    assert {t: float(params[t]["training.lr_add_on"]) for t in tried} == tried


def test_sending_everything_again_changes_nothing(tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking) -> None:
    study = tiny_study.copy(tmp_path)
    mirror_all(study, sqlite)
    before = {r.info.run_id: (r.info.end_time, r.data.to_dictionary()) for r in runs(sqlite.uri, "tiny")}
    sync_study(study, sqlite)
    mirror_all(study, sqlite)
    assert_mirrored_once(study, sqlite.uri)
    assert {r.info.run_id: (r.info.end_time, r.data.to_dictionary()) for r in runs(sqlite.uri, "tiny")} == before


def test_a_new_database_is_filled_although_the_cursor_says_that_all_was_sent(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking, empty_store: Path
) -> None:
    study = tiny_study.copy(tmp_path)
    mirror_all(study, sqlite)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    mirror_all(study, sqlite)
    assert_mirrored_once(study, sqlite.uri)


def test_a_run_that_somebody_deleted_is_made_again(tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking) -> None:
    study = tiny_study.copy(tmp_path)
    mirror_all(study, sqlite)
    gone = next(r for r in runs(sqlite.uri, "tiny") if r.data.tags["raystudy.trial_id"])
    MlflowClient(tracking_uri=sqlite.uri).delete_run(gone.info.run_id)
    mirror_all(study, sqlite)
    assert_mirrored_once(study, sqlite.uri)


def test_the_numbers_of_a_running_trial_and_of_its_explanation_appear_within_fifteen_seconds(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study = Study(open_storage(tmp_path).child("tiny"))
    steps = replay(tiny_study.study, study)
    first = next(steps)
    mirror = Mirror(study, sqlite)
    mirror.start()
    deadline = time.monotonic() + 30
    while not runs(sqlite.uri, "tiny") and time.monotonic() < deadline:  # the mirror is at work
        time.sleep(0.1)
    wrote = time.monotonic()
    second = next(steps)
    trial_id = second.split()[0]
    assert (first, second) == (f"{trial_id} started", f"{trial_id} epoch")

    def wait_for(metric: str, step: int) -> None:
        while (trial_id, metric, step) not in {n[:3] for n in numbers(sqlite.uri, "tiny")}:
            assert time.monotonic() < wrote + 15
            time.sleep(0.2)

    wait_for("val_accuracy", 1)
    running = next(r for r in runs(sqlite.uri, "tiny") if r.data.tags["raystudy.trial_id"] == trial_id)
    assert running.info.status == "RUNNING"
    assert next(s for s in steps if s == f"{trial_id} explained")
    wrote = time.monotonic()
    wait_for("average_drop_prp", 0)
    for _ in steps:
        pass
    assert mirror.close()
    assert_mirrored_once(study, sqlite.uri)


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
        mirror_all(study, sqlite)
        (run,) = [r for r in runs(sqlite.uri, "tiny") if r.data.tags["raystudy.trial_id"] == trial_id]
        assert run.info.status == status


def test_a_trial_that_a_search_stopped_is_shown_as_killed_though_it_had_no_time_to_say_so(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study = Study(open_storage(tmp_path).child("tiny"))
    trial_id = next(t for t, event in map(str.split, replay(tiny_study.study, study)) if event == "epoch")
    mirror_all(study, sqlite)
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
    assert status() == "RUNNING"
    directory.write_json("failed.json", {"error": "killed", "attempts": 1})
    assert status() == "FAILED"
    directory.delete("failed.json")
    directory.write_json("stopped.json", {})  # by a search
    assert status() == "FINISHED"
    directory.delete("stopped.json")
    directory.write_bytes("result.json", result)
    assert status() == "FINISHED"


def test_no_patient_and_no_film_reaches_the_store(tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking) -> None:
    study = tiny_study.copy(tmp_path / "studies")
    words = (PATIENT, FILM)
    known = files_with(tmp_path / "studies", *words)
    assert any(n.endswith("predictions.parquet") for n in known)  # the search does find them where they are
    study.storage.write_bytes("report/tables/planted_truth.csv", f"image_id\nH1/{FILM}\n".encode())  # of phantoms
    directory, job = study.trial(study.trial_ids()[0]), study.plan()["explain"][study.trial_ids()[0]]["faithfulness"]
    directory.delete(f"explain/{job}/done.json")
    failed = {"error": f"ValueError: H1/{FILM} of {PATIENT} is not there", "attempts": 1, "time": 1.0}
    write_sealed(directory, f"explain/{job}/failed.json", failed, ())
    mirror_all(study, sqlite)
    shutil.rmtree(tmp_path / "studies")
    assert files_with(tmp_path, *words) == set()
    names = [p.name for p in tmp_path.rglob("*")]
    assert "accuracy_pneumonia.png" in names
    assert not [n for n in names if n.startswith("films") or n.endswith(".html")]


def test_films_are_sent_when_that_is_allowed(tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking) -> None:
    study = tiny_study.copy(tmp_path)
    mirror_all(study, sqlite.model_copy(update={"images": True}))
    parent = next(r for r in runs(sqlite.uri, "tiny") if not r.data.tags["raystudy.trial_id"])
    sent = set(artifacts(sqlite.uri, parent.info.run_id))
    assert "report/index.html" in sent
    assert any(n.startswith("report/figures/films") for n in sent)


def test_a_server_with_postgresql_and_s3_holds_the_same(
    tiny_study: TinyStudy, tmp_path: Path, mlflow_server: MLflowServer
) -> None:
    if not mlflow_server.backend.startswith("postgresql"):
        pytest.skip("PostgreSQL is not installed")
    study = tiny_study.copy(tmp_path)
    settings = Tracking(uri=mlflow_server.uri, experiment="postgres")
    mirror_all(study, settings)
    assert_mirrored_once(study, mlflow_server.uri, "postgres")
    assert open_storage(mlflow_server.artifacts).list()  # on S3 indeed
    sync_study(study, settings)
    assert_mirrored_once(study, mlflow_server.uri, "postgres")
    assert numbers(mlflow_server.backend, "postgres") == expected_numbers(study)  # in PostgreSQL indeed


def test_the_end_of_a_study_waits_for_no_dead_server(tiny_study: TinyStudy, tmp_path: Path) -> None:
    study = tiny_study.copy(tmp_path)
    mirror = Mirror(study, Tracking(uri=f"http://127.0.0.1:{free_port()}"))
    began = time.monotonic()
    mirror.start()
    assert not mirror.close()
    assert time.monotonic() - began < raystudy.mirror.CLOSING_SECONDS / 3


def test_the_end_of_a_study_waits_for_no_silent_server(
    tiny_study: TinyStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(raystudy.mirror.SILENCE_SECONDS, "http", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        mirror = Mirror(tiny_study.copy(tmp_path), Tracking(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"))
        mirror.start()
        began = time.monotonic()
        assert not mirror.close()
        assert 1 < time.monotonic() - began < raystudy.mirror.CLOSING_SECONDS / 3


def test_repair_names_a_server_that_does_not_answer(tiny_study: TinyStudy, tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StudyError, match="does not answer") as refusal:
        sync_study(tiny_study.copy(tmp_path), Tracking(uri=uri))
    assert refusal.value.where == uri
    assert "--sync" in str(refusal.value.remedy)
    with pytest.raises(StudyError, match="does not answer"):
        check_server(uri)


def report_sync(tiny_study: TinyStudy, study: Study, settings: Tracking) -> Result:
    """Run `raystudy report FILE --sync` on a copy of the study."""
    place = ["--storage", study.storage.uri.rsplit("/", 1)[0], "--tracking-uri", settings.uri]
    return CliRunner().invoke(app, ["report", str(tiny_study.file), "--sync", *place, "--set", "tracking.enabled=true"])


def test_a_study_without_a_finished_trial_is_mirrored_by_repair_though_it_has_no_report(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study = tiny_study.copy(tmp_path)
    for trial_id in study.trial_ids():
        study.trial(trial_id).delete("result.json")  # its events stay: interrupted
    failed, *_ = study.trial_ids()
    write_sealed(study.trial(failed), "failed.json", {"error": "no memory", "attempts": 4, "time": time.time()}, ())
    done = report_sync(tiny_study, study, sqlite)
    assert (done.exit_code, "nothing to report" in done.output) == (2, True), done.output
    states = {run.data.tags["raystudy.trial_id"]: run.info.status for run in runs(sqlite.uri, "tiny")}
    assert states.keys() >= set(study.trial_ids())
    assert states[failed] == "FAILED"
    (told,) = {run.data.tags["raystudy.error"] for run in runs(sqlite.uri, "tiny") if "raystudy.error" in run.data.tags}
    assert told == "no memory"


def test_repair_beside_a_living_driver_is_refused(tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking) -> None:
    study = tiny_study.copy(tmp_path)
    study.storage.delete_tree("report")
    with locked(study.storage):
        done = report_sync(tiny_study, study, sqlite)
        assert done.exit_code == 2
        assert "another driver works on this study" in done.output
        assert "remedy: " in done.output
    assert not runs(sqlite.uri, "tiny")
    assert not study.storage.list("report")
    assert report_sync(tiny_study, study, sqlite).exit_code == 0
    assert_mirrored_once(study, sqlite.uri)


def test_a_repair_takes_no_lock_of_another_host_unasked_and_ends_when_it_loses_its_own(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study, lost = tiny_study.copy(tmp_path), threading.Event()
    with locked(study.storage):
        lock = {**study.storage.read_json(LOCK), "host": "elsewhere", "owner": "process 7 on elsewhere"}
    study.storage.write_json(LOCK, lock)
    done = report_sync(tiny_study, study, sqlite)
    assert (done.exit_code, "process 7 on elsewhere" in done.output, "--take-over" in done.output) == (2, True, True)
    lost.set()
    with pytest.raises(StudyError, match="took this study over"):
        sync_study(study, sqlite, lost)
    assert not runs(sqlite.uri, "tiny")


def test_a_repair_of_a_study_that_is_not_mirrored_is_refused(tiny_study: TinyStudy) -> None:
    done = CliRunner().invoke(app, ["report", str(tiny_study.file), "--sync", "--set", "tracking.enabled=false"])
    assert (done.exit_code, "tracking.enabled=true" in done.output) == (2, True), done.output


def test_a_repair_keeps_drivers_away_and_is_none(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, said = tiny_study.copy(tmp_path), list[str]()
    experiment = load_experiment(tiny_study.file, [f"storage={tmp_path}"])

    def meanwhile(store: Store, final: bool) -> None:
        with (
            pytest.raises(StudyError, match="mirror of this study is being repaired") as refusal,
            locked(study.storage),
        ):
            pass
        assert "stop" not in str(refusal.value)
        assert study.status().driver is None
        with pytest.raises(StudyError, match="nobody runs this study") as refusal:
            jobs.stop(experiment)
        said.append(str(refusal.value))

    monkeypatch.setattr(Store, "sync", meanwhile)
    files = {*study.storage.list()}
    assert report_sync(tiny_study, study, sqlite).exit_code == 0
    assert said
    assert LOCK not in study.storage.list()
    assert {name for name in study.storage.list() if not name.startswith(("report/", "tracking/"))} <= files


def test_the_cursor_belongs_to_one_store(tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking) -> None:
    study = tiny_study.copy(tmp_path)
    mirror_all(study, sqlite)
    assert set(cursor(study)) == {"", *study.trial_ids()}
    other = Tracking(uri=f"sqlite:///{tmp_path / 'other.db'}")
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "other.db")
    mirror_all(study, other)
    assert len([n for n in study.storage.list("tracking") if n != ID_FILE]) == 2
