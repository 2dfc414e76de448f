from pathlib import Path

import pytest

from raystudy.orchestrate.changes import describe_changes
from raystudy.orchestrate.ledger import Ledger
from raystudy.orchestrate.plan import plan_study
from raystudy.storage import open_storage
from raystudy.study import Study
from tests.orchestrate import tiny


def plan_again(films: Path, storage: Path, *overrides: str) -> list[str]:
    """Plan a study and write its specs as a run does; return what was told before."""
    root = open_storage(storage)
    plan = plan_study(tiny.experiment(films, storage, list(overrides)), root)
    ledger = Ledger(Study(root.child("tiny")), plan)
    ledger.open()
    told = describe_changes(ledger, ledger.missing_trials())
    ledger.write_plan()
    ledger.prepare_trials(plan.trials)
    return told


def test_a_first_run_and_a_run_that_goes_on_have_nothing_to_tell(films: Path, tmp_path: Path) -> None:
    assert plan_again(films, tmp_path) == []
    assert plan_again(films, tmp_path) == []


def test_a_changed_key_is_one_line_with_old_and_new_value_and_the_number_of_trials(films: Path, tmp_path: Path) -> None:
    plan_again(films, tmp_path)
    assert plan_again(films, tmp_path, "training.epochs=4", "images.size=64") == [
        "3 trials run anew and the earlier ones are kept, because these changed:",
        "  image_size: 32 → 64  (3 trials)",
        "  training.epochs: 2 → 4  (3 trials)",
    ]


def test_a_study_that_was_changed_twice_is_compared_with_what_differs_least(films: Path, tmp_path: Path) -> None:
    plan_again(films, tmp_path)
    plan_again(films, tmp_path, "training.epochs=4", "model.prototypes_per_class=3")
    told = plan_again(films, tmp_path, "training.epochs=4", "model.prototypes_per_class=4")
    assert told[1:] == ["  model.prototypes_per_class: 3 → 4  (3 trials)"]


def test_changed_data_are_told_once_with_the_key_that_changed_them(films: Path, tmp_path: Path) -> None:
    plan_again(films, tmp_path)
    assert plan_again(films, tmp_path, "cohort.train=10")[1:] == [
        "  who is in the mixtures or the tests  (3 trials)",
        "  cohort.train: 12 → 10",
    ]


def test_a_decode_setting_that_no_spec_names_is_told(films: Path, tmp_path: Path) -> None:
    plan_again(films, tmp_path)
    assert plan_again(films, tmp_path, "images.resize=letterbox", "images.pixel_cap=1000000")[1:] == [
        "  images.resize: squash → letterbox"
    ]


def test_a_weights_file_with_another_content_is_named(films: Path, tmp_path: Path) -> None:
    """Of two files that an axis names one is written anew."""
    kept, changed = (tmp_path / f"{name}.safetensors" for name in ("kept", "changed"))
    axes = f"axes={{model.weights: [none, {kept}, {changed}]}}"
    for file in (kept, changed):
        file.write_bytes(b"weights")
    plan_again(films, tmp_path, axes)
    changed.write_bytes(b"others")
    told = ["3 trials run anew and the earlier ones are kept, because these changed:"]
    told.append(f"  model.weights: what {changed} holds  (3 trials)")
    assert plan_again(films, tmp_path, axes) == told


def test_a_change_that_no_file_shows_is_told_as_one(films: Path, tmp_path: Path) -> None:
    """As of a decode setting whose earlier value the torn experiment file no longer tells."""
    plan_again(films, tmp_path)
    (tmp_path / "tiny" / "experiment.yaml").write_text("a: [")
    assert plan_again(films, tmp_path, "images.resize=letterbox")[1:] == [
        "  something that the earlier files do not tell  (3 trials)"
    ]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seeds=[0, 1, 2]", ["6 trials more: seed 1, 2"]),
        ("mixtures=[0, 100]", ["1 trial not asked for any more, kept: h1_share 50"]),
        ("mixtures=[0, 40, 100]", ["1 trial more: h1_share 40", "1 trial not asked for any more, kept: h1_share 50"]),
        (
            "axes={training.batch_size: [6, 12]}",
            ["6 trials more: training.batch_size 6, 12", "3 trials not asked for any more, kept"],
        ),
    ],
)
def test_what_is_new_and_what_is_left_out_is_told_by_its_coordinates(
    films: Path, tmp_path: Path, override: str, told: list[str]
) -> None:
    plan_again(films, tmp_path)
    assert plan_again(films, tmp_path, override) == told


def test_damaged_files_of_an_earlier_run_are_no_obstacle(films: Path, tmp_path: Path) -> None:
    plan_again(films, tmp_path)
    spec = next((tmp_path / "tiny" / "trials").glob("pneumonia-h1_100*/spec.json"))
    spec.write_text("{")
    (tmp_path / "tiny" / "experiment.yaml").write_text("a: [")
    told = plan_again(films, tmp_path, "cohort.train=10")
    assert told == [
        "2 trials run anew and the earlier ones are kept, because these changed:",
        "  who is in the mixtures or the tests  (2 trials)",
        "1 trial more: h1_share 100",
        "1 trial not asked for any more, kept",
    ]
