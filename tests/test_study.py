"""What a study directory tells of its trials."""

from pathlib import Path
from typing import Any

import pytest

from raystudy.errors import DamagedFileError, StudyError
from raystudy.lock import locked
from raystudy.results import write_sealed
from raystudy.storage import open_storage
from raystudy.study import Study

TRIAL = "pneumonia-h1_060-seed0-3fa9c1"


def study_with(place: Path, **result: Any) -> Study:
    study = Study(open_storage(place))
    write_sealed(study.storage, "plan.json", {"format": 1, "trials": [TRIAL]}, ())
    study.trial(TRIAL).write_json("result.json", result)
    return study


def finished(**more: Any) -> dict[str, Any]:
    history = [{"epoch": epoch, "val_accuracy": float(epoch)} for epoch in range(50)]
    selected = {"epoch": 40, "val_accuracy": 88.5}
    return {"status": "finished", "history": history, "selected": selected, "n_train": 7, "axes": {}, **more}


@pytest.mark.parametrize("more", [{}, {"study": "n_train"}, {"weights": 'a "n_train" in words'}])
def test_a_finished_trial_tells_its_selected_accuracy(tmp_path: Path, more: dict[str, Any]) -> None:
    (trial,) = study_with(tmp_path, **finished(**more)).status().trials
    assert (trial.state, trial.val_accuracy) == ("finished", 88.5)


def test_a_diverged_trial_tells_why(tmp_path: Path) -> None:
    result = {"status": "diverged", "history": [], "n_train": 7, "reason": "the loss is not finite in epoch 3"}
    (trial,) = study_with(tmp_path, **result).status().trials
    assert (trial.state, trial.message) == ("diverged", "the loss is not finite in epoch 3")


def test_a_trial_that_a_search_ended_early_is_stopped(tmp_path: Path) -> None:
    study = study_with(tmp_path)
    study.trial(TRIAL).delete("result.json")
    study.trial(TRIAL).append_event("events", {"time": 1.0, "event": "epoch", "epoch": 2})
    study.trial(TRIAL).write_json("stopped.json", {"epoch": 2, "value": 55.0, "by": "the search"})
    status = study.status()
    assert (status.trials[0].state, status.trials[0].val_accuracy) == ("stopped", 55.0)
    assert status.counts["stopped"] == 1


@pytest.mark.parametrize("name", ["failed.json", "stopped.json"])
def test_a_mark_of_an_earlier_raystudy_is_read_and_a_damaged_one_is_named(tmp_path: Path, name: str) -> None:
    study = study_with(tmp_path)
    directory = study.trial(TRIAL)
    directory.delete("result.json")
    mark = {"error": "told", "epoch": 2, "value": 55.0}
    directory.write_json(name, mark)
    assert study.status().trials[0].state == name.removesuffix(".json")
    write_sealed(directory, name, mark, ())
    whole = directory.read_bytes(name)
    assert study.status().trials[0].state == name.removesuffix(".json")
    for damaged in (whole.replace(b"55.0", b"57.0"), whole.replace(b"told", b"tomd"), whole[:-9], b"[]", b"7", b""):
        directory.write_bytes(name, damaged)
        with pytest.raises(DamagedFileError) as refusal:
            study.status()
        assert refusal.value.where == directory.address(name)


@pytest.mark.parametrize("lock", ["[]", '{"heartbeat": null}', '{"heartbeat": "x"}', "{", "null", "{}"])
def test_a_damaged_lock_is_no_driver(tmp_path: Path, lock: str) -> None:
    study = study_with(tmp_path, **finished())
    study.storage.write_bytes("lock.json", lock.encode())
    assert study.status().driver is None


def test_a_driver_whose_process_is_gone_is_none(tmp_path: Path) -> None:
    study = study_with(tmp_path, **finished())
    with locked(study.storage):
        assert study.status().driver
        lock = {**study.storage.read_json("lock.json"), "started": "another process has its pid"}
    study.storage.write_json("lock.json", lock)
    assert study.status().driver is None


