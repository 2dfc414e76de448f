"""Early stopping where a search has axes beside its searched keys: every arm has races of its own."""

from pathlib import Path
from types import SimpleNamespace

from raystudy.orchestrate.search import Halving, SearchBook
from raystudy.orchestrate.search_tune import HalvingScheduler
from raystudy.storage import open_storage
from tests.orchestrate.searches import book_of, stop_early, try_out

ARMS = 'axes={"model.backbone": [resnet34, resnet18]}'


def suggested(films: Path, storage: Path, *more: str) -> SearchBook:
    found = book_of(open_storage(storage), films, ["training.epochs=3", *more], scheduler="asha", trials=4)
    while found.suggest() is not None:
        pass
    return found


def decisions(found: SearchBook, halving: Halving, reached: list[float]) -> list[str]:
    """Return what Tune is told of every trial, in the book's order, as it reaches so much in the first epoch."""
    scheduler = HalvingScheduler(found, halving)
    told: list[str] = []
    for trial_id, value in zip(found.trials, reached, strict=True):
        trial = SimpleNamespace(config={"trial": trial_id})
        told.append(scheduler.on_trial_result(None, trial, {"epoch": 1, "val_accuracy": value}))
    return told


def test_a_trial_is_compared_with_those_of_its_own_arm(films: Path, tmp_path: Path) -> None:
    found = suggested(films, tmp_path, ARMS)
    backbones = [trial.spec.model.backbone for trial in found.trials.values()]
    assert backbones == ["resnet34", "resnet18"] * 4
    halving = Halving(found.study.storage, 3, found.trials)
    reached = [80.0, 60.0, 78.0, 64.0, 79.0, 65.0, 82.0, 61.0]
    told = decisions(found, halving, reached)
    assert told[0::2] == ["CONTINUE", "CONTINUE", "STOP", "CONTINUE"]  # 80, 78, 79 and 82
    assert told[1::2] == ["CONTINUE", "CONTINUE", "CONTINUE", "STOP"]  # 60, 64, 65 and 61
    again = Halving(found.study.storage, 3, found.trials)
    again.open()
    assert (again.reached, again.stopped) == (halving.reached, halving.stopped)
    trials = list(found.trials)
    for n in (4, 7):
        stop_early(found, trials[n], reached[n])
    try_out(found, [value for n, value in enumerate(reached) if n not in (4, 7)])
    best = found.best()
    assert best is not None
    assert (best[0].number, best[1]) == (1, 71.0)  # the mean of 78 and 64, before that of 80 and 60


def test_without_arms_what_an_earlier_run_wrote_of_its_rungs_counts(films: Path, tmp_path: Path) -> None:
    found = suggested(films, tmp_path)
    rung, trials = "pneumonia h1_050 seed 0 cohort 0 epoch 1", list(found.trials)
    for trial_id, value in zip(trials, (80.0, 60.0), strict=False):
        note = {"rung": rung, "trial": trial_id, "epoch": 1, "value": value, "goes_on": True}
        found.study.storage.append_event("search/rungs", note)
    halving = Halving(found.study.storage, 3, found.trials)
    halving.open()
    assert decisions(found, halving, [0.0, 0.0, 79.0, 81.0]) == ["CONTINUE", "CONTINUE", "STOP", "CONTINUE"]
    assert {rung: set(others) for rung, others in halving.reached.items()} == {rung: set(trials)}
