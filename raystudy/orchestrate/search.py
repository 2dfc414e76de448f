"""Hyperparameter search: which settings give the best validation accuracy; a test set is never looked at.

A suggestion is one set of values; it is tried on every task, seed and chosen mixture, and its objective is the mean
validation accuracy of these trials.  The same values may be suggested again: they are the same trials, trained once.
Suggestions are written before they start, observations when they are made, stops before they happen; a search that was
interrupted reads them back and goes on as if nothing had been.  Where the experiment has changed, its suggestions have
other trials: observations and rungs of earlier ones no longer count.

    search/suggestions/000007.json   {"number", "values"}
    search/observations/000007.json  {"number", "objective", "trials", "ended"}: their values, and how it ended
    search/rungs                     events: what each trial had reached at a rung, and whether it went on
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from raystudy.config import Experiment, Search
from raystudy.config_text import in_plain_words
from raystudy.errors import StudyError
from raystudy.orchestrate.assignment import STOPPED
from raystudy.orchestrate.ledger import stand_in
from raystudy.orchestrate.plan import Arm, PlannedTrial, StudyPlan, trials_of
from raystudy.orchestrate.search_draws import ENDS, Ended, Known, optuna_draws, random_draws, require_optuna
from raystudy.results import RESULT, read_result, read_sealed, write_sealed
from raystudy.storage import Storage
from raystudy.study import Study, read_mark

FOLDER = "search"
SEARCHABLE = ("model", "training")
ETA = 3  # of the asynchronous halving: a third goes on
DRAWS = 500  # of a suggestion, until its values are a valid experiment together


@dataclass(frozen=True)
class Suggestion:
    """One set of values, by its number in the search."""

    number: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Reached:
    """A trial's validation accuracy: at its end, where the search stopped it, or 0 as it diverged."""

    value: float
    ended: Ended


