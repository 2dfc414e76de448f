"""Explanations of finished trials as named Ray tasks, beside the trials that still run.

A task takes a slot of the small ``explain`` resource and no CPU of the trials'; while trials run only some of the slots
are used.  A cluster's slots are counted again and again: its machines may join when the study has begun.  What failed
is recorded beside the job's files, reported at the end, and tried again by the next run.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions

from raystudy.explanation_jobs import Job, job_directory
from raystudy.explanation_settings import ExplainSettings
from raystudy.images.array import ImageArray
from raystudy.orchestrate.assignment import FAILED, Assignment, Device, Status, TrialRows, stop_watch, words
from raystudy.orchestrate.session import EXPLAIN
from raystudy.orchestrate.slot import Placement, is_final, pause_before_retry
from raystudy.results import write_sealed
from raystudy.study import Study

LOOK_SECONDS = 10.0  # between two looks at how many slots a cluster has
STOP_SECONDS = 60.0  # after the wish to stop: a task that has not ended by then may wait for a machine that never comes


@dataclass(frozen=True)
class ExplainJob:
    """One explanation of one finished trial."""

    trial_id: str
    job: Job
    settings: ExplainSettings
    rows: TrialRows
    images: str

    @property
    def name(self) -> str:
        return f"{self.trial_id} {self.job}"


@dataclass(frozen=True)
class ExplainNews:
    """How a job ended."""

    job: ExplainJob
    state: Status | str
    message: str = ""


@ray.remote(max_retries=0)
def explanation_task(job: Job, assignment: Assignment, images: ImageArray, settings: ExplainSettings) -> Status:
    """Do one explanation job in a process of its own."""
    from raystudy.orchestrate.worker import explain  # torch: in this process, not in the driver's

    return explain(job, assignment, images, settings, stop_watch(assignment.study, owner=assignment.owner))


@dataclass
class Explainer:
    """The queue of explanation jobs.

    Parameters
    ----------
    images : key -> reference of the shared ImageArray.
    slots : tasks at a time once no trial runs; half of them, at least one, before.
    placement : of a task: GPUs, failures, pauses; and CPUs, where the cluster has no ``explain`` resource.
    own_resource : the cluster has it.
    may_grow : other machines may join; both are looked up again now and then.
    owner : the token of the driver's lock.
    """

    study: Study
    images: dict[str, Any]
    slots: int
    placement: Placement
    own_resource: bool = True
    stopping: Callable[[], bool] = lambda: False
    may_grow: bool = False
    owner: str = ""
    _looked: float = field(default_factory=time.monotonic)
    _stopped: float = 0.0  # when the wish to stop was seen
    _cancelled: bool = False
    _waiting: deque[tuple[ExplainJob, int]] = field(default_factory=deque)
    _resting: list[tuple[float, ExplainJob, int]] = field(default_factory=list[tuple[float, ExplainJob, int]])
    _running: dict[Any, tuple[ExplainJob, int]] = field(default_factory=dict)

    def add(self, job: ExplainJob) -> None:
        self._waiting.append((job, 1))

    @property
    def queue(self) -> int:
        """Jobs that wait, rest after a failure, or run."""
        return len(self._waiting) + len(self._resting) + len(self._running)

    @property
    def running(self) -> list[str]:
        return [job.name for job, _ in self._running.values()]

    def poll(self, trials_running: bool) -> list[ExplainNews]:
        """Collect what has ended and launch what fits."""
        self._look_for_slots()
        news = self._collect()
        stopping, now = self.stopping(), time.monotonic()
        self._waiting += [(job, attempt) for due, job, attempt in self._resting if stopping or due <= now]
        self._resting = [rest for rest in self._resting if not stopping and rest[0] > now]
        if stopping:
            news += [ExplainNews(job, "interrupted") for job, _ in self._waiting]
            self._waiting.clear()
            self._cancel(now)
        limit = max(1, self.slots // 2) if trials_running else max(1, self.slots)
        while self._waiting and len(self._running) < limit:
            job, attempt = self._waiting.popleft()
            self._running[self._launch(job, attempt)] = (job, attempt)
        return news

    def _cancel(self, now: float) -> None:
        """Cancel, once, what has had time to end by itself since the wish to stop."""
        self._stopped = self._stopped or now
        if now > self._stopped + STOP_SECONDS and not self._cancelled:
            self._cancelled = True
            for ref in self._running:
                ray.cancel(ref)

    def _look_for_slots(self) -> None:
        if not self.may_grow or time.monotonic() < self._looked + LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        found = int(ray.cluster_resources().get(EXPLAIN, 0))
        if found:  # where all machines with slots have gone, a task that waits for one brings them back
            self.slots, self.own_resource = found, True

    def _collect(self) -> list[ExplainNews]:
        if not self._running:
            return []
        ready, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        news: list[ExplainNews] = []
        for ref in ready:
            job, attempt = self._running.pop(ref)
            try:
                news.append(ExplainNews(job, ray.get(ref)))
            except ray.exceptions.TaskCancelledError:
                news.append(ExplainNews(job, "interrupted"))
            except ray.exceptions.RayError as error:
                if attempt <= self.placement.max_failures and not is_final(error) and not self.stopping():
                    pause = pause_before_retry(error, attempt, self.placement, zlib.crc32(job.name.encode()))
                    self._resting.append((time.monotonic() + pause, job, attempt + 1))
                    news.append(ExplainNews(job, "retry", words(error)))
                    continue
                mark_failed(self.study, job, words(error), attempt)
                news.append(ExplainNews(job, "failed", words(error)))
        return news

    def _launch(self, job: ExplainJob, attempt: int) -> Any:
        options: dict[str, Any] = (
            {"num_cpus": 0, "resources": {EXPLAIN: 1}} if self.own_resource else {"num_cpus": self.placement.cpus}
        )
        name = job.name if attempt == 1 else f"{job.name} (attempt {attempt})"
        task = explanation_task.options(name=name, num_gpus=self.placement.gpus, **options)
        assignment = Assignment(self.study, job.trial_id, job.rows, Device(self.placement.gpus), owner=self.owner)
        return task.remote(job.job, assignment, self.images[job.images], job.settings)


def mark_failed(study: Study, job: ExplainJob, error: str, attempts: int) -> None:
    """Record a failed job beside its files."""
    path = f"{job_directory(job.job, job.settings)}/{FAILED}"
    write_sealed(study.trial(job.trial_id), path, {"error": error, "attempts": attempts, "time": time.time()}, ())
