import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from raystudy.errors import StudyError
from raystudy.orchestrate.assignment import STOPPED
from raystudy.orchestrate.driver import Executor, run_study
from raystudy.orchestrate.ledger import Ledger
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.progress import Silent
from raystudy.orchestrate.search import Halving, SearchBook, search_experiment
from raystudy.results import read_sealed, write_sealed
from raystudy.storage import open_storage
from raystudy.study import Study, read_mark
from tests.orchestrate import tiny, works
from tests.orchestrate.searches import SEARCH, SPACE, book, book_of, diverge, search, stop_early, texts, try_out


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_an_interrupted_search_suggests_what_an_uninterrupted_one_does(
    algorithm: str, films: Path, place: Path
) -> None:
    more = [f"search.algorithm={algorithm}"]
    assert search(films, place, more).trained == 6
    whole = texts(place)
    assert len(whole) == 12
    assert search(films, place, more).trained == 0
    shutil.rmtree(place / "tiny")
    for trials in (1, 4, 6):  # as if it had been stopped after so many
        search(films, place, [*more, f"search.trials={trials}"])
    assert texts(place) == whole


@pytest.mark.parametrize("executor", ["plain", "ray"])
def test_values_that_are_suggested_again_are_trained_once_and_observed_each_time(
    executor: str, films: Path, place: Path
) -> None:
    space = {"model.prototypes_per_class": {"choice": [1, 2]}}
    experiment = tiny.experiment(films, place, search={**SEARCH, "space": space, "trials": 5})
    root = open_storage(place)
    plan = plan_study(search_experiment(experiment), root)
    outcome = run_study(plan, root, executor=executor, work=works.learn)
    found = SearchBook(Study(root.child("tiny")), experiment, plan)
    found.open()
    values = [s.values["model.prototypes_per_class"] for s in found.suggestions]
    assert len(values) == 5
    assert outcome.trained == len(found.trials) == len(set(values))
    events = {t: found.study.trial(t).read_events("events") for t in found.trials}
    assert all([e["epoch"] for e in of_one].count(1) == 1 for of_one in events.values())
    by_value = {
        v: {found.observed[s.number] for s in found.suggestions if s.values == {"model.prototypes_per_class": v}}
        for v in set(values)
    }
    assert set(found.observed) == set(range(5))
    assert all(len(objectives) == 1 for objectives in by_value.values())


def test_the_best_suggestion_is_the_one_with_the_best_validation_accuracy(films: Path, place: Path) -> None:
    search(films, place)
    found = book(films, place)
    best = found.best()
    assert best is not None
    distances = [abs(math.log10(s.values["training.lr_backbone"]) + 3) for s in found.suggestions]
    assert best[0].number == distances.index(min(distances))
    assert "training.lr_backbone = " in found.verdict()
    trial = next(iter(found.trials.values()))
    assert set(trial.spec.axes) == set(SPACE)
    assert trial.spec.training.lr_backbone == trial.spec.axes["training.lr_backbone"]


def test_the_best_suggestion_is_one_that_was_trained_to_its_end(films: Path, tmp_path: Path) -> None:
    asked = ["search.trials=4", "seeds=[0, 1]"]
    found = book(films, tmp_path, asked)
    while found.suggest() is not None:
        pass
    trials = list(found.trials)
    stop_early(found, trials[2], 99.0)
    assert found.best() is None
    stop_early(found, trials[3], 97.0)
    best = found.best()
    assert best is not None
    assert (best[0].number, best[1]) == (1, 98.0)
    stop_early(found, trials[5], 90.0)
    try_out(found, [70.0, 80.0, 95.0, 60.0, 74.0])  # of suggestion 0, one seed of 2, and 3
    again = book(films, tmp_path, asked)
    for known in (found, again):
        best = known.best()
        assert best is not None
        assert (best[0].number, best[1]) == (0, 75.0)
        assert known.observed == {0: 75.0, 1: 98.0, 2: 92.5, 3: 67.0}
        assert known.ended == {0: "finished", 1: "stopped", 2: "stopped", 3: "finished"}
        assert known.verdict().startswith("best of 4 (2 stopped early): 75.0 %")
    storage = found.study.storage
    kept = {n: read_sealed(storage, f"search/observations/{n:06d}.json") or {} for n in range(4)}
    assert {n: note["ended"] for n, note in kept.items()} == found.ended
    for n, note in kept.items():  # as an earlier raystudy wrote them
        old = {key: note[key] for key in ("number", "objective", "trials")}
        write_sealed(storage, f"search/observations/{n:06d}.json", old, ())
    earlier = book(films, tmp_path, asked)
    assert (earlier.observed, earlier.ended) == (found.observed, found.ended)
    found.study.trial(trials[5]).delete(STOPPED)  # then nothing tells how it ended
    assert set(book(films, tmp_path, asked).observed) == {0, 1, 3}