def test_a_driver_that_has_no_plan_yet_is_told(tmp_path: Path) -> None:
    study = Study.at(str(tmp_path), "early")
    with pytest.raises(StudyError, match="there is no study here"):
        study.require()
    with locked(study.storage), pytest.raises(StudyError, match="looks which films can be read"):
        study.require()


def test_a_trial_that_is_tried_again_while_its_status_is_asked_is_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_with(tmp_path)
    study.trial(TRIAL).delete("result.json")
    listed = {TRIAL: {"spec.json", "failed.json"}}  # and deleted since
    monkeypatch.setattr(Study, "files", lambda _: listed)
    assert study.status().trials[0].state == "waiting"


def test_explanations_of_earlier_settings_are_not_counted(tmp_path: Path) -> None:
    study = study_with(tmp_path, **finished())
    plan = study.plan()
    plan["explain"] = {TRIAL: {"prototypes": "prototypes-new"}}
    write_sealed(study.storage, "plan.json", {k: v for k, v in plan.items() if k != "checksum"}, ())
    for key in ("prototypes-old", "prototypes-new"):
        assert study.status().trials[0].explained == ()
        study.trial(TRIAL).write_json(f"explain/{key}/done.json", {})
    assert study.status().trials[0].explained == ("prototypes-new",)


@pytest.mark.parametrize(
    "event", [{"event": None}, {"time": "x"}, {"epoch": "x"}, {"epochs": []}, {"stage": 3}, {"val_accuracy": "x"}]
)
def test_odd_events_do_not_stop_a_status(tmp_path: Path, event: dict[str, Any]) -> None:
    study = study_with(tmp_path)
    study.trial(TRIAL).delete("result.json")
    study.trial(TRIAL).append_event("events", {"time": 1.0, "event": "started", "epoch": 0, "epochs": 5})
    study.trial(TRIAL).append_event("events", {"time": 2.0, "event": "epoch", "epoch": 1, "epochs": 5, **event})
    (trial,) = study.status().trials
    assert trial.state == "interrupted"


def with_plan(place: Path, change: bytes, to: bytes) -> Study:
    study = study_with(place, **finished())
    data = study.storage.read_bytes("plan.json")
    assert change in data
    study.storage.write_bytes("plan.json", data.replace(change, to))
    return study


@pytest.mark.parametrize(
    ("change", "to"), [(TRIAL.encode(), b"pneumonia-h1_061-seed0-3fa9c1"), (b'"format": 1', b'"format": null')]
)
def test_a_changed_plan_is_named(tmp_path: Path, change: bytes, to: bytes) -> None:
    study = with_plan(tmp_path, change, to)
    for ask in (study.status, study.require, study.trial_ids):
        with pytest.raises(StudyError, match=r"plan\.json: the file is damaged") as refusal:
            ask()
        assert "raystudy run EXPERIMENT" in str(refusal.value)


def test_a_newer_study_is_told_before_its_seal_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="newer raystudy"):
        with_plan(tmp_path, b'"format": 1', b'"format": 2').require()


def test_a_file_beside_the_trials_is_nobodys(tmp_path: Path) -> None:
    study = study_with(tmp_path, **finished())
    study.storage.write_bytes("trials/.DS_Store", b"")
    assert set(study.files()) == {TRIAL}
    assert [t.state for t in study.status().trials] == ["finished"]


def test_a_trial_of_an_earlier_driver_is_not_running(tmp_path: Path) -> None:
    study = study_with(tmp_path)
    study.trial(TRIAL).delete("result.json")
    event = {"time": 1.0, "event": "epoch", "stage": "joint", "epoch": 1, "epochs": 5}
    with locked(study.storage) as lock:
        for of, state in (("an earlier one", "interrupted"), (lock.token, "running")):
            study.trial(TRIAL).append_event("events", {**event, "driver": of})
            assert [t.state for t in study.status().trials] == [state]
    assert [t.state for t in study.status().trials] == ["interrupted"]
