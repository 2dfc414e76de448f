"""What a driver holds while it runs a study: what is to do, what came out, and the wish to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from raystudy.explanation_jobs import Job
from raystudy.lock import StudyLock
from raystudy.orchestrate.assignment import Work, stop_watch, write_stop
from raystudy.orchestrate.films import Films
from raystudy.orchestrate.ledger import Ledger
from raystudy.orchestrate.plan import PlannedTrial
from raystudy.orchestrate.progress import Display
from raystudy.orchestrate.search import SearchBook
from raystudy.study import Study


@dataclass
class Outcome:
    """What a run did."""

    states: dict[str, str]
    trained: int = 0
    explained: int = 0
    failures: dict[str, str] = field(default_factory=dict[str, str])
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0 done, 1 something failed, 130 interrupted."""
        if self.interrupted:
            return 130
        return 1 if self.failures else 0


@dataclass(frozen=True)
class Todo:
    """What the study directory lacks; ``suggestions``: a search has more to suggest; ``films``: only their names."""

    trials: list[PlannedTrial]
    explanations: list[tuple[PlannedTrial, Job]]
    suggestions: bool = False
    films: bool = False

    def __bool__(self) -> bool:
        return bool(self.trials or self.explanations or self.suggestions or self.films)

    @property
    def involved(self) -> list[PlannedTrial]:
        """Every trial that is trained or explained, once."""
        return list({t.trial_id: t for t in [*self.trials, *(t for t, _ in self.explanations)]}.values())


class StopWished(Exception):
    """The study is to stop while its films are prepared."""


@dataclass(frozen=True)
class Stoppable:
    """A display of long preparations, which end at the next count when the study is to stop."""

    shown: Display
    stop: Callable[[], bool]

    def say(self, text: str) -> None:
        self.shown.say(text)

    def count(self, what: str, done: int, total: int, detail: str = "") -> None:
        self.shown.count(what, done, total, detail)
        if self.stop():
            raise StopWished

    def running(self, lines: dict[str, str]) -> None:
        self.shown.running(lines)


class Stop:
    """The wish to end with checkpoints: a signal, a file in the study directory, or the loss of the lock."""

    def __init__(self, study: Study, lock: StudyLock) -> None:
        self._study, self._lock = study, lock
        self._asked = threading.Event()
        self._written = False
        self._watch = stop_watch(study, lambda: self._asked.is_set() or lock.lost, owner=lock.token)

    @property
    def owner(self) -> str:
        """The lock's token; trials and explanations end where another driver's takes its place."""
        return self._lock.token

    def __call__(self) -> bool:
        wished = self._watch()
        if self._asked.is_set() and not self._written and not self._lock.lost:
            self._written = True
            write_stop(self._study, "the driver")  # trials look for it
        return wished

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as the wish; a second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked.is_set():
                raise KeyboardInterrupt
            self._asked.set()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Run:
    """One run of a study, as the executors see it."""

    ledger: Ledger
    todo: Todo
    films: Films
    stop: Stop
    outcome: Outcome
    shown: Display
    work: Work | None = None
    book: SearchBook | None = None

    @property
    def study(self) -> Study:
        return self.ledger.study

    def explains(self, trial: PlannedTrial) -> bool:
        """Whether a trial is explained once it is finished; only real trials can be."""
        return trial.explain.enabled and self.work is None
