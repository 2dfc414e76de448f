"""Films that are decoded once for all tests of this room."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from raystudy.orchestrate.films import prepare_films
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.progress import Silent
from raystudy.storage import open_storage
from tests.orchestrate import tiny
from tests.orchestrate.private_space import space  # noqa: F401


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of originals with their table."""
    return tiny.make_films(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="session")
def image_store(films: Path, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Path:
    root = tmp_path_factory.mktemp("store")
    storage = open_storage(root)
    plan = plan_study(tiny.experiment(films, root), storage)
    prepare_films(plan.trials, plan.image_table, storage, Silent())
    return root / "_images"


@pytest.fixture
def place(image_store: Path, tmp_path: Path) -> Path:
    """A storage of its own that holds the decoded films; Ray is connected."""
    shutil.copytree(image_store, tmp_path / "studies" / "_images")
    return tmp_path / "studies"


@pytest.fixture(scope="session")
def plain(films: Path, image_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the study leaves when one trial follows the other in one process."""
    storage = tmp_path_factory.mktemp("plain")
    shutil.copytree(image_store, storage / "_images")
    outcome = tiny.run(films, storage, executor="plain")
    assert (outcome.trained, outcome.explained, outcome.exit_code) == (3, 6, 0)
    return tiny.result_bytes(storage)
