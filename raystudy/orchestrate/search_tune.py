"""The search inside Ray Tune: suggestions when a slot is free, early stops by what the study directory has seen."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raystudy.orchestrate.assignment import STOPPED
from raystudy.orchestrate.ledger import Ledger
from raystudy.orchestrate.plan import PlannedTrial
from raystudy.orchestrate.search import Halving, SearchBook, cell_of
from raystudy.orchestrate.sweep import PlanSearcher, Queued, TrialNews, config_of, forgotten
from raystudy.results import write_sealed


class BookSearcher(PlanSearcher):
    """Hands out what waits, then asks the book for more where it may.

    Parameters
    ----------
    waiting : trials of earlier suggestions that have no result yet.
    queued : how a planned trial is handed out.
    news : where the driver hears of trials that are new.
    watched : slots report validation accuracies while the trial runs.
    more : whether the book is asked; not where only failed trials are tried again.
    """

    def __init__(
        self,
        waiting: Iterable[Queued],
        stopping: Callable[[], bool],
        book: SearchBook,
        ledger: Ledger,
        queued: Callable[[PlannedTrial], Queued],
        news: queue.SimpleQueue[TrialNews],
        watched: bool,
        more: bool,
    ) -> None:
        super().__init__(waiting, stopping)
        self._book, self._ledger, self._queued, self._news, self._watched = book, ledger, queued, news, watched
        self._more = more
        self._next: deque[Queued] = self._waiting

    def suggest(self, trial_id: str) -> Any:
        if self._stopping():
            return Searcher.FINISHED
        while not self._next:
            suggestion = self._book.suggest() if self._more else None
            if suggestion is None:
                return Searcher.FINISHED
            trials = self._book.planned(suggestion)
            self._ledger.prepare_trials(trials)
            self._ledger.write_plan(self._book.trials.values())
            for trial in trials:
                self._news.put(TrialNews(trial.trial_id, "waiting"))
                self._next.append(self._queued(trial))
        return {**config_of(self._next.popleft()), "watched": self._watched}


@dataclass
class HalvingScheduler(FIFOScheduler):
    """Stops a trial that is not among the best at a rung; its mark is written before it is told to end."""

    book: SearchBook = field(repr=False)
    halving: Halving

    def __post_init__(self) -> None:
        super().__init__()

    def __reduce__(self) -> Any:
        return forgotten, ()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("done") or "val_accuracy" not in result:
            return TrialScheduler.CONTINUE
        trial_id = str(trial.config["trial"])
        cell = cell_of(self.book.trials[trial_id], self.book.settings.space)
        value = float(result["val_accuracy"])
        if self.halving.goes_on(trial_id, cell, int(result["epoch"]), value):
            return TrialScheduler.CONTINUE
        write_sealed(self.book.study.trial(trial_id), STOPPED, self.halving.stopped[trial_id], ())
        return TrialScheduler.STOP
