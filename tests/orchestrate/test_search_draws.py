"""What a search tries: values of its space, valid together, and drawn to what was good."""

from pathlib import Path
from typing import Any

import pytest

from raystudy.config import SearchRange
from raystudy.errors import StudyError
from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.search import SearchBook, Suggestion, search_experiment
from raystudy.orchestrate.search_draws import Known, optuna_draws
from raystudy.results import write_sealed
from raystudy.storage import open_storage
from raystudy.study import Study
from tests.orchestrate import tiny, works
from tests.orchestrate.searches import SEARCH, book, book_of, stop_early, try_out


def test_optuna_is_drawn_away_from_what_diverged(films: Path, tmp_path: Path) -> None:
    """The same values, once diverged and once stopped early: the first are the worse ones for the sampler."""
    space = {"training.lr_backbone": SearchRange.model_validate_json('{"uniform": [0.1, 0.9]}')}
    high = [Known({"training.lr_backbone": 0.85 + n / 1000}, 0.0, "diverged") for n in range(6)]
    low = [Known({"training.lr_backbone": 0.1 + n / 100}, 60.0 + n, "stopped") for n in range(20)]
    drawn = [next(optuna_draws(space, seed, 26, [*high, *low])) for seed in range(10)]
    assert sum(values["training.lr_backbone"] for values in drawn) / len(drawn) < 0.5


def test_optuna_is_not_drawn_to_what_was_stopped_early(films: Path, tmp_path: Path) -> None:
    asked = ["search.trials=14", "search.algorithm=optuna"]
    after: list[list[Suggestion | None]] = []
    for reached in (99.0, 1.0):
        found = book(films, tmp_path / str(reached), asked)
        for n in range(12):  # TPE begins after ten
            found.suggest()
            trial_id = list(found.trials)[n]
            if n == 3:
                stop_early(found, trial_id, reached)
            else:
                try_out(found, [50.0 + n])
        after.append([found.suggest(), found.suggest()])
    assert after[0] == after[1]


TOGETHER = {"training.epochs": {"choice": [2, 8]}, "training.warm_epochs": {"choice": [0, 6]}}
LONGER = ["training.epochs=8", "training.warm_epochs=0"]


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_values_that_are_not_valid_together_are_drawn_again_and_the_same_after_an_interruption(
    algorithm: str, films: Path, tmp_path: Path
) -> None:
    told: list[list[dict[str, Any]]] = []
    for run, stops in enumerate(([20], [1, 11, 12, 20])):
        root = open_storage(tmp_path / str(run))
        for trials in stops:
            found = book_of(root, films, LONGER, space=TOGETHER, trials=trials, algorithm=algorithm)
            while (suggestion := found.suggest()) is not None:
                # the best has few epochs, the next many warm ones: TPE is drawn to both, one by one
                accuracy = {(2, 0): 90.0, (8, 6): 80.0}.get(tuple(suggestion.values.values()), 20.0)
                try_out(found, [accuracy] * len(found.planned(suggestion)))
        told.append([s.values for s in book_of(root, films, LONGER, space=TOGETHER, algorithm=algorithm).suggestions])
    assert told[0] == told[1]
    assert {tuple(values.values()) for values in told[0]} == {(2, 0), (8, 0), (8, 6)}


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_space_without_any_valid_experiment_is_refused_before_anything_starts(
    algorithm: str, films: Path, tmp_path: Path
) -> None:
    space = {"training.epochs": {"choice": [2]}, "training.warm_epochs": {"choice": [6]}}
    search = {**SEARCH, "space": space, "algorithm": algorithm}
    root = open_storage(tmp_path)
    plan = plan_study(search_experiment(tiny.experiment(films, tmp_path, LONGER, search=search)), root)
    with pytest.raises(StudyError, match=r"must lie in 0\.\.epochs = 2, got 6") as caught:
        run_study(plan, root, work=works.learn, executor="plain")
    assert caught.value.where == "search.space"
    assert not root.list("tiny")
    run_study(plan, root, work=works.learn, executor="plain", only_failed=True)  # asks for nothing new


