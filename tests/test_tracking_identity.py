"""Two studies of one name in one store, copies, earlier versions and lost ids: each study finds its own runs."""

import shutil
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from raystudy.config import Tracking
from raystudy.results import write_sealed
from raystudy.storage import open_storage
from raystudy.study import Study
from raystudy.tracking import sync_study
from raystudy.tracking_identity import ID, ID_FILE, study_id
from tests.mlflow_view import assert_mirrored_once, cursor, cursor_file, runs
from tests.sqlite_store import mirror_all
from tests.tiny_study import TinyStudy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own, of its SQLAlchemy


def of_study(settings: Tracking, study: Study) -> dict[str, Run]:
    """Return the runs of one study, by trial."""
    known = study_id(study.storage, lambda: None)
    mine = [r for r in runs(settings.uri, "tiny") if r.data.tags.get(ID) == known]
    found = {r.data.tags["raystudy.trial_id"]: r for r in mine}
    assert len(found) == len(mine)
    return found


def later(study: Study, seconds: float) -> None:
    """Write a study's events anew, as if its trials had run later."""
    for trial_id in study.trial_ids():
        directory = study.trial(trial_id)
        events = directory.read_events("events")
        directory.delete("events")
        for event in events:
            directory.append_event("events", {**event, "time": event["time"] + seconds})


def unbegun(study: Study, trial_id: str, failed_at: float) -> None:
    """Leave of a trial its spec, and that it failed before it began."""
    directory = study.trial(trial_id)
    spec = directory.read_bytes("spec.json")
    directory.delete_tree()
    directory.write_bytes("spec.json", spec)
    write_sealed(directory, "failed.json", {"error": "OSError: told", "attempts": 1, "time": failed_at}, ())


