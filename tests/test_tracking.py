"""The MLflow mirror on real stores: SQLite, and a server with PostgreSQL and S3."""

import json
import shutil
import socket
import time
from pathlib import Path

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

import raystudy.mirror
from raystudy.config import Tracking, load_experiment
from raystudy.mirror import Mirror
from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.search import search_experiment
from raystudy.report.page import write_report
from raystudy.results import write_sealed
from raystudy.storage import open_storage
from raystudy.study import Study
from raystudy.tracking import sync_study
from raystudy.tracking_identity import ID_FILE
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


def test_the_cursor_belongs_to_one_store(tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking) -> None:
    study = tiny_study.copy(tmp_path)
    mirror_all(study, sqlite)
    assert set(cursor(study)) == {"", *study.trial_ids()}
    other = Tracking(uri=f"sqlite:///{tmp_path / 'other.db'}")
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "other.db")
    mirror_all(study, other)
    assert len([n for n in study.storage.list("tracking") if n != ID_FILE]) == 2