def test_a_suggestion_that_diverged_ranks_behind_all_that_have_an_accuracy(films: Path, tmp_path: Path) -> None:
    asked = ["search.trials=3"]
    found = book(films, tmp_path, asked)
    while found.suggest() is not None:
        pass
    first, *others = found.trials
    diverge(found, first)
    assert found.verdict().startswith("best of 1 (1 diverged): 0.0 %")
    for trial_id, reached in zip(others, (88.0, 91.0), strict=True):
        stop_early(found, trial_id, reached)
    for known in (found, book(films, tmp_path, asked)):
        assert known.verdict().startswith("best of 3 (2 stopped early, 1 diverged): 91.0 %")


@pytest.mark.parametrize(
    ("change", "observed"),
    [
        ("training.epochs=4", {0: 10.0, 1: 99.0}),
        ("seeds=[0, 1]", {0: 50.0, 1: 79.5}),  # the means of 90 and 10, of 60 and 99
    ],
)
def test_after_a_changed_spec_or_one_more_seed_the_trials_of_today_are_what_counts(
    change: str, observed: dict[int, float], films: Path, tmp_path: Path
) -> None:
    asked = ["search.trials=2"]
    first = book(films, tmp_path, asked)
    while first.suggest() is not None:
        pass
    try_out(first, [90.0, 60.0])
    told = texts(tmp_path)
    changed = book(films, tmp_path, [*asked, change])
    assert changed.observed == {}
    try_out(changed, [10.0, 99.0])
    assert changed.observed == observed
    assert "99" in changed.verdict() or "79.5" in changed.verdict()
    assert book(films, tmp_path, [*asked, change]).observed == observed  # from the files, written anew
    assert texts(tmp_path) != told
    assert book(films, tmp_path, asked).observed == {0: 90.0, 1: 60.0}  # back to the first spec
    assert texts(tmp_path) == told


@pytest.mark.parametrize("executor", ["plain", "ray"])
def test_only_failed_trains_the_failed_trial_of_a_search_and_suggests_nothing(
    executor: Executor, films: Path, place: Path
) -> None:
    search(films, place, ["search.trials=2"])
    study = Study(open_storage(place).child("tiny"))
    failed = study.trial(study.trial_ids()[0])
    failed.delete("result.json")
    failed.write_json("failed.json", {"error": "no memory", "attempts": 4})
    study.storage.delete("search/observations/000000.json")
    again = search(films, place, executor=executor, only_failed=True)  # of six suggestions
    assert (again.trained, len(again.states)) == (1, 2)
    assert len(texts(place)) == 4  # two suggestions, two observations


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_suggestions_that_a_changed_spec_no_longer_allows_are_left_out(
    algorithm: str, films: Path, tmp_path: Path
) -> None:
    root, key = open_storage(tmp_path), "training.warm_epochs"
    before = {"space": {key: {"choice": [6]}}, "algorithm": algorithm, "trials": 2}
    first = book_of(root, films, ["training.epochs=8"], **before)
    while first.suggest() is not None:
        pass
    try_out(first, [90.0])  # of both
    now = {**before, "space": {key: {"choice": [0, 1]}}}
    for suggested in (2, 0):
        found = book_of(root, films, ["training.epochs=4"], **now)
        assert "2 of" in (found.left_out() or "")
        assert "no valid experiment any more" in (found.left_out() or "")
        assert [found.planned(s) for s in found.suggestions[:2]] == [[], []]
        more = [found.suggest() for _ in range(suggested)]
        assert all(s is not None and found.holds(s) for s in more)
        try_out(found, [50.0] * (len(found.trials) if suggested else 0))
        assert found.suggest() is None
        assert found.observed == {2: 50.0, 3: 50.0}
        assert "best of 2" in found.verdict()
    again = book_of(root, films, ["training.epochs=8"], **before)
    assert {n: again.observed[n] for n in (0, 1)} == {0: 90.0, 1: 90.0}


def test_a_key_that_decides_who_is_looked_at_cannot_be_searched(films: Path, tmp_path: Path) -> None:
    key = "cohort.train"
    experiment = tiny.experiment(films, tmp_path, search={**SEARCH, "space": {key: {"choice": [10, 12]}}})
    root = open_storage(tmp_path)
    with pytest.raises(StudyError, match="cannot be searched"):
        run_study(plan_study(search_experiment(experiment), root), root, executor="plain")


def test_a_search_of_other_keys_is_another_study(films: Path, tmp_path: Path) -> None:
    book(films, tmp_path).suggest()
    more = {**SEARCH, "space": {"training.lr_add_on": {"uniform": [1e-4, 1e-2]}}}
    experiment = tiny.experiment(films, tmp_path, search=more)
    root = open_storage(tmp_path)
    with pytest.raises(StudyError, match="searched other keys"):
        run_study(plan_study(search_experiment(experiment), root), root, executor="plain")


