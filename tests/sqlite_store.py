"""An MLflow store in a SQLite file of the test's own, and a mirror that fills a store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from raystudy.config import Tracking
from raystudy.mirror import Mirror
from raystudy.study import Study


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new SQLite store whose tables are there (making them takes seconds)."""
    file = tmp_path_factory.mktemp("store") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def sqlite(tmp_path: Path, empty_store: Path) -> Tracking:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Tracking(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")


def mirror_all(study: Study, settings: Tracking, *, at_rest: bool = True) -> None:
    mirror = Mirror(study, settings)
    mirror.start()
    assert mirror.close(at_rest=at_rest)
