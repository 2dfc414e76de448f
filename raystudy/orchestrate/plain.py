"""A study without a scheduler: one thing after the other in this process.  The bytes are those of Ray."""

from __future__ import annotations

from collections import deque

from raystudy.explanation_jobs import JOBS, Job
from raystudy.orchestrate.assignment import Assignment, Device, perform
from raystudy.orchestrate.plan import PlannedTrial
from raystudy.orchestrate.search import value_of
from raystudy.orchestrate.state import Run
from raystudy.orchestrate.worker import explain, train


def run_plain(run: Run) -> None:
    """Do what is missing: explanations of finished trials, then trial after trial with its explanations."""
    for trial, job in run.todo.explanations:
        _explain(run, trial, job)
    waiting = deque(run.todo.trials)
    while not run.stop() and (waiting or _suggested(run, waiting)):
        trial = waiting.popleft()
        state = perform(run.work or train, _assignment(run, trial), run.films.array(trial), run.stop)
        run.outcome.states[trial.trial_id] = state
        run.shown.say(f"{state} {trial.trial_id}")
        if state == "interrupted":
            return
        if run.book is not None:
            run.book.observe(trial.trial_id, value_of(run.study, trial.trial_id))
        if state == "finished":
            run.outcome.trained += 1
            for job in JOBS if run.explains(trial) else ():
                _explain(run, trial, job)


def _suggested(run: Run, waiting: deque[PlannedTrial]) -> bool:
    """Queue the trials of the next suggestion that brings any; return False when the search has suggested enough."""
    while run.book is not None and run.todo.suggestions and not waiting:
        suggestion = run.book.suggest()
        if suggestion is None:
            break
        trials = run.book.planned(suggestion)
        run.ledger.prepare_trials(trials)
        run.ledger.write_plan(run.book.trials.values())
        waiting.extend(trials)
    return bool(waiting)


def _explain(run: Run, trial: PlannedTrial, job: Job) -> None:
    if run.stop():
        return
    done = explain(job, _assignment(run, trial), run.films.array(trial), trial.explain, run.stop)
    run.outcome.explained += done == "finished"
    run.outcome.interrupted |= done == "interrupted"


def _assignment(run: Run, trial: PlannedTrial) -> Assignment:
    return Assignment(run.study, trial.trial_id, run.ledger.rows[trial.trial_id], Device())