def test_a_run_says_in_one_line_that_its_search_space_is_narrower(films: Path, place: Path) -> None:
    search(films, place, ["search.trials=2"])
    said: list[str] = []
    shown = Silent()
    shown.say = said.append
    narrow = {**SPACE, "training.lr_backbone": {"loguniform": [1e-9, 1e-8]}}
    experiment = tiny.experiment(films, place, search={**SEARCH, "trials": 2, "space": narrow})
    root = open_storage(place)
    plan = plan_study(search_experiment(experiment), root)
    outcome = run_study(plan, root, executor="plain", work=works.learn, shown=shown)
    assert (outcome.trained, set(outcome.states.values())) == (0, {"finished"})
    assert [line for line in said if "outside search.space" in line] == [
        "2 of 2 suggestions are outside search.space now: only their trials are kept"
    ]


def test_halving_lets_the_best_third_go_on_and_decides_the_same_when_it_is_read_back(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    trials = set("abcde")
    halving = Halving(storage, 9, trials)
    assert halving.rungs == [1, 3]
    assert halving.goes_on("a", "cell", 1, 50.0)
    assert halving.goes_on("b", "cell", 1, 60.0)
    assert not halving.goes_on("c", "cell", 1, 55.0)  # three are there, the best one goes on
    assert halving.goes_on("d", "cell", 1, 61.0)
    assert halving.goes_on("e", "other", 1, 1.0)  # another mixture is another race
    again = Halving(storage, 9, trials)
    again.open()
    mark = {"epoch": 1, "value": 55.0, "by": "the search"}
    assert (again.reached, again.stopped) == (halving.reached, {"c": mark})
    assert not again.goes_on("c", "cell", 2, 99.0)
    assert again.goes_on("a", "cell", 2, 0.0)  # asked once a rung


def test_a_trial_that_was_stopped_as_the_driver_died_gets_its_mark_and_is_not_trained(
    films: Path, tmp_path: Path
) -> None:
    root, epochs = open_storage(tmp_path), ["training.epochs=9", "seeds=[0, 1, 2, 3, 4]"]
    told = {"scheduler": "asha", "trials": 1}
    found = book_of(root, films, epochs, **told)
    found.suggest()
    halving = Halving(found.study.storage, 9, found.trials)
    trials = list(found.trials)
    reached = [(3, 90.0), (3, 88.0), (4, 50.0), (5, 40.0), (3, 30.0)]
    goes_on = [halving.goes_on(t, "cell", *now) for t, now in zip(trials, reached, strict=True)]
    assert goes_on == [True, True, False, False, False]
    finished = {"status": "finished", "tests": {}, "selected": {"val_accuracy": 60.0}}
    found.study.trial(trials[4]).write_json("result.json", finished)  # ended before it was told
    rung = {"rung": "cell epoch 3", "trial": trials[3], "value": 40.0, "goes_on": False}
    notes = [e for e in found.study.storage.read_events("search/rungs") if e["trial"] != trials[3]]
    found.study.storage.delete("search/rungs")
    for note in [*notes, rung]:  # one as an earlier raystudy wrote it
        found.study.storage.append_event("search/rungs", note)
    again = book_of(root, films, epochs, **told)
    marks = {t: read_mark(found.study.trial(t), STOPPED) for t in trials[2:4]}
    assert [(m["epoch"], m["value"], m["by"]) for m in marks.values()] == [
        (4, 50.0, "the search"),
        (3, 40.0, "the search"),
    ]
    assert not found.study.trial(trials[4]).exists(STOPPED)
    ledger = Ledger(found.study, replace(again.base, trials=tuple(again.trials.values())))
    ledger.open()
    assert [t.trial_id for t in ledger.missing_trials()] == trials[:2]
    try_out(again, [70.0, 80.0])
    assert again.observed == {0: 60.0}  # the mean of 70, 80, 50, 40 and 60
    assert again.ended == {0: "stopped"}


def test_halving_compares_no_trial_with_those_of_an_earlier_spec(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    before = Halving(storage, 9, {"a", "b"})
    assert before.goes_on("a", "cell", 1, 90.0)
    assert before.goes_on("b", "cell", 1, 80.0)
    now = Halving(storage, 9, {"c", "d", "e"})
    now.open()
    assert now.goes_on("c", "cell", 1, 50.0)
    assert now.goes_on("d", "cell", 1, 40.0)
    assert not now.goes_on("e", "cell", 1, 45.0)  # three of today are there, the best one goes on


def test_a_search_on_ray_stops_the_hopeless_early_and_goes_on_from_its_marks(films: Path, place: Path) -> None:
    more = ["search.scheduler=asha", "resources.cpus=0.5", "resources.explain_cpus=0.5", "training.epochs=6"]
    outcome = search(films, place, [*more, "search.trials=5"], "ray")
    states = list(outcome.states.values())
    stopped = states.count("stopped")
    assert set(states) == {"finished", "stopped"}
    assert stopped >= 1
    assert len(list(place.glob("tiny/trials/*/stopped.json"))) == stopped
    assert len(texts(place)) == 10  # five suggestions, five observations
    assert search(films, place, [*more, "search.trials=5"], "ray").trained == 0