def test_values_stay_in_their_ranges(films: Path, tmp_path: Path) -> None:
    found = book(films, tmp_path, ["search.trials=40"])
    while found.suggest() is not None:
        pass
    rates = [s.values["training.lr_backbone"] for s in found.suggestions]
    assert all(1e-5 <= r <= 1e-1 for r in rates)
    assert sum(r < 1e-3 for r in rates) in range(10, 31)  # loguniform: half of the draws, 20 +- 3 deviations
    assert {s.values["model.prototypes_per_class"] for s in found.suggestions} == {1, 2}
    assert all(0.4 <= s.values["training.coefficient_cluster"] <= 1.2 for s in found.suggestions)


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
@pytest.mark.parametrize(
    ("key", "narrowed", "outside"),
    [
        ("training.lr_backbone", {"loguniform": [1e-4, 1e-3]}, {0.01, 0.05}),
        ("model.prototypes_per_class", {"choice": [2, 3]}, {1}),
        ("training.lr_backbone", {"choice": [0.01, 0.3]}, {0.0005, 0.0002, 0.05}),
    ],
)
def test_a_narrower_space_keeps_the_trials_and_forgets_the_values_outside_it(
    algorithm: str, key: str, narrowed: dict[str, list[float]], outside: set[float], films: Path, tmp_path: Path
) -> None:
    space = {"training.lr_backbone": {"loguniform": [1e-5, 1e-1]}, "model.prototypes_per_class": {"choice": [1, 2]}}
    told = {**SEARCH, "algorithm": algorithm}
    root = open_storage(tmp_path / "studies")
    base = plan_study(search_experiment(tiny.experiment(films, root.uri, search={**told, "space": space})), root)
    study = Study(root.child("tiny"))
    for number, (rate, prototypes) in enumerate([(0.01, 2), (0.0005, 1), (0.0002, 2), (0.05, 2)]):
        values = {"training.lr_backbone": rate, "model.prototypes_per_class": prototypes}
        note = {"number": number, "values": values}
        write_sealed(study.storage, f"search/suggestions/{number:06d}.json", note, ())
    wide = SearchBook(study, tiny.experiment(films, root.uri, search={**told, "space": space}), base)
    wide.open()
    try_out(wide, [50.0, 51.0, 52.0, 53.0])
    assert wide.left_out() is None
    narrow = {**told, "space": {**space, key: narrowed}}
    found = SearchBook(study, tiny.experiment(films, root.uri, search=narrow), base)
    found.open()
    gone = sum(s.values[key] in outside for s in found.suggestions)
    assert f"{gone} of 4 suggestions are outside search.space" in (found.left_out() or "")
    more = [found.suggest(), found.suggest()]
    assert all(s is not None and found.holds(s) for s in more)
    assert len(found.trials) == len({tuple(s.values.values()) for s in found.suggestions})
    assert found.observed == wide.observed


def test_a_value_that_was_rounded_over_a_bound_is_still_of_its_space(films: Path, tmp_path: Path) -> None:
    space = {"training.lr_backbone": {"uniform": [0.00123449, 0.00123451]}}  # every draw is rounded out of it
    told = {**SEARCH, "space": space, "algorithm": "optuna", "trials": 3}
    experiment, root = tiny.experiment(films, tmp_path, search=told), open_storage(tmp_path)
    found = SearchBook(Study(root.child("tiny")), experiment, plan_study(search_experiment(experiment), root))
    found.open()
    for objective in (50.0, 60.0):
        suggestion = found.suggest()
        assert suggestion is not None
        found.observed[suggestion.number], found.ended[suggestion.number] = objective, "finished"
    assert found.suggest() is not None
    assert found.left_out() is None


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_choice_is_tried_as_it_was_listed(algorithm: str, films: Path, tmp_path: Path) -> None:
    listed = [0.00123456, 0.00765432]
    space = {"training.lr_backbone": {"choice": listed}, "training.epochs": {"choice": [4.0, 2]}}
    found = book_of(open_storage(tmp_path), films, space=space, algorithm=algorithm, trials=12)
    while found.suggest() is not None:
        pass
    found = book_of(open_storage(tmp_path), films, space=space, algorithm=algorithm, trials=12)
    assert found.left_out() is None
    assert {t.spec.training.lr_backbone for t in found.trials.values()} == set(listed)
