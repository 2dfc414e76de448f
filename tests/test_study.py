"""What a study directory tells of its trials."""

from pathlib import Path
from typing import Any

import pytest

from raystudy.storage import open_storage
from raystudy.study import Study

TRIAL = "pneumonia-h1_060-seed0-3fa9c1"


def study_with(place: Path, **result: Any) -> Study:
    study = Study(open_storage(place))
    study.storage.write_json("plan.json", {"format": 1, "trials": [TRIAL]})
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
