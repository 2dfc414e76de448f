"""A study whose networks have nothing to start from is refused before a film is decoded."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from raystudy.config import Search
from raystudy.errors import StudyError
from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.initial_weights import check_initial_weights, searched_models
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.search import search_experiment
from raystudy.protopnet.model import ProtoPNet
from raystudy.protopnet.settings import ModelSettings
from raystudy.storage import open_storage
from tests.orchestrate import tiny


def refuse(films: Path, storage: Path, weights: str, **more: object) -> str:
    root = open_storage(storage)
    experiment = tiny.experiment(films, storage, [f"model.weights={weights}"], **more)
    plan = plan_study(search_experiment(experiment) if experiment.search else experiment, root)
    with pytest.raises(StudyError) as caught:
        run_study(plan, root)
    assert not [p for p in storage.rglob("*") if p.is_file() and p.name != "lock.json"]
    return str(caught.value)


def test_imagenet_weights_that_are_not_here_are_refused_with_the_way_to_fetch_them(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert "fetch it once on this machine" in refuse(films, tmp_path / "studies", "imagenet")
    check_initial_weights([ModelSettings()], local=False)  # the workers of a cluster have their own


def test_weights_of_another_network_are_refused_by_what_they_lack(films: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"conv1.weight": torch.zeros(2)}, file)
    assert "weights of another network: the file lacks bn1.bias" in refuse(films, tmp_path / "studies", str(file))


def test_weights_that_a_search_could_choose_are_refused_before_its_first_trial(films: Path, tmp_path: Path) -> None:
    space = {"model.weights": {"choice": ["none", str(tmp_path / "nowhere.safetensors")]}}
    search = {"space": space, "trials": 6, "algorithm": "random", "mixtures": [50]}
    refused = refuse(films, tmp_path / "studies", "none", search=search)
    assert "nowhere.safetensors: the weights cannot be read: No such file" in refused


def test_weights_that_do_not_fit_every_searched_network_are_named_with_the_values(films: Path, tmp_path: Path) -> None:
    file = tmp_path / "r18.safetensors"
    safetensors.torch.save_file(ProtoPNet.from_settings(ModelSettings(backbone="resnet18")).backbone.state_dict(), file)
    space = {"model.weights": {"choice": ["none", str(file)]}, "model.backbone": {"choice": ["resnet18", "resnet34"]}}
    search = {"space": space, "trials": 6, "algorithm": "random", "mixtures": [50]}
    refused = refuse(films, tmp_path / "studies", "none", search=search)
    assert refused.startswith("search.space: ")
    assert "weights of another network" in refused
    assert f"with model.weights = {file}, model.backbone = resnet34" in refused


def test_a_search_asks_for_every_combination_of_weights_and_backbones_and_for_nothing_else() -> None:
    space = {
        "model.weights": {"choice": ["none", "w.safetensors"]},
        "model.backbone": {"choice": ["resnet18", "resnet34"]},
        "model.prototype_dim": {"choice": [8, 16]},
        "training.lr_backbone": {"uniform": [0.1, 0.2]},
    }
    base = ModelSettings(weights="imagenet")  # no trial of the search has it
    found = searched_models([base, base], Search.model_validate_json(json.dumps({"space": space, "trials": 2})))
    assert [(model.weights, model.backbone) for model in found] == [
        ("none", "resnet18"), ("none", "resnet34"), ("w.safetensors", "resnet18"), ("w.safetensors", "resnet34")
    ]  # fmt: skip
    unsearched = Search.model_validate_json('{"space": {"training.epochs": {"choice": [2, 3]}}, "trials": 2}')
    assert searched_models([base], unsearched) == [base]
