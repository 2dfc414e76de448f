"""A study from its plan to its report: does what the study directory lacks, and nothing else.

lock -> plan, rows and specs written -> films prepared -> trials (Ray Tune) and explanations (Ray tasks) -> report.
A run that finds everything done starts no Ray.  Ctrl-C, SIGTERM and `raystudy stop` end it with checkpoints.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal, Protocol

from raystudy.config import Experiment
from raystudy.errors import StudyError
from raystudy.explanation import JOBS, Job
from raystudy.orchestrate.changes import describe_changes
from raystudy.orchestrate.films import Films, plan_readable, prepare_films
from raystudy.orchestrate.ledger import Ledger, clear_stop, write_stop
from raystudy.orchestrate.lock import StudyLock, locked
from raystudy.orchestrate.phantoms import write_phantom_originals
from raystudy.orchestrate.plan import PlannedTrial, StudyPlan, plan_study
from raystudy.orchestrate.progress import Display, Silent, display
from raystudy.orchestrate.session import connect
from raystudy.orchestrate.worker import Work, stop_watch, train
from raystudy.storage import Storage, open_storage
from raystudy.study import Study

Executor = Literal["ray", "plain"]


class Mirror(Protocol):
    """A copy of the study directory elsewhere; never in the way of training."""

    def start(self) -> None: ...
    def close(self) -> bool: ...


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
    """What the study directory lacks."""

    trials: list[PlannedTrial]
    explanations: list[tuple[PlannedTrial, Job]]

    def __bool__(self) -> bool:
        return bool(self.trials or self.explanations)

    @property
    def involved(self) -> list[PlannedTrial]:
        """Every trial that is trained or explained, once."""
        return list({t.trial_id: t for t in [*self.trials, *(t for t, _ in self.explanations)]}.values())


class Stop:
    """The wish to end with checkpoints: a signal, a file in the study directory, or the loss of the lock."""

    def __init__(self, study: Study, lock: StudyLock) -> None:
        self._study = study
        self._asked = threading.Event()
        self._written = False
        self._watch = stop_watch(study, lambda: self._asked.is_set() or lock.lost)

    def __call__(self) -> bool:
        wished = self._watch()
        if wished and not self._written:
            self._written = True
            if self._asked.is_set():
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


def run(
    experiment: Experiment, *, only_failed: bool = False, address: str | None = None, take_over: bool = False
) -> int:
    """Run what is missing of a study, with display, mirror and report; return the exit code."""
    storage = open_storage(experiment.storage)
    storage.check_writable()
    with display() as shown, ExitStack() as open_ray:
        if experiment.images.unreadable == "drop":
            open_ray.enter_context(connect(address))
            plan = plan_readable(experiment, storage, shown)
        else:
            plan = plan_study(experiment, storage)
        outcome = run_study(
            plan,
            storage,
            only_failed=only_failed,
            address=address,
            take_over=take_over,
            shown=shown,
            mirror=_mirror(experiment, storage),
            report=_report,
        )
    for name, message in outcome.failures.items():
        print(f"failed: {name}: {message}")
    if outcome.interrupted:
        print("interrupted; run the same command again to go on")
    elif outcome.failures:
        print("the rest of the study is done; try again with `raystudy run EXPERIMENT --only failed`")
    else:
        _say_where(experiment, Study(storage.child(experiment.name)))
    return outcome.exit_code


def _say_where(experiment: Experiment, study: Study) -> None:
    """Tell how to open what the study left."""
    print(f"open the report in a browser: {study.storage.address('report/index.html')}")
    uri = experiment.tracking.uri
    if experiment.tracking.enabled and uri.startswith("http"):
        print(f"the runs are in MLflow: {uri}")
    elif experiment.tracking.enabled:
        print(f"compare the runs in MLflow: mlflow ui --backend-store-uri {uri}   then http://127.0.0.1:5000")


def prepare_only(experiment: Experiment) -> None:
    """Decode the images of a study into the image store."""
    storage = open_storage(experiment.storage)
    storage.check_writable()
    with display() as shown, connect(dashboard=False):
        drop = experiment.images.unreadable == "drop"
        plan = plan_readable(experiment, storage, shown) if drop else plan_study(experiment, storage)
        write_phantom_originals(experiment, plan.image_table, storage, shown)
        for prepared in prepare_films(plan.trials, plan.image_table, storage, shown).prepared.values():
            shown.say(f"{prepared.n_new} images decoded, {prepared.n_reused} were there: {prepared.key}")


def run_study(
    plan: StudyPlan,
    storage: Storage,
    *,
    executor: Executor = "ray",
    only_failed: bool = False,
    address: str | None = None,
    take_over: bool = False,
    shown: Display | None = None,
    mirror: Mirror | None = None,
    report: Callable[[Study], str] | None = None,
    work: Work = train,
) -> Outcome:
    """Do what a study directory lacks.

    Parameters
    ----------
    storage : the root below which studies live.
    executor : ``ray``, or ``plain``: one trial after the other in this process.  The bytes are the same.
    only_failed : only trials and explanations that are marked as failed.
    mirror, report : plugs; the report's text is shown.
    work : what a trial does.

    Raises
    ------
    StudyError : another driver works on the study, films that cannot be read, no Ray at the address.
    """
    started = time.monotonic()
    shown = shown or Silent()
    study = Study(storage.child(plan.experiment.name))
    with locked(study.storage, take_over=take_over) as lock:
        clear_stop(study)
        ledger = Ledger(study, plan)
        ledger.open()
        missing = ledger.missing_trials(only_failed)
        todo = Todo(missing, ledger.missing_explanations(only_failed))
        for line in describe_changes(ledger, missing):
            shown.say(line)
        ledger.write_plan()
        ledger.prepare_trials(todo.involved)
        outcome = Outcome({t.trial_id: _state(ledger, t) for t in plan.trials})
        shown.say(_overview(plan, study, todo))
        if mirror is not None:
            mirror.start()
        try:
            if todo:
                stop = Stop(study, lock)
                _execute(plan, storage, ledger, todo, stop, outcome, shown, executor, address, work)
            if report is not None and not outcome.interrupted and _reportable(study, todo, outcome):
                shown.say(report(study))
        finally:
            if mirror is not None and not mirror.close():
                shown.say("the MLflow mirror is behind; repair it with `raystudy report EXPERIMENT --sync`")
        if lock.lost:
            raise StudyError(
                "another driver took this study over", where=study.storage.uri, remedy="leave it to that one"
            )
    outcome.seconds = time.monotonic() - started
    return outcome


def _execute(
    plan: StudyPlan,
    storage: Storage,
    ledger: Ledger,
    todo: Todo,
    stop: Stop,
    outcome: Outcome,
    shown: Display,
    executor: Executor,
    address: str | None,
    work: Work,
) -> None:
    with connect(address) as session:
        if session.dashboard and executor == "ray":
            shown.say(f"Ray dashboard: {session.dashboard}")
        write_phantom_originals(plan.experiment, plan.image_table, storage, shown)
        films = prepare_films(todo.involved, plan.image_table, storage, shown)
        ledger.study.storage.write_json("images.json", {"keys": sorted(films.arrays)})
        with stop.signals():
            if executor == "plain":
                _plain(ledger, todo, films, stop, outcome, shown, work)
            else:
                from raystudy.orchestrate.cluster import run_on_ray

                run_on_ray(plan.experiment.resources, ledger, todo, films, stop, outcome, shown, session, work)
        outcome.interrupted = stop()


def _plain(ledger: Ledger, todo: Todo, films: Films, stop: Stop, outcome: Outcome, shown: Display, work: Work) -> None:
    """One thing after the other: trials and their explanations, missing explanations of finished trials first."""
    from raystudy.orchestrate.worker import Assignment, Device, explain

    def assignment(trial: PlannedTrial) -> Assignment:
        return Assignment(ledger.study, trial.trial_id, ledger.rows[trial.trial_id], Device())

    def explain_one(trial: PlannedTrial, job: Job) -> None:
        if not stop() and explain(job, assignment(trial), films.array(trial), trial.explain, stop) == "finished":
            outcome.explained += 1

    for trial, job in todo.explanations:
        explain_one(trial, job)
    for trial in todo.trials:
        if stop():
            return
        state = work(assignment(trial), films.array(trial), stop)
        outcome.states[trial.trial_id] = state
        outcome.trained += state == "finished"
        shown.say(f"{state} {trial.trial_id}")
        if state == "finished" and trial.explain.enabled and work is train:
            for job in JOBS:
                explain_one(trial, job)


def _state(ledger: Ledger, trial: PlannedTrial) -> str:
    return "finished" if "result.json" in ledger.files(trial) else "waiting"


def _overview(plan: StudyPlan, study: Study, todo: Todo) -> str:
    n, done = len(plan.trials), len(plan.trials) - len(todo.trials)
    if not todo:
        return f"{study.name}: all {n} trials are done ({study.storage.uri})"
    explanations = f", {len(todo.explanations)} explanations of finished trials" if todo.explanations else ""
    return f"{study.name}: {len(todo.trials)} of {n} trials to run, {done} done{explanations} ({study.storage.uri})"


def _reportable(study: Study, todo: Todo, outcome: Outcome) -> bool:
    fresh = outcome.trained or outcome.explained or not study.storage.exists("report/index.html")
    return bool(fresh) and any(state == "finished" for state in outcome.states.values())


def _mirror(experiment: Experiment, storage: Storage) -> Mirror | None:
    if not experiment.tracking.enabled:
        return None
    from raystudy.mirror import Mirror as MLflowMirror

    return MLflowMirror(Study(storage.child(experiment.name)), experiment.tracking)


def _report(study: Study) -> str:
    from raystudy.report.page import write_report

    return "\n".join(write_report(study).sentences)
