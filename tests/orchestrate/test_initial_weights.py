"""A study whose networks have nothing to start from is refused before a film is decoded."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from raystudy.errors import StudyError
from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.initial_weights import check_initial_weights
from raystudy.orchestrate.plan import plan_study
from raystudy.protopnet.settings import ModelSettings
from raystudy.storage import open_storage
from tests.orchestrate import tiny


def refuse(films: Path, storage: Path, weights: str) -> str:
    root = open_storage(storage)
    plan = plan_study(tiny.experiment(films, storage, [f"model.weights={weights}"]), root)
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
