"""Searches of tiny studies, and what tests do to their trials."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raystudy.orchestrate.assignment import STOPPED
from raystudy.orchestrate.driver import Executor, run_study
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.search import SearchBook, search_experiment, value_of
from raystudy.orchestrate.state import Outcome
from raystudy.results import write_sealed
from raystudy.storage import Storage, open_storage
from raystudy.study import Study
from tests.orchestrate import tiny, works

SPACE = {
    "training.lr_backbone": {"loguniform": [1e-5, 1e-1]},
    "training.coefficient_cluster": {"uniform": [0.4, 1.2]},
    "model.prototypes_per_class": {"choice": [1, 2]},
}
SEARCH = {"space": SPACE, "trials": 6, "algorithm": "random", "scheduler": "none", "mixtures": [50]}


def search(
    films: Path,
    storage: Path,
    overrides: list[str] | None = None,
    executor: Executor = "plain",
    only_failed: bool = False,
) -> Outcome:
    experiment = tiny.experiment(films, storage, overrides, search=SEARCH)
    root = open_storage(storage)
    plan = plan_study(search_experiment(experiment), root)
    return run_study(plan, root, executor=executor, only_failed=only_failed, work=works.learn)


def book(films: Path, storage: Path, overrides: list[str] | None = None) -> SearchBook:
    experiment = tiny.experiment(films, storage, overrides, search=SEARCH)
    root = open_storage(storage)
    found = SearchBook(Study(root.child("tiny")), experiment, plan_study(search_experiment(experiment), root))
    found.open()
    return found


def book_of(root: Storage, films: Path, overrides: list[str] | None = None, **more: Any) -> SearchBook:
    """Return the opened book of a search that differs by ``more``."""
    experiment = tiny.experiment(films, root.uri, overrides, search={**SEARCH, **more})
    found = SearchBook(Study(root.child("tiny")), experiment, plan_study(search_experiment(experiment), root))
    found.open()
    return found


def try_out(found: SearchBook, accuracies: Iterable[float]) -> None:
    """End the trials without a result, in the book's order, with these validation accuracies (percent)."""
    missing = [t for t in found.trials if value_of(found.study, t) is None]
    for trial_id, accuracy in zip(missing, accuracies, strict=True):
        result = {"status": "finished", "tests": {}, "selected": {"val_accuracy": accuracy}}
        found.study.trial(trial_id).write_json("result.json", result)
        found.observe(trial_id, value_of(found.study, trial_id))


def stop_early(found: SearchBook, trial_id: str, accuracy: float) -> None:
    write_sealed(found.study.trial(trial_id), STOPPED, {"epoch": 1, "value": accuracy, "by": "the search"}, ())
    found.observe(trial_id, value_of(found.study, trial_id))


def diverge(found: SearchBook, trial_id: str) -> None:
    found.study.trial(trial_id).write_json("result.json", {"status": "diverged", "tests": {}, "selected": None})
    found.observe(trial_id, value_of(found.study, trial_id))


def texts(storage: Path) -> dict[str, bytes]:
    return {p.name + p.parent.name: p.read_bytes() for p in (storage / "tiny" / "search").glob("*/*.json")}