@dataclass
class SearchBook:
    """What a search suggested and observed, in the study directory.

    Parameters
    ----------
    base : the plan of the experiment without searched values; its cohorts serve every suggestion.
    """

    study: Study
    experiment: Experiment
    base: StudyPlan
    suggestions: list[Suggestion] = field(default_factory=list[Suggestion])
    observed: dict[int, float] = field(default_factory=dict[int, float])
    ended: dict[int, Ended] = field(default_factory=dict[int, Ended])  # observed suggestions: the worst of their trials
    trials: dict[str, PlannedTrial] = field(default_factory=dict[str, PlannedTrial])
    _of_trial: dict[str, list[int]] = field(default_factory=dict[str, list[int]])  # a trial's suggestions
    _invalid: set[int] = field(default_factory=set[int])  # suggestions of an earlier spec that this one does not allow
    _values: dict[int, dict[str, Reached | None]] = field(default_factory=dict[int, dict[str, Reached | None]])
    _lock: threading.RLock = field(default_factory=threading.RLock)  # Tune's thread suggests, the driver's observes

    @property
    def settings(self) -> Search:
        assert self.experiment.search is not None
        return self.experiment.search

    def open(self) -> None:
        """Read what an earlier run of this search left.

        Raises
        ------
        StudyError : the searched keys are others now, or cannot be searched, or are valid together nowhere.
        """
        check_space(self.settings)
        if self.settings.algorithm == "optuna":
            require_optuna()
        storage = self.study.storage
        for path in storage.list(f"{FOLDER}/suggestions"):
            kept = read_sealed(storage, path) or {}
            if set(kept["values"]) != set(self.settings.space):
                raise StudyError(
                    "this study has searched other keys: " + ", ".join(sorted(kept["values"])),
                    where="search.space",
                    remedy="give the experiment another name",
                )
            self._admit(Suggestion(int(kept["number"]), dict(kept["values"])))
        self._mark_stopped()
        for path in storage.list(f"{FOLDER}/observations"):
            kept = read_sealed(storage, path) or {}
            number = int(kept["number"])
            wanted = {trial.trial_id for trial in self._trials_of(number)}
            if not wanted or set(kept["trials"]) != wanted:
                continue  # of an earlier spec, or of other seeds
            ended = kept["ended"] if "ended" in kept else self._worst_end(wanted)
            if ended is not None:
                self.ended[number], self.observed[number] = ended, float(kept["objective"])
        for trial_id, numbers in self._of_trial.items():
            if not self.observed.keys() >= set(numbers):  # of other trials, or a run ended before it was written
                self._observe_known(trial_id)

    def _mark_stopped(self) -> None:
        """Write the marks of stopped trials that a driver could not write any more: they are not trained again."""
        halving = Halving(self.study.storage, self.experiment.training.epochs, self.trials)
        halving.open()
        for trial_id in halving.stopped.keys() & self.trials.keys():
            directory = self.study.trial(trial_id)
            if not directory.exists(STOPPED) and not directory.exists(RESULT):
                write_sealed(directory, STOPPED, halving.stopped[trial_id], ())

    @property
    def wants_more(self) -> bool:
        return len(self.suggestions) - len(self._invalid) < self.settings.trials

    def verdict(self) -> str:
        """Say what was best so far."""
        best = self.best()
        if best is None:
            return "no suggestion is observed yet"
        values = ", ".join(f"{key} = {value}" for key, value in best[0].values.items())
        words: dict[Ended, str] = {"stopped": "stopped early", "diverged": "diverged"}
        counts = [(n, word) for end, word in words.items() if (n := list(self.ended.values()).count(end))]
        others = f" ({', '.join(f'{n} {word}' for n, word in counts)})" if counts else ""
        return f"best of {len(self.observed)}{others}: {best[1]:.1f} % validation accuracy with {values}"

    def left_out(self) -> str | None:
        """Say how many suggestions the experiment, as it is now, would not make; None where it would make all."""
        invalid, total = len(self._invalid), len(self.suggestions)
        outside = sum(not self.holds(suggestion) for suggestion in self.suggestions) - invalid
        told = {
            f"{outside} of {total} suggestions are outside search.space now: only their trials are kept": outside,
            f"{invalid} of {total} suggestions are no valid experiment any more: they do not count": invalid,
        }
        return "\n".join(line for line, n in told.items() if n) or None

    def holds(self, suggestion: Suggestion) -> bool:
        """Whether the search could suggest these values today."""
        if suggestion.number in self._invalid:
            return False
        return all(self._could_be(key, value) for key, value in suggestion.values.items())

    def _could_be(self, key: str, value: Any) -> bool:
        wanted = self.settings.space[key]
        bounds = wanted.uniform or wanted.loguniform
        if bounds is None:
            return value in (wanted.choice or ())
        low, high = (self._fitting(key, bound) for bound in bounds)  # a value at the edge was rounded as well
        return isinstance(value, int | float) and low <= value <= high

    def suggest(self) -> Suggestion | None:
        """Return the next suggestion, written down, or None when there are enough."""
        if not self.wants_more:
            return None
        suggestion = self.draw()
        path = f"{FOLDER}/suggestions/{suggestion.number:06d}.json"
        write_sealed(self.study.storage, path, {"number": suggestion.number, "values": suggestion.values}, ())
        with self._lock:
            self._admit(suggestion)
            for trial in self._trials_of(suggestion.number):
                if len(self._of_trial[trial.trial_id]) > 1:
                    self._observe_known(trial.trial_id)
        return suggestion

    def draw(self) -> Suggestion:
        """Draw the next suggestion, without writing it down; values that are not valid together are drawn again.

        Raises
        ------
        StudyError : the space seems to hold no valid experiment.
        """
        known = {suggestion.number for suggestion in self.suggestions}
        number = next(n for n in itertools.count() if n not in known)  # a damaged one was deleted
        problem = ""
        for drawn in itertools.islice(self._draws(number), DRAWS):
            values = {key: self._fitting(key, value) for key, value in drawn.items()}
            try:
                self._variant(values)  # before it is written down, as a weights file may be missing
            except ValidationError as error:
                problem = f"{values}: {in_plain_words(dict(error.errors(include_url=False)[0]))}"
            else:
                return Suggestion(number, values)
        raise StudyError(
            f"none of {DRAWS} draws is a valid experiment, the last was {problem}",
            where="search.space",
            remedy="narrow the space to values that are valid together",
        )

    def _draws(self, number: int) -> Iterator[dict[str, Any]]:
        space, seed = self.settings.space, self.experiment.study_seed
        if self.settings.algorithm == "random":
            return random_draws(space, seed, number)
        known = [
            Known(s.values, self.observed[s.number], self.ended[s.number])
            for s in self.suggestions
            if s.number in self.observed and self.holds(s)
        ]
        return optuna_draws(space, seed, number, known)

    def planned(self, suggestion: Suggestion) -> list[PlannedTrial]:
        """Return the trials that a suggestion has brought: none where its values were suggested before."""
        return [t for t in self._trials_of(suggestion.number) if self._of_trial[t.trial_id][0] == suggestion.number]

    def _trials_of(self, number: int) -> list[PlannedTrial]:
        return [t for t in self.trials.values() if number in self._of_trial[t.trial_id]]

    def observe(self, trial_id: str, reached: Reached | None) -> None:
        """Take a trial's validation accuracy (None: it failed); write the observation once all are there."""
        with self._lock:
            self._observe(trial_id, reached)

    def _observe_known(self, trial_id: str) -> None:
        reached = value_of(self.study, trial_id)
        if reached is not None:
            self._observe(trial_id, reached)

    def _observe(self, trial_id: str, reached: Reached | None) -> None:
        for number in self._of_trial[trial_id]:
            self._observe_for(number, trial_id, reached)

    def _observe_for(self, number: int, trial_id: str, reached: Reached | None) -> None:
        values = self._values.setdefault(number, {})
        values[trial_id] = reached
        wanted = [t.trial_id for t in self._trials_of(number)]
        if set(values) < set(wanted) or number in self.observed:
            return
        known = {t: r for t, r in values.items() if r is not None}
        if len(known) < len(wanted):
            return  # failed trials are tried again by the next run
        self.ended[number] = _worst(known.values())  # before it is observed, as the other thread may ask in between
        trials = {t: r.value for t, r in known.items()}
        self.observed[number] = math.fsum(trials.values()) / len(trials)
        note = {"number": number, "objective": self.observed[number], "trials": trials, "ended": self.ended[number]}
        write_sealed(self.study.storage, f"{FOLDER}/observations/{number:06d}.json", note, ())

    def _worst_end(self, trial_ids: Iterable[str]) -> Ended | None:
        """Return what an observation of an earlier raystudy did not tell; None when a trial is to be observed again."""
        trials = [value_of(self.study, trial_id) for trial_id in trial_ids]
        known = [reached for reached in trials if reached is not None]
        return _worst(known) if len(known) == len(trials) else None

    def best(self) -> tuple[Suggestion, float] | None:
        """Return the best suggestion: one that was trained to its end, if any was; the earlier of equals."""
        if not self.observed:
            return None
        number = min(self.observed, key=lambda n: (ENDS.index(self.ended[n]), -self.observed[n], n))
        return next(s for s in self.suggestions if s.number == number), self.observed[number]

    def _admit(self, suggestion: Suggestion) -> None:
        self.suggestions.append(suggestion)
        try:
            trials = self._variant(suggestion.values)
        except ValidationError:
            self._invalid.add(suggestion.number)
            return
        for trial in trials:
            self.trials[trial.trial_id] = trial
            self._of_trial.setdefault(trial.trial_id, []).append(suggestion.number)

    def _variant(self, values: dict[str, Any]) -> list[PlannedTrial]:
        """Plan the trials of a suggestion on the cohorts that are drawn already; no valid one is a ValidationError."""
        arms = [Arm({**a.axes, **values}, a.experiment.with_values(values), a.cohorts) for a in self.base.arms]
        return [trial for arm in arms for trial in trials_of(arm)]

    def _fitting(self, key: str, value: Any) -> Any:
        """Round a drawn number: to an integer where the setting is one, to four digits elsewhere; no choice changes."""
        section, _, leaf = key.partition(".")
        now = getattr(getattr(self.experiment, section), leaf)
        if not isinstance(value, float):
            return value
        if isinstance(now, int) and not isinstance(now, bool):
            return round(value)
        return value if self.settings.space[key].choice else float(f"{value:.4g}")


