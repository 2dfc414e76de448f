"""What `raystudy plan` promises about a study's size."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from raystudy.cli import app
from raystudy.config import Experiment, load_experiment
from raystudy.errors import StudyError
from raystudy.orchestrate import plan_text
from raystudy.orchestrate.cost import Cost
from tests.cohorts.hospitals import COLUMNS, films_of, shared

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


UNMEASURED = "resources.gpus=0.25"  # there is no GPU in these tests


def cost(name: str, capsys: pytest.CaptureFixture[str], storage: Path, *overrides: str) -> dict[str, object]:
    experiment = load_experiment(EXPERIMENTS / name, [f"storage={storage}", "images.size=32", *overrides])
    plan_text.print_plan(experiment, as_json=True)
    return json.loads(capsys.readouterr().out)["cost"]


def test_a_search_is_planned_with_all_its_suggestions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    few = cost("search_example.yaml", capsys, tmp_path, "search.trials=2", UNMEASURED)
    many = cost("search_example.yaml", capsys, tmp_path, "search.trials=20", UNMEASURED)
    assert (few["trials"], many["trials"]) == (2, 20)
    assert float(str(many["bytes"])) > 5 * float(str(few["bytes"]))


def test_an_ablation_is_planned_with_every_combination(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cost("ablation_example.yaml", capsys, tmp_path, UNMEASURED)["trials"] == 2 * 2 * 2 * 2 * 2


def test_time_on_a_gpu_that_is_not_here_is_unknown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = cost("demo.yaml", capsys, tmp_path, UNMEASURED)
    assert found["seconds"] == "unknown"
    assert found["trials"] == 22


def test_the_study_of_real_films_has_its_22_trials_and_all_its_cells(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folders = [f"sources.{source}.root={shared('data', 'xray')}" for source in ("H1", "H2")]
    experiment = load_experiment(
        EXPERIMENTS / "xray_sample.yaml", [f"storage={tmp_path}", "resources.gpus=1", *folders]
    )
    found = json.loads(printed(experiment, capsys, as_json=True))
    assert found["cost"]["trials"] == 22
    assert found["patients_in_two_splits"] == 0
    assert all(cell["have"] >= cell["need"] > 0 for cell in found["cells"])


def two_hospitals(root: Path, **changes: Any) -> Experiment:
    """An experiment of two manifests whose trials ask for a GPU, so that no time is measured."""
    for name in ("a", "b"):
        films_of(name, 60).to_csv(root / f"{name}.csv", index=False)
    tree = {
        "name": "two",
        "storage": str(root / "studies"),
        "sources": {
            source: {"kind": "manifest", "root": str(root), "table": f"{table}.csv", "columns": COLUMNS}
            for source, table in (("H1", "a"), ("H2", "b"))
        },
        "tasks": {"pneumonia": {}},
        "mixtures": [0, 50, 100],
        "resources": {"gpus": 1.0},
    }
    (root / "two.yaml").write_text(yaml.safe_dump({**tree, **changes}))
    return load_experiment(root / "two.yaml")


def printed(experiment: Experiment, capsys: pytest.CaptureFixture[str], as_json: bool = False) -> str:
    plan_text.print_plan(experiment, as_json)
    return capsys.readouterr().out


def cells(text: str) -> list[list[str]]:
    """Return the cells of every table row of a printed plan."""
    return [[c.strip() for c in line.strip("│ ").split("│")] for line in text.splitlines() if line.startswith("│")]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_every_cell_of_every_split_is_printed_with_images_and_patients(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    experiment = two_hospitals(tmp_path)
    text, found = printed(experiment, capsys), json.loads(printed(experiment, capsys, as_json=True))
    rows = {(row[0], row[1]): row[2:] for row in cells(text) if len(row) == 6}
    asked = [("0H1-100H2", 0, ""), ("50H1-50H2", 50, ""), ("100H1-0H2", 100, "")]
    wanted = [(name, share, split, test) for name, share, test in asked for split in ("train", "val")]
    wanted += [(name, -1, "test", name) for name in ("Test-100H1", "Test-100H2", "Test-50-50")]
    for name, share, split, test in wanted:
        for place, (source, label) in enumerate((s, c) for s in ("H1", "H2") for c in ("positive", "negative")):
            (count,) = [
                c
                for c in found["counts"]
                if (c["h1_share"], c["split"], c["test_set"], c["source"], c["class"])
                == (share, split, test, source, label)
            ]
            shown = rows[name, split][place]
            assert shown == (f"{count['images']} ({count['patients']})" if count["images"] else "0")
    have = {(c["split"], c["source"], c["label"]): c["have"] for c in found["cells"]}
    assert rows["available", "train"] == [str(have["train", s, k]) for s in ("H1", "H2") for k in (1, 0)]
    assert "…" not in text


def test_a_narrow_pipe_cuts_nothing_off(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    text = printed(two_hospitals(tmp_path), capsys)
    assert "…" not in text
    assert "positive_patients_as_negatives" in text
    assert "50H1-50H2" in text


def test_each_cohort_seed_and_each_cohort_of_an_ablation_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    experiment = two_hospitals(
        tmp_path,
        cohort_seeds=[0, 7],
        axes={"cohort.train": [5, 10], "cohort.nesting": ["prefix"], "model.prototype_dim": [8, 16]},
    )
    text, found = printed(experiment, capsys), json.loads(printed(experiment, capsys, as_json=True))
    titles = re.findall(r"^pneumonia.*: images \(patients\) *$", text, re.MULTILINE)
    assert len(titles) == len(set(titles)) == 4
    assert any("cohort seed 7" in t and "cohort.train 10" in t for t in titles)
    assert "2 cohort seeds" in text
    assert len(found["trials"]) == found["cost"]["trials"] == 2 * 3 * 2 * 2
    sizes = {(c["axis.cohort.train"], c["cohort_seed"]): c["images"] for c in found["counts"] if c["h1_share"] == 0}
    assert set(sizes) == {(5, 0), (5, 7), (10, 0), (10, 7)}
    train = [
        c
        for c in found["counts"]
        if (c["split"], c["h1_share"], c["source"], c["class"]) == ("train", 100, "H1", "positive")
    ]
    assert sorted(c["images"] for c in train) == [5, 5, 10, 10]
    assert len(found["test_sets"]) == 3 * 4
    assert found["patients_in_two_splits"] == 0


def test_half_widths_are_normal_exact_and_by_patient(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    experiment = two_hospitals(tmp_path, cohort={"test": 8})
    text, found = printed(experiment, capsys), json.loads(printed(experiment, capsys, as_json=True))
    assert {t["images"] for t in found["test_sets"]} == {16}
    # Clopper-Pearson for 8 of 16, from published tables: 24.65 % to 75.35 %.
    assert {round(t["half_width_exact"], 2) for t in found["test_sets"]} == {25.35}
    assert "±24.5 points (exact binomial ±25.3" in text


def test_a_storage_that_is_still_to_be_filled_in_is_a_warning_of_the_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = printed(two_hospitals(tmp_path, storage="s3://YOUR-BUCKET/raystudy"), capsys)
    assert "warning: s3://YOUR-BUCKET/raystudy: 'YOUR-BUCKET' is not a bucket's name" in text
    phantoms = load_experiment(EXPERIMENTS / "demo.yaml", ["storage=s3://YOUR-BUCKET/raystudy"])
    with pytest.raises(StudyError, match="YOUR-BUCKET"):
        plan_text.print_plan(phantoms, as_json=False)


def test_decimals_of_a_checked_accuracy_are_those_that_were_typed() -> None:
    for percent, word in (("63.80", "not attainable"), ("63.8", "is attainable"), ("63.79", "is attainable")):
        shown = CliRunner().invoke(app, ["plan", "--check", percent, "--n", "290"])
        assert shown.exit_code == 0
        assert f"{percent} % {word if word.startswith('is') else 'is ' + word} at n = 290" in shown.output
    assert (
        json.loads(CliRunner().invoke(app, ["plan", "--check", "63.80", "--n", "290", "--json"]).output)["percent"]
        == "63.80"
    )


def test_a_rate_that_blows_the_network_up_is_planned_like_any_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rates = [f"training.lr_{name}=1e30" for name in ("backbone", "add_on", "prototypes")]
    assert cost("demo.yaml", capsys, tmp_path, "training.coefficient_cluster=1e30", *rates)["seconds"] != "unknown"


@pytest.mark.parametrize(
    ("size", "layers", "cells"), [(64, 4, "2 × 2"), (97, 4, None), (32, 3, "2 × 2"), (32, 2, None)]
)
def test_a_grid_too_coarse_to_explain_is_a_warning(size: int, layers: int, cells: str | None, tmp_path: Path) -> None:
    experiment = two_hospitals(tmp_path, images={"size": size}, model={"backbone_layers": layers})
    found = " ".join(plan_text.warnings_of(experiment, Cost(1, 1000, 1, None, None)))
    assert ("feature grid has" in found) == (cells is not None)
    assert cells is None or f"grid has {cells} cells" in found
