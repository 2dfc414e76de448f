"""A slot: the light Tune actor that holds a trial's share of CPUs and GPUs and runs it as a Ray task of its name.

Slots are used again for the next trial (``reuse_actors``), and so are the tasks' processes, so that torch is imported
once per slot.  A slot tries again after an error, with growing pauses when memory ran out.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.exceptions
from ray import tune
from ray._raylet import setproctitle  # pyright: ignore[reportAttributeAccessIssue]
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raystudy.errors import StudyError
from raystudy.images.array import ImageArray
from raystudy.orchestrate.assignment import (
    FAILED,
    STOPPED,
    Assignment,
    Device,
    Status,
    Work,
    perform,
    rows_of,
    stop_watch,
    words,
)
from raystudy.results import write_sealed
from raystudy.storage import Storage
from raystudy.study import Study

LONGEST_PAUSE = 300.0
STOP_SECONDS = 60.0  # for a trial that a search stopped early


@dataclass(frozen=True)
class Placement:
    """What one trial, or explanation, occupies and how often it may fail.

    Parameters
    ----------
    cpus, gpus, gpu_memory_gb, max_concurrent, max_failures : as the experiment's resources.
    gpus_beside : a trial's only: the share of a GPU that an explanation needs beside the trials on it.
    pause, oom_pause : seconds before what failed is tried again; the second when memory ran out, doubled each time.
    pending : slots that are asked for ahead of time; an autoscaler sees them.
    """

    cpus: float = 1
    gpus: float = 0
    gpu_memory_gb: float | None = None
    max_concurrent: int | None = None
    max_failures: int = 3
    pause: float = 1.0
    oom_pause: float = 10.0
    pending: int = 2
    gpus_beside: float = 0

    @property
    def gpu_request(self) -> float:
        """What Ray is asked for, of a GPU.

        Where the trials of a GPU would fill it, and explanations so wait for the last one, it is a little less: as many
        trials as before and an explanation.  Where a trial more would fit then, it stays ``gpus``.
        """
        on_one = int(1 / self.gpus + 1e-9) if self.gpus else 0
        if not on_one or on_one * self.gpus + self.gpus_beside <= 1:
            return self.gpus
        less = math.floor((1 - self.gpus_beside) / on_one * 1e4) / 1e4  # Ray counts in ten thousandths
        return less if (on_one + 1) * less > 1 else self.gpus


@dataclass(frozen=True)
class Shared:
    """What every slot needs, handed over once."""

    study: Study
    images: dict[str, Any]  # key -> ObjectRef of an ImageArray
    placement: Placement
    work: Work | None  # None: a real trial
    owner: str  # the token of the driver's lock


@dataclass(frozen=True)
class TitledDirectory(Storage):
    """A trial's directory that shows its latest event as the title of this process: in `top` and Ray's dashboard.

    Its events name the driver by the token of its lock: another driver's trials are not running.
    """

    trial_id: str = ""
    driver: str = ""

    def append_event(self, path: str, event: Mapping[str, object]) -> None:
        super().append_event(path, {**event, "driver": self.driver})
        if "stage" in event:
            setproctitle(f"ray::{self.trial_id} {event['stage']} {event.get('epoch', 0)}/{event.get('epochs', '?')}")


@ray.remote(max_retries=0)
def trial_task(work: Work | None, assignment: Assignment, images: ImageArray) -> Status:
    """Run one trial in a process of its own."""
    if work is None:
        from raystudy.orchestrate.worker import train  # torch: in this process, not in the slot's

        work = train
    directory = assignment.directory
    titled = TitledDirectory(directory.uri, directory.retry_seconds, assignment.trial_id, assignment.owner)
    mark = (directory, STOPPED) if assignment.watched else None
    should_stop = stop_watch(assignment.study, mark=mark, owner=assignment.owner)
    return perform(work, replace(assignment, place=titled), images, should_stop)


class TrialSlot(tune.Trainable):
    """Room for one trial at a time; used again for the next."""

    def setup(self, config: dict[str, Any], shared: Shared | None = None) -> None:
        assert shared is not None
        self.shared = shared
        self._begin()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end_task()
        self._begin()
        return True

    def cleanup(self) -> None:
        self._end_task()

    def step(self) -> dict[str, Any]:
        """Run the trial to its end; when it is watched, only to its next validation accuracy."""
        placement = self.shared.placement
        stopped = stop_watch(self.shared.study, owner=self.shared.owner)
        while True:
            if self._task is None:
                if stopped():
                    return self._over("interrupted")
                self._attempt += 1
                self._task = self._launch(self._attempt)
            ready, _ = ray.wait([self._task], timeout=self._look_seconds)
            if not ready:
                found = self._latest_value()
                if found:
                    return found
                continue
            task, self._task = self._task, None
            try:
                return self._over(ray.get(task))
            except ray.exceptions.RayError as error:
                message = words(error)
                if self._attempt > placement.max_failures or is_final(error):
                    mark = {"error": message, "attempts": self._attempt, "time": time.time()}
                    write_sealed(self._directory, FAILED, mark, ())
                    return self._over("failed", message)
                retry = {"time": time.time(), "event": "retry", "attempt": self._attempt, "error": message}
                self._directory.append_event("events", {**retry, "driver": self.shared.owner})
                _sleep(pause_before_retry(error, self._attempt, placement, os.getpid()), stopped)

    def _begin(self) -> None:
        self._task: Any = None
        self._attempt = 0
        self._seen = 0

    @property
    def _directory(self) -> Storage:
        return self.shared.study.trial(str(self.config["trial"]))

    @property
    def _look_seconds(self) -> float | None:
        if not self.config.get("watched"):
            return None
        return 0.5 if self.shared.study.storage.is_local else 3.0

    def _over(self, status: str, message: str = "") -> dict[str, Any]:
        return {
            "trial": self.config["trial"],
            "status": status,
            "attempts": self._attempt,
            "message": message,
            "done": True,
        }

    def _latest_value(self) -> dict[str, Any] | None:
        events = self._directory.read_events("events", self._seen)
        self._seen += len(events)
        found = [e for e in events if e.get("val_accuracy") is not None and e.get("epoch")]
        if not found:
            return None
        return {"trial": self.config["trial"], "epoch": found[-1]["epoch"], "val_accuracy": found[-1]["val_accuracy"]}

    def _end_task(self) -> None:
        """Wait for a task whose trial was stopped early: it sees its mark and writes a checkpoint."""
        task, self._task = self._task, None
        if task is not None:
            ray.wait([task], timeout=STOP_SECONDS)
            ray.cancel(task, force=True)

    def _launch(self, attempt: int) -> Any:
        shared, placement = self.shared, self.shared.placement
        trial_id = str(self.config["trial"])
        rows = rows_of(tuple(self.config["cohort"]), tuple(self.config["tests"]))
        device = Device(placement.gpus, placement.gpu_memory_gb)
        group = get_current_placement_group()
        assert group is not None  # Tune places every slot in one
        task = trial_task.options(
            name=trial_id if attempt == 1 else f"{trial_id} (attempt {attempt})",
            num_cpus=placement.cpus,
            num_gpus=placement.gpu_request,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )
        watched = bool(self.config.get("watched"))
        assignment = Assignment(shared.study, trial_id, rows, device, watched, shared.owner)
        return task.remote(shared.work, assignment, shared.images[self.config["images"]])


def is_final(error: BaseException) -> bool:
    """Whether trying again cannot help: a rule was broken."""
    return isinstance(getattr(error, "cause", None), ValueError | TypeError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: of the GPU, of the process, or of the node (Ray ends a worker then)."""
    cause = getattr(error, "cause", None)
    return isinstance(error, ray.exceptions.OutOfMemoryError) or (
        cause is not None and (isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError")
    )


def pause_before_retry(error: BaseException, attempt: int, placement: Placement, who: int = 0) -> float:
    """Return seconds; by ``who``, those that ran out of memory together come back one after the other."""
    if not is_out_of_memory(error):
        return placement.pause
    return min(LONGEST_PAUSE, placement.oom_pause * 2 ** (attempt - 1) * (1 + (who % 8) / 8))


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stopped():
        time.sleep(min(0.2, max(0.0, until - time.monotonic())))


def check_placement(placement: Placement, cpus: float, gpus: float, explanation: Placement | None = None) -> None:
    """Refuse trials and explanations that can never be placed on a machine that does not grow.

    Raises
    ------
    StudyError : a trial, or an explanation, asks for more than there is.
    """
    asked = [("a trial", "cpus", placement.cpus, cpus), ("a trial", "gpus", placement.gpus, gpus)]
    if explanation is not None:
        asked.append(("an explanation", "explain_cpus", explanation.cpus, cpus))
        asked.append(("an explanation", "explain_gpus", explanation.gpus, gpus))
    lacking = [one for one in asked if one[2] > one[3]]
    if lacking:
        sets = " ".join(f"--set resources.{key}={math.floor(have)}" for _, key, _, have in lacking)
        raise StudyError(
            "; ".join(
                f"{who} asks for {wanted:g} {key.removeprefix('explain_')}, this machine has {have:g}"
                for who, key, wanted, have in lacking
            ),
            where=", ".join(f"resources.{key}" for _, key, _, _ in lacking),
            remedy=f"{sets}, or --address of a larger cluster",
        )
