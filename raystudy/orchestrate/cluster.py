"""Trials and explanations of one run on a connected Ray: the driver's loop."""

from __future__ import annotations

import queue
import time
from typing import TYPE_CHECKING

from raystudy.config import Resources
from raystudy.explanation import JOBS, Job
from raystudy.orchestrate.explain import Explainer, ExplainJob
from raystudy.orchestrate.films import Films
from raystudy.orchestrate.ledger import Ledger
from raystudy.orchestrate.metrics import StudyMetrics
from raystudy.orchestrate.plan import PlannedTrial
from raystudy.orchestrate.progress import Display
from raystudy.orchestrate.session import Session
from raystudy.orchestrate.sweep import Placement, Queued, Sweep, TrialNews, check_placement
from raystudy.orchestrate.watch import Watch
from raystudy.orchestrate.worker import Work, train

if TYPE_CHECKING:
    from raystudy.orchestrate.driver import Outcome, Stop, Todo

LOOP_SECONDS = 0.1
PENDING_ON_A_CLUSTER = 32  # slots that an autoscaler is told of ahead of time


def run_on_ray(
    resources: Resources,
    ledger: Ledger,
    todo: Todo,
    films: Films,
    stop: Stop,
    outcome: Outcome,
    shown: Display,
    session: Session,
    work: Work = train,
) -> None:
    """Run everything that is to do; return when it ended or the wish to stop was followed."""
    study, placement = ledger.study, placement_of(resources, session)
    if session.local:
        check_placement(placement, session.cpus, session.gpus)
    metrics = StudyMetrics(study.name)
    metrics.images(sum(len(a.image_ids) for a in films.arrays.values()), films.quarantined)
    images = films.shared()
    waiting = [Queued(t.trial_id, ledger.rows[t.trial_id], films.key(t)) for t in todo.trials]
    sweep = Sweep(study, waiting, images, placement, stop, work)
    explainer = Explainer(
        study,
        images,
        session.explain_slots or max(1, int(session.cpus)),
        resources.explain_cpus,
        resources.explain_gpus,
        session.explain_slots > 0,
        resources.max_failures,
        stop,
    )
    watch = Watch(study, shown, outcome.states, metrics)
    trials = {t.trial_id: t for t in todo.involved}
    explaining = work is train
    watch.explain_total = len(todo.explanations) + (
        len(JOBS) * sum(t.explain.enabled for t in todo.trials) if explaining else 0
    )
    watch.begin(todo.involved)
    for trial, job in todo.explanations:
        explainer.add(_explain_job(ledger, films, trial, job))
    sweep.start()
    while True:
        ended = not sweep.running
        for news in _drain(sweep.news):
            watch.trial(news)
            outcome.trained += news.state == "finished"
            trial = trials[news.trial_id]
            if news.state == "finished" and trial.explain.enabled and explaining:
                for job in JOBS:
                    explainer.add(_explain_job(ledger, films, trial, job))
            elif news.state in ("failed", "diverged") and trial.explain.enabled and explaining:
                watch.explain_total -= len(JOBS)
        for news in explainer.poll(trials_running=not ended):
            watch.explanation(news)
            outcome.explained += news.state == "finished"
        watch.explain_running = explainer.running
        watch.tick(explainer.queue)
        if ended and not explainer.queue:
            break
        stop()
        time.sleep(LOOP_SECONDS)
    sweep.finish()
    watch.shown.running({})
    outcome.failures |= watch.failures


def placement_of(resources: Resources, session: Session) -> Placement:
    """Return what a trial occupies on this Ray.

    Where the cluster has no ``explain`` resource, CPUs are left free for explanation tasks.
    """
    limit = resources.max_concurrent
    if not session.explain_slots and not resources.gpus:
        room = max(1, int((session.cpus - resources.explain_cpus) // resources.cpus))
        limit = min(limit, room) if limit else room
    return Placement(
        resources.cpus,
        resources.gpus,
        resources.gpu_memory_gb,
        limit,
        resources.max_failures,
        pending=2 if session.local else PENDING_ON_A_CLUSTER,
    )


def _explain_job(ledger: Ledger, films: Films, trial: PlannedTrial, job: Job) -> ExplainJob:
    return ExplainJob(trial.trial_id, job, trial.explain, ledger.rows[trial.trial_id], films.key(trial))


def _drain(news: queue.SimpleQueue[TrialNews]) -> list[TrialNews]:
    found: list[TrialNews] = []
    while True:
        try:
            found.append(news.get_nowait())
        except queue.Empty:
            return found
