"""What `raystudy plan` promises about a study's size."""

import json
from pathlib import Path

import pytest

from raystudy.config import load_experiment
from raystudy.orchestrate import plan_text

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def cost(name: str, capsys: pytest.CaptureFixture[str], storage: Path, *overrides: str) -> dict[str, object]:
    experiment = load_experiment(EXPERIMENTS / name, [f"storage={storage}", "images.size=32", *overrides])
    plan_text.print_plan(experiment, as_json=True)
    return json.loads(capsys.readouterr().out)["cost"]


def test_a_search_is_planned_with_all_its_suggestions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    few = cost("search_example.yaml", capsys, tmp_path, "search.trials=2")
    many = cost("search_example.yaml", capsys, tmp_path, "search.trials=20")
    assert (few["trials"], many["trials"]) == (2, 20)
    assert float(str(many["bytes"])) > 5 * float(str(few["bytes"]))


def test_an_ablation_is_planned_with_every_combination(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cost("ablation_example.yaml", capsys, tmp_path)["trials"] == 2 * 2 * 2 * 2 * 2


def test_time_on_a_gpu_that_is_not_here_is_unknown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = cost("demo.yaml", capsys, tmp_path, "resources.gpus=0.25")
    assert found["seconds"] == "unknown"
    assert found["trials"] == 22
