"""A finished study of three trials, made once a session by the real driver; patients and films have telling names."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from raystudy.config import Experiment
from raystudy.storage import open_storage
from raystudy.study import Study
from tests.orchestrate import tiny

PATIENT, FILM = "canarypatient", "canaryfilm"  # in the name of every patient and film


@dataclass(frozen=True)
class TinyStudy:
    """Where the study's experiment file and directory are."""

    file: Path
    experiment: Experiment
    study: Study

    def copy(self, root: Path) -> Study:
        """Return the study in a place of its own."""
        shutil.copytree(self.study.storage.uri, root / "tiny", dirs_exist_ok=True)
        return Study.at(str(root), "tiny")


def plant_names(root: Path) -> None:
    """Give the films and patients of ``root`` names that would be recognised anywhere."""
    table = pd.read_csv(root / "table.csv")
    for name in table["file"]:
        (root / name).rename(root / "films" / f"{FILM}-{Path(name).name}")
    table["file"] = "films/" + FILM + "-" + table["file"].str.removeprefix("films/")
    table["patient"] = PATIENT + "-" + table["patient"]
    table.to_csv(root / "table.csv", index=False)


@pytest.fixture(scope="session")
def tiny_study(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> TinyStudy:
    """The study, run and reported."""
    from raystudy.orchestrate.driver import run_study  # here: every test session reads this file, few need torch
    from raystudy.orchestrate.plan import plan_study
    from raystudy.report.page import write_report

    root = tmp_path_factory.mktemp("tiny")
    plant_names(tiny.make_films(root))
    experiment = tiny.experiment(root, root / "studies")
    storage = open_storage(experiment.storage)
    outcome = run_study(plan_study(experiment, storage), storage, executor="plain")
    assert outcome.exit_code == 0, outcome
    study = Study(storage.child("tiny"))
    write_report(study)
    return TinyStudy(root / "experiment.yaml", experiment, study)
