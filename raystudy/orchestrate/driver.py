"""A study from its plan to its report: does what the study directory lacks, and nothing else.

lock -> plan, rows and specs written -> films prepared -> trials (Ray Tune) and explanations (Ray tasks) -> report.
A run that finds everything done starts no Ray.  Ctrl-C, SIGTERM and `raystudy stop` end it with checkpoints.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Literal, Protocol

from raystudy.config import Experiment
from raystudy.errors import DamagedFileError, StudyError
from raystudy.images.store import form_of
from raystudy.lock import StudyLock, locked
from raystudy.orchestrate.assignment import Work, clear_stop
from raystudy.orchestrate.changes import describe_changes
from raystudy.orchestrate.cluster import run_on_ray
from raystudy.orchestrate.films import Films, plan_readable, prepare_films
from raystudy.orchestrate.initial_weights import check_initial_weights, check_searched_weights
from raystudy.orchestrate.ledger import Ledger
from raystudy.orchestrate.local_paths import refuse_local_paths
from raystudy.orchestrate.phantoms import write_phantom_originals
from raystudy.orchestrate.plan import StudyPlan, plan_study
from raystudy.orchestrate.progress import Display, Silent, display
from raystudy.orchestrate.search import SearchBook, search_experiment
from raystudy.orchestrate.session import connect, head_of, is_elsewhere
from raystudy.orchestrate.state import Outcome, Run, Stop, Stoppable, StopWished, Todo
from raystudy.results import damaged_files, read_sealed, write_sealed
from raystudy.storage import Storage, open_storage
from raystudy.study import PLAN, Study

REPORTED = "report.json"  # the checksums of a report's files and of what it is about; deleted when work begins
Executor = Literal["ray", "plain"]


class Mirror(Protocol):
    """A copy of the study directory elsewhere; never in the way of training."""

    def start(self) -> None: ...
    def close(self, *, at_rest: bool) -> bool: ...


def run(
    experiment: Experiment, *, only_failed: bool = False, address: str | None = None, take_over: bool = False
) -> int:
    """Run what is missing of a study, with display, mirror and report; return the exit code.

    Raises
    ------
    StudyError : as ``run_study``; and local paths that a cluster elsewhere would not see.
    """
    _refuse_unseen_paths(experiment, address)
    storage = open_storage(experiment.storage)
    storage.check_writable()
    with display() as shown, ExitStack() as open_ray:
        lock = None
        if experiment.images.unreadable == "drop":  # what can be read is known when everything is decoded
            open_ray.enter_context(connect(address))
            study = Study(storage.child(experiment.name))
            lock = open_ray.enter_context(_held(study, take_over))
            try:
                plan = plan_readable(_planned(experiment), storage, Stoppable(shown, Stop(study, lock)))
            except StopWished:
                _refuse_loss(lock, study)
                print("interrupted; run the same command again to go on")
                return 130
        else:
            plan = plan_study(_planned(experiment), storage)
        outcome = run_study(
            plan,
            storage,
            only_failed=only_failed,
            address=address,
            take_over=take_over,
            shown=shown,
            mirror=_mirror(experiment, storage),
            report=_report,
            held=lock,
        )
    for name, message in outcome.failures.items():
        print(f"failed: {name}: {message}")
    if outcome.interrupted:
        print("interrupted; run the same command again to go on")
    elif outcome.failures:
        print("the rest of the study is done; try again with `raystudy run EXPERIMENT --only failed`")
    elif "finished" in outcome.states.values():
        _say_where(experiment, Study(storage.child(experiment.name)))
    else:
        states = ", ".join(f"{n} {state}" for state, n in Counter(outcome.states.values()).items())
        print(f"no trial is finished, so there is no report: {states}; `raystudy status EXPERIMENT` tells why")
    return outcome.exit_code


def _refuse_unseen_paths(experiment: Experiment, address: str | None) -> None:
    head = head_of(address)
    if head is not None and is_elsewhere(head):
        refuse_local_paths(experiment, f"Ray at {head}")


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
    _refuse_unseen_paths(experiment, None)
    storage = open_storage(experiment.storage)
    storage.check_writable()
    Study(storage.child(experiment.name)).refuse_newer()
    with display() as shown, connect(dashboard=False):
        drop = experiment.images.unreadable == "drop"
        asked = _planned(experiment)
        plan = plan_readable(asked, storage, shown) if drop else plan_study(asked, storage)
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
    work: Work | None = None,
    held: StudyLock | None = None,
) -> Outcome:
    """Do what a study directory lacks.

    Parameters
    ----------
    storage : the root below which studies live.
    executor : ``ray``, or ``plain``: one trial after the other in this process.  The bytes are the same.
    only_failed : only trials and explanations that are marked as failed.
    mirror, report : plugs; the report's text is shown.
    work : what a trial does; None trains it.
    held : the study's lock, where the caller has it.

    Raises
    ------
    StudyError : another driver works on the study, films or initial weights that cannot be read, no Ray at the address.
    """
    started = time.monotonic()
    shown = shown or Silent()
    study = Study(storage.child(plan.experiment.name))
    with nullcontext(held) if held else _held(study, take_over) as lock:
        book = _book(plan, study)
        asked = plan if book is None else replace(plan, trials=tuple(book.trials.values()))
        ledger = Ledger(study, asked)
        ledger.open()
        missing = ledger.missing_trials(only_failed)
        more = book is not None and book.wants_more and not only_failed
        unexplained = ledger.missing_explanations(only_failed) if work is None else []
        todo = Todo(missing, unexplained, more, films=not ledger.films_known())
        local = not (address or os.environ.get("RAY_ADDRESS"))
        fresh = [t for t in missing if not any(n.startswith("checkpoint/") for n in ledger.files(t))]
        check_initial_weights((t.spec.model for t in fresh), local=local)
        if book is not None and more:
            check_searched_weights((t.spec.model for t in plan.trials), book.settings, local=local)
            book.draw()  # refused before anything starts
        for line in describe_changes(ledger, missing):
            shown.say(line)
        ledger.write_plan()
        ledger.prepare_trials(todo.involved)
        outcome = Outcome({t.trial_id: ledger.state(t) for t in asked.trials})
        shown.say(_overview(study, todo, outcome))
        if book is not None and (note := book.left_out()):
            shown.say(note)
        if mirror is not None:
            mirror.start()
        if todo:
            study.storage.delete(REPORTED)
        try:
            if todo:
                run = Run(ledger, todo, Films(), Stop(study, lock), outcome, shown, work, book)
                _execute(run, plan, storage, executor, address)
            if book is not None:
                shown.say(book.verdict())
            if report is not None and not outcome.interrupted and _reportable(study, outcome):
                shown.say(report(study))
                write_sealed(study.storage, REPORTED, {"of": _subject(study)}, study.storage.list("report"))
        finally:
            if mirror is not None and not mirror.close(at_rest=not lock.lost):
                shown.say("the MLflow mirror is behind; repair it with `raystudy report EXPERIMENT --sync`")
        _refuse_loss(lock, study)
    outcome.seconds = time.monotonic() - started
    return outcome


@contextmanager
def _held(study: Study, take_over: bool) -> Iterator[StudyLock]:
    """Hold the study's lock; earlier wishes to stop are forgotten."""
    with locked(study.storage, take_over=take_over) as lock:
        clear_stop(study)
        yield lock


