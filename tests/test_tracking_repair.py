"""`raystudy report --sync`: what it repairs, and when it is refused."""

import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from raystudy.cli import app
from raystudy.config import Tracking, load_experiment
from raystudy.errors import StudyError
from raystudy.lock import LOCK, locked
from raystudy.orchestrate import jobs
from raystudy.results import write_sealed
from raystudy.study import Study
from raystudy.tracking import Store, sync_study
from raystudy.tracking_server import check_server
from tests.mlflow_view import assert_mirrored_once, runs
from tests.s3_server import free_port
from tests.tiny_study import TinyStudy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own, of its SQLAlchemy


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
