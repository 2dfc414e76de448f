"""What the fault tests share: an undisturbed study, a place of its own for every fault, and counts at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from raystudy.config import Experiment, load_experiment
from tests.counts import COUNT
from tests.orchestrate import tiny
from tests.tiny_study import TinyStudy

Tally = Callable[[str], None]


@dataclass(frozen=True)
class Undisturbed:
    """A study that nothing happened to, and its bytes."""

    file: Path
    root: Path  # where studies live
    bytes: dict[str, bytes]

    def place(self, root: Path, *, finished: bool = False) -> Path:
        """Return a storage of its own with the decoded films, and with the finished study when wanted."""
        for name in ("_images", *(["tiny"] if finished else [])):
            shutil.copytree(self.root / name, root / name)
        return root

    def assert_same(self, storage: Path | str, n_trials: int = 3) -> None:
        """Assert that a study has so many of the trials, each with every byte of its results and explanations."""
        found = tiny.result_bytes(storage)
        trials = {name.split("/")[1] for name in found}
        assert len(trials) == n_trials
        assert found == {name: data for name, data in self.bytes.items() if name.split("/")[1] in trials}

    def experiment(self, storage: Path | str, overrides: list[str] | None = None) -> Experiment:
        return load_experiment(self.file, [*(overrides or []), f"storage={storage}"])


@pytest.fixture(scope="session")
def undisturbed(tiny_study: TinyStudy) -> Undisturbed:
    root = tiny_study.file.parent / "studies"
    return Undisturbed(tiny_study.file, root, tiny.result_bytes(root))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Says what a test did; all of it is printed at the end."""
    return lambda line: request.node.user_properties.append((COUNT, f"{request.node.name}: {line}"))