def _refuse_loss(lock: StudyLock, study: Study) -> None:
    """Refuse to say more of a study that is another driver's now."""
    lock.look()
    if lock.lost:
        raise StudyError("another driver took this study over", where=study.storage.uri, remedy="leave it to that one")


def _execute(run: Run, plan: StudyPlan, storage: Storage, executor: Executor, address: str | None) -> None:
    shown = run.shown
    with connect(address) as session:
        if session.dashboard and executor == "ray":
            shown.say(f"Ray dashboard: {session.dashboard}   (where it asks for a token: ray get-auth-token)")
        preparing = Stoppable(shown, run.stop)
        involved = plan.trials if run.book is not None or run.todo.films else run.todo.involved
        kept = run.ledger.image_keys()  # before any of them is written anew
        try:
            write_phantom_originals(plan.experiment, plan.image_table, storage, preparing)
            run.films = prepare_films(involved, plan.image_table, storage, preparing)
        except StopWished:
            run.outcome.interrupted = True
            return
        run.films.left_out = len(plan.unusable)
        run.study.keep_image_keys((kept | {form_of(key): key for key in run.films.arrays}).values())
        with run.stop.signals():
            if executor == "plain":
                from raystudy.orchestrate.plain import run_plain  # torch: only where this process trains

                run_plain(run)
            else:
                run_on_ray(run, plan.experiment.resources, session)
        run.outcome.interrupted |= run.stop() or "interrupted" in run.outcome.states.values()


def _overview(study: Study, todo: Todo, outcome: Outcome) -> str:
    n, place = len(outcome.states), study.storage.uri
    left = sum(state in ("waiting", "interrupted", "failed") for state in outcome.states.values())
    if todo.suggestions:
        return f"{study.name}: searching; {n} trials suggested so far, {n - left} done ({place})"
    if not todo and left:
        return f"{study.name}: no trial failed, {left} of {n} are still to run ({place})"
    if not todo:
        return f"{study.name}: {'the trial is' if n == 1 else f'all {n} trials are'} done ({place})"
    explanations = f", {len(todo.explanations)} explanations of finished trials" if todo.explanations else ""
    return f"{study.name}: {len(todo.trials)} of {n} trials to run, {n - left} done{explanations} ({place})"


def _reportable(study: Study, outcome: Outcome) -> bool:
    """Whether there is something to report that no whole report of this plan and experiment says."""
    try:
        kept = read_sealed(study.storage, REPORTED)
        whole = kept is not None and kept.get("of") == _subject(study) and not damaged_files(study.storage, REPORTED)
    except DamagedFileError:
        whole = False
    return not whole and any(state == "finished" for state in outcome.states.values())


def _subject(study: Study) -> list[str]:
    """Return the checksums of what a report is about, beside the trials: their plan and the experiment's notes."""
    return [hashlib.sha256(study.storage.read_bytes(name)).hexdigest() for name in (PLAN, "experiment.yaml")]


def _planned(experiment: Experiment) -> Experiment:
    return search_experiment(experiment) if experiment.search else experiment


def _book(plan: StudyPlan, study: Study) -> SearchBook | None:
    if plan.experiment.search is None:
        return None
    book = SearchBook(study, plan.experiment, plan)
    book.open()
    return book


def _mirror(experiment: Experiment, storage: Storage) -> Mirror | None:
    if not experiment.tracking.enabled:
        return None
    from raystudy.mirror import Mirror as MLflowMirror
    from raystudy.tracking_server import check_server

    check_server(experiment.tracking.uri, must_answer=False)  # one that is away comes back; a wrong one stays wrong
    return MLflowMirror(Study(storage.child(experiment.name)), experiment.tracking)


def _report(study: Study) -> str:
    from raystudy.report.page import write_report

    return "\n".join(write_report(study).sentences)
