"""Trials and explanations of one run on a connected Ray: the driver's loop."""

from __future__ import annotations

import queue
import time
from functools import partial
from typing import Any

from raystudy.config import Resources
from raystudy.explanation_jobs import JOBS, Job
from raystudy.orchestrate.explain import Explainer, ExplainJob
from raystudy.orchestrate.metrics import StudyMetrics
from raystudy.orchestrate.plan import PlannedTrial, StudyPlan
from raystudy.orchestrate.search import Halving, value_of
from raystudy.orchestrate.search_tune import BookSearcher, HalvingScheduler
from raystudy.orchestrate.session import Session
from raystudy.orchestrate.slot import Placement, check_placement
from raystudy.orchestrate.state import Run
from raystudy.orchestrate.sweep import Queued, Sweep, TrialNews
from raystudy.orchestrate.watch import Watch

LOOP_SECONDS = 0.1
PENDING_ON_A_CLUSTER = 32  # slots that an autoscaler is told of ahead of time


def run_on_ray(run: Run, resources: Resources, session: Session) -> None:
    """Run everything that is to do; return when it ended or the wish to stop was followed."""
    placement = placement_of(resources, session)
    plan = run.book.base if run.book else run.ledger.plan  # what a search suggests has the base's films
    if session.local:
        check_placement(placement, session.cpus, session.gpus, _explanations(run, plan, resources, session))
    metrics = StudyMetrics(run.study.name, on_cluster=not session.local)
    metrics.images(len(plan.image_table) + run.films.left_out, run.films.quarantined)
    for trial in run.ledger.plan.trials:
        metrics.finished_before(trial.trial_id, trial.spec.task, trial.spec.h1_share, run.ledger.tests(trial))
    images = run.films.shared()
    explainer = Explainer(
        run.study,
        images,
        session.explain_slots or max(1, int(session.cpus)),
        Placement(resources.explain_cpus, resources.explain_gpus, max_failures=resources.max_failures),
        session.explain_slots > 0,
        run.stop,
        may_grow=not session.local,
        owner=run.stop.owner,
    )
    for trial, job in run.todo.explanations:
        explainer.add(_explain_job(run, trial, job))
    sweep = _sweep(run, images, placement)
    watch = Watch(run.study, run.shown, run.outcome.states, metrics)
    watch.explain_total = len(run.todo.explanations) + len(JOBS) * sum(map(run.explains, run.todo.trials))
    watch.begin(run.todo.involved)
    sweep.start()
    while True:
        ended = not sweep.running
        for news in _drain(sweep.news):
            _follow(run, news, watch, explainer)
        for news in explainer.poll(trials_running=not ended):
            watch.explanation(news)
            run.outcome.explained += news.state == "finished"
            run.outcome.interrupted |= news.state == "interrupted"
        watch.explain_running = explainer.running
        watch.tick(explainer.queue)
        if ended and not explainer.queue:
            break
        run.stop()
        time.sleep(LOOP_SECONDS)
    sweep.finish()
    watch.shown.running({})
    run.outcome.failures |= watch.failures


def _sweep(run: Run, images: dict[str, Any], placement: Placement) -> Sweep:
    """Return the sweep of the missing trials, or of a search that goes on."""
    waiting = [_queued(run, t) for t in run.todo.trials]
    sweep = Sweep(run.study, waiting, images, placement, run.stop, run.work, run.stop.owner)
    if run.book is not None and (run.todo.trials or run.todo.suggestions):
        scheduler = None
        if run.book.settings.scheduler == "asha":
            halving = Halving(run.study.storage, run.book.experiment.training.epochs, run.book.trials)
            halving.open()
            scheduler = HalvingScheduler(run.book, halving)
        watched = scheduler is not None
        sweep.searcher = BookSearcher(
            waiting,
            run.stop,
            run.book,
            run.ledger,
            partial(_queued, run),
            sweep.news,
            watched,
            more=run.todo.suggestions,
        )
        sweep.scheduler = scheduler
    return sweep


def _follow(run: Run, news: TrialNews, watch: Watch, explainer: Explainer) -> None:
    """Take over what became of a trial: its state, its explanations, its observation."""
    trial = run.book.trials[news.trial_id] if run.book else watch.trials[news.trial_id]
    if news.state == "waiting":
        watch.begin([trial])
        watch.explain_total += len(JOBS) * run.explains(trial)
    watch.trial(news)
    run.outcome.trained += news.state == "finished"
    if news.state == "finished" and run.explains(trial):
        for job in JOBS:
            explainer.add(_explain_job(run, trial, job))
    elif news.state in ("failed", "diverged", "stopped"):
        watch.explain_total -= len(JOBS) * run.explains(trial)
    if run.book and news.state in ("finished", "diverged", "stopped"):
        run.book.observe(news.trial_id, value_of(run.study, news.trial_id))


def _queued(run: Run, trial: PlannedTrial) -> Queued:
    return Queued(trial.trial_id, run.ledger.rows[trial.trial_id], run.films.key(trial))


def placement_of(resources: Resources, session: Session) -> Placement:
    """Return what a trial occupies on this Ray.

    Where the cluster has no ``explain`` resource, CPUs are left free for explanation tasks; not where it has no room
    for a trial either, as its machines are yet to come.
    """
    limit = resources.max_concurrent
    if not session.explain_slots and not resources.gpus:
        room = int((session.cpus - resources.explain_cpus) // resources.cpus)
        if room > 0 or session.local:
            room = max(1, room)
            limit = min(limit, room) if limit else room
    return Placement(
        resources.cpus,
        resources.gpus,
        resources.gpu_memory_gb,
        limit,
        resources.max_failures,
        pending=2 if session.local else PENDING_ON_A_CLUSTER,
        gpus_beside=resources.explain_gpus,
    )


def _explanations(run: Run, plan: StudyPlan, resources: Resources, session: Session) -> Placement | None:
    """Return what an explanation occupies, where there will be one; CPUs only where it has no slots of its own."""
    trials = (*run.todo.involved, *(plan.trials if run.todo.suggestions else ()))
    if not any(map(run.explains, trials)):
        return None
    return Placement(0 if session.explain_slots else resources.explain_cpus, resources.explain_gpus)


def _explain_job(run: Run, trial: PlannedTrial, job: Job) -> ExplainJob:
    rows, images = run.ledger.rows[trial.trial_id], run.films.key(trial)
    return ExplainJob(trial.trial_id, job, trial.explain, rows, images)


def _drain(news: queue.SimpleQueue[TrialNews]) -> list[TrialNews]:
    found: list[TrialNews] = []
    while True:
        try:
            found.append(news.get_nowait())
        except queue.Empty:
            return found
