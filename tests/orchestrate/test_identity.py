"""A trial's id names its folder: readable, unique, and never longer than the name of a folder may be."""

from pathlib import Path
from typing import Any

from raystudy.orchestrate.identity import trial_id
from raystudy.storage import open_storage
from tests.orchestrate.searches import book_of

TWELVE = {
    "training.lr_backbone": [1e-5, 1e-3],
    "training.lr_add_on": [1e-4, 1e-2],
    "training.lr_prototypes": [1e-4, 1e-2],
    "training.lr_warm_add_on": [1e-4, 1e-2],
    "training.lr_warm_prototypes": [1e-4, 1e-2],
    "training.lr_last_layer": [1e-5, 1e-3],
    "training.weight_decay": [1e-4, 1e-2],
    "training.step_gamma": [0.1, 0.9],
    "training.coefficient_cross_entropy": [0.5, 1.5],
    "training.coefficient_cluster": [0.5, 1.5],
    "training.coefficient_separation": [-0.2, -0.1],
    "training.coefficient_l1": [1e-5, 1e-3],
}


def weights_id(path: str, **identity: Any) -> str:
    return trial_id("pneumonia", 60, 1, 0, {"model.weights": path}, identity)


def test_a_search_of_twelve_keys_has_unique_ids_that_a_folder_can_have(films: Path, tmp_path: Path) -> None:
    space = {key: {"uniform": bounds} for key, bounds in TWELVE.items()}
    found = book_of(open_storage(tmp_path), films, ["seeds=[0, 1]"], space=space)
    while found.suggest() is not None:
        pass
    assert len(found.trials) == 2 * 6
    for name, trial in found.trials.items():
        assert len(name.encode()) <= 200
        assert name.startswith("pneumonia-h1_050-coefficient_cluster_")
        assert f"-seed{trial.spec.seed}-" in name
        found.study.trial(name).write_json("spec.json", {})


def test_ids_that_differ_only_in_what_is_cut_away_are_unique() -> None:
    beginning = "/films/" + "ü" * 200
    names = [weights_id(f"{beginning}/{end}") for end in ("a", "b")]  # two files of the same content
    names += [weights_id(f"{beginning}/a", rows="others")]
    assert len(set(names)) == 3
    assert all(name.startswith("pneumonia-h1_060-weights__films_ü") for name in names)
    assert all(len(name.encode()) <= 200 and "-seed1-" in name for name in names)
    assert weights_id(f"{beginning}/a") == names[0]


def test_an_id_that_fits_is_as_it_always_was() -> None:
    assert weights_id("imagenet") == "pneumonia-h1_060-weights_imagenet-seed1-44136f"
    fits = 255 - len("pneumonia-h1_060-weights_-seed1-44136f")
    assert weights_id("w" * fits) == f"pneumonia-h1_060-weights_{'w' * fits}-seed1-44136f"
    assert len(weights_id("w" * (fits + 1))) <= 200