def test_two_studies_of_one_name_share_a_store_and_touch_nothing_of_each_other(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    first, second = tiny_study.copy(tmp_path / "one"), tiny_study.copy(tmp_path / "two")
    later(second, 3600)
    second.storage.write_bytes("experiment.yaml", b"name: another\n")
    trial_id, *others = first.trial_ids()
    unbegun(first, trial_id, 5000.0)
    mirror_all(first, sqlite)
    before = {t: (r.info.run_id, r.info.status, r.data.to_dictionary()) for t, r in of_study(sqlite, first).items()}
    assert before.keys() == {"", trial_id, *others}
    for mirror in (mirror_all, sync_study):
        mirror(second, sqlite)
        theirs = of_study(sqlite, second)
        assert theirs.keys() == before.keys()
        assert len(runs(sqlite.uri, "tiny")) == 2 * len(before)
        now = {t: (r.info.run_id, r.info.status, r.data.to_dictionary()) for t, r in of_study(sqlite, first).items()}
        assert now == before
        parent = theirs[""].info.run_id
        assert {theirs[t].data.tags["mlflow.parentRunId"] for t in (trial_id, *others)} == {parent}
    mirror_all(first, sqlite)
    client = MlflowClient(tracking_uri=sqlite.uri)
    for study in (first, second):
        file = client.download_artifacts(of_study(sqlite, study)[""].info.run_id, "experiment.yaml", str(tmp_path))
        assert Path(file).read_bytes() == study.storage.read_bytes("experiment.yaml")


def test_a_study_that_was_copied_or_moved_goes_on_in_its_runs(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study = tiny_study.copy(tmp_path / "one")
    mirror_all(study, sqlite)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for mirror in (mirror_all, sync_study):
        mirror(Study.at(str(tmp_path / "two"), "tiny"), sqlite)
        assert_mirrored_once(study, sqlite.uri)


def as_an_earlier_version_left_it(study: Study, settings: Tracking) -> None:
    """Take the id away from the study, its cursor and its runs."""
    client = MlflowClient(tracking_uri=settings.uri)
    for run in of_study(settings, study).values():
        client.delete_tag(run.info.run_id, ID)
    sent = cursor(study)
    study.storage.delete(ID_FILE)
    write_sealed(study.storage, cursor_file(study), {"sent": sent}, ())


@pytest.mark.parametrize("lost", ["nothing", "the cursor"])
def test_runs_of_an_earlier_version_are_adopted_by_their_study_alone(
    lost: str, tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    first, second = tiny_study.copy(tmp_path / "one"), tiny_study.copy(tmp_path / "two")
    later(second, 3600)
    for study, failed_at in ((first, 5000.0), (second, 6000.0)):
        unbegun(study, study.trial_ids()[0], failed_at)
        mirror_all(study, sqlite)
    before = [{t: r.info.run_id for t, r in of_study(sqlite, study).items()} for study in (first, second)]
    for study in (first, second):
        as_an_earlier_version_left_it(study, sqlite)
        if lost == "the cursor":
            study.storage.delete(cursor_file(study))
    mirror_all(first, sqlite)
    tagged = {r.info.run_id for r in runs(sqlite.uri, "tiny") if ID in r.data.tags}
    assert tagged == set(before[0].values())
    sync_study(second, sqlite)
    for study, was in zip((first, second), before, strict=True):
        assert {t: r.info.run_id for t, r in of_study(sqlite, study).items()} == was
    assert len(runs(sqlite.uri, "tiny")) == 2 * len(before[0])


def test_two_studies_that_an_earlier_version_put_below_one_parent_are_parted(
    tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    first, second = tiny_study.copy(tmp_path / "one"), tiny_study.copy(tmp_path / "two")
    later(second, 3600)
    client = MlflowClient(tracking_uri=sqlite.uri)
    for study in (first, second):
        mirror_all(study, sqlite)
    shared, spare = (of_study(sqlite, study)[""].info.run_id for study in (first, second))
    for trial_id in second.trial_ids():
        client.set_tag(of_study(sqlite, second)[trial_id].info.run_id, "mlflow.parentRunId", shared)
    sent = {t: {**was, "run": was["run"].replace(spare, shared)} for t, was in cursor(second).items()}
    for study in (first, second):
        as_an_earlier_version_left_it(study, sqlite)
    write_sealed(second.storage, cursor_file(second), {"sent": sent}, ())
    client.delete_run(spare)
    for study in (second, first, second):
        mirror_all(study, sqlite)
    found = [of_study(sqlite, study) for study in (first, second)]
    assert len(runs(sqlite.uri, "tiny")) == sum(map(len, found)) == 2 * len(found[0])
    for mine in found:
        parents = {run.data.tags["mlflow.parentRunId"] for trial_id, run in mine.items() if trial_id}
        assert parents == {mine[""].info.run_id}


@pytest.mark.parametrize("lost", [ID_FILE, "a byte of it", "cursor", "all"])
def test_a_study_whose_id_is_lost_or_damaged_doubles_nothing(
    lost: str, tiny_study: TinyStudy, tmp_path: Path, sqlite: Tracking
) -> None:
    study = tiny_study.copy(tmp_path)
    mirror_all(study, sqlite)
    known, whole = study_id(study.storage, lambda: None), study.storage.read_bytes(ID_FILE)
    match lost:
        case "a byte of it":
            study.storage.write_bytes(ID_FILE, whole.replace(known.encode(), b"0" + known[1:].encode() + b"1"))
        case "cursor":
            study.storage.delete(cursor_file(study))
        case "all":
            study.storage.delete_tree("tracking")
        case _:
            study.storage.delete(lost)
    mirror_all(study, sqlite)
    assert study.storage.read_bytes(ID_FILE) == whole
    assert_mirrored_once(study, sqlite.uri)
    assert {r.data.tags[ID] for r in runs(sqlite.uri, "tiny")} == {known}


def test_two_makers_of_a_studys_id_agree(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)

    def overtaken() -> None:
        others.append(study_id(storage, lambda: None))

    others: list[str] = []
    assert study_id(storage, overtaken) == others[0] == study_id(storage, lambda: "another")
    assert study_id(open_storage(tmp_path / "other"), lambda: None) != others[0]


def test_a_lost_id_is_known_to_the_cursor_of_any_store(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    write_sealed(storage, "tracking/0123456789ab.json", {"sent": {}}, ())  # of an earlier version
    write_sealed(storage, "tracking/ba9876543210.json", {"sent": {}, "study": "known"}, ())
    assert study_id(storage, lambda: "another") == "known"