def _worst(trials: Iterable[Reached]) -> Ended:
    return ENDS[max(ENDS.index(reached.ended) for reached in trials)]


def check_space(search: Search) -> None:
    """Refuse keys whose trials could not be compared by validation accuracy.

    Raises
    ------
    StudyError : a key outside model and training.
    """
    for key in search.space:
        if key.split(".")[0] not in SEARCHABLE:
            raise StudyError(
                f"{key} cannot be searched: it decides who is looked at, or what is shown, not how well is learned",
                where="search.space",
                remedy=f"search keys of {' and '.join(SEARCHABLE)}; compare the others as axes",
            )


def search_experiment(experiment: Experiment) -> Experiment:
    """Return the experiment of a search's trials: its chosen mixtures."""
    assert experiment.search is not None
    return experiment.model_copy(update={"mixtures": experiment.search.mixtures})


@dataclass
class Halving:
    """Asynchronous successive halving on validation accuracy, kept in the study directory.

    A trial that reaches a rung goes on when it is among the best third of those that reached it before it, of the same
    task, axes, mixture and seeds.  Rungs are at epochs / 3, epochs / 9, … completed epochs.

    Parameters
    ----------
    trials : ids of the search's trials, growing with it; what others reached under an earlier spec does not count.
    """

    storage: Storage
    epochs: int
    trials: Container[str]
    reached: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])  # rung -> trial -> value
    stopped: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])  # trial -> its mark

    @property
    def rungs(self) -> list[int]:
        """The epochs at which a trial may be stopped, rising."""
        found: list[int] = []
        rung = self.epochs // ETA
        while rung >= 1:
            found.append(rung)
            rung //= ETA
        return sorted(found)

    def open(self) -> None:
        for event in self.storage.read_events(f"{FOLDER}/rungs"):
            self.reached.setdefault(event["rung"], {})[event["trial"]] = event["value"]
            if not event["goes_on"]:
                epoch = event.get("epoch", int(event["rung"].rsplit(" ", 1)[1]))  # an earlier raystudy noted no epoch
                self.stopped[event["trial"]] = _mark(epoch, event["value"])

    def goes_on(self, trial_id: str, cell: str, epoch: int, value: float) -> bool:
        """Decide at an epoch, write the decision down, and return it; a trial is asked once per rung."""
        if trial_id in self.stopped:
            return False
        for rung in self.rungs:
            name = f"{cell} epoch {rung}"
            if epoch < rung or trial_id in self.reached.get(name, {}):
                continue
            others = self.reached.setdefault(name, {})
            others[trial_id] = value
            ranked = sorted((v for t, v in others.items() if t in self.trials), reverse=True)
            stays = len(ranked) < ETA or value >= ranked[max(1, len(ranked) // ETA) - 1]
            note = {"rung": name, "trial": trial_id, "epoch": epoch, "value": value, "goes_on": stays}
            self.storage.append_event(f"{FOLDER}/rungs", {"time": time.time(), **note})
            if not stays:
                self.stopped[trial_id] = _mark(epoch, value)
                return False
        return True


def _mark(epoch: int, value: float) -> dict[str, Any]:
    """Return stopped.json of a trial."""
    return {"epoch": epoch, "value": value, "by": "the search"}


def cell_of(trial: PlannedTrial, searched: Container[str]) -> str:
    """Name what two trials must share to be compared at a rung: all but the searched keys."""
    spec = trial.spec
    cell = f"{spec.task} h1_{spec.h1_share:03d} seed {spec.seed} cohort {spec.cohort_seed}"
    arm = {key: value for key, value in spec.axes.items() if key not in searched}
    return f"{cell} axes {json.dumps(arm, sort_keys=True)}" if arm else cell


def value_of(study: Study, trial_id: str) -> Reached | None:
    """Return a trial's validation accuracy: of its result, or where the search stopped it; None when there is none.

    Raises
    ------
    StudyError : the file that tells it is damaged.
    """
    directory = study.trial(trial_id)
    if directory.exists(RESULT):
        result = stand_in(directory) or read_result(directory)
        assert result is not None  # it was there a moment ago
        if result["status"] == "diverged":
            return Reached(0.0, "diverged")
        return Reached(float(result["selected"]["val_accuracy"]), "finished")
    try:
        return Reached(float(read_mark(directory, STOPPED)["value"]), "stopped")
    except FileNotFoundError:
        return None
