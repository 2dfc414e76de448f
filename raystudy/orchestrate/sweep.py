"""All missing trials through Ray Tune: it places, retries and stops them; the study directory keeps them.

A Tune trial is a slot: a light actor that holds the trial's share of CPUs and GPUs and runs the trial as a Ray task
that bears the trial's name.  Slots are used again for the next trial (``reuse_actors``) and the tasks' processes too,
so that torch is imported once per slot.  A slot tries again after an error, with growing pauses when memory ran out;
Tune itself brings a slot back that died with its machine.  Tune's own state goes to a folder that is thrown away.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import queue
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
import ray.exceptions
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raystudy.errors import StudyError
from raystudy.images.array import ImageArray
from raystudy.orchestrate.ledger import FAILED, STOPPED, TrialRows
from raystudy.orchestrate.worker import Assignment, Device, Status, Work, rows_of, stop_watch, train, words
from raystudy.storage import Storage
from raystudy.study import Study

LONGEST_PAUSE = 300.0
STOP_SECONDS = 60.0  # for a trial that a search stopped early
_TUNE_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the experiment keep their meaning
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # nobody reads it
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Placement:
    """What one trial occupies and how often it may fail.

    Parameters
    ----------
    cpus, gpus, gpu_memory_gb, max_concurrent, max_failures : as the experiment's resources.
    pause : seconds before a trial that failed is tried again; doubled each time when memory ran out.
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


@dataclass(frozen=True)
class Queued:
    """One trial that waits: its id, its row files and the key of its pixels."""

    trial_id: str
    rows: TrialRows
    images: str


@dataclass(frozen=True)
class TrialNews:
    """What became of a trial: new and ``waiting``, ``running``, ``retry``, or how it ended."""

    trial_id: str
    state: Literal["waiting", "running", "retry", "finished", "diverged", "interrupted", "failed", "stopped"]
    message: str = ""


@dataclass(frozen=True)
class _Shared:
    """What every slot needs, handed over once."""

    study: Study
    images: dict[str, Any]  # key -> ObjectRef of an ImageArray
    placement: Placement
    work: Work


@ray.remote(max_retries=0)
def trial_task(work: Work, assignment: Assignment, images: ImageArray) -> Status:
    """Run one trial in a process of its own."""
    also = (assignment.directory, STOPPED) if assignment.watched else None
    return work(assignment, images, stop_watch(assignment.study, mark=also))


class TrialSlot(tune.Trainable):
    """Room for one trial at a time; used again for the next."""

    def setup(self, config: dict[str, Any], shared: _Shared | None = None) -> None:
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
        stopped = stop_watch(self.shared.study)
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
                    self._directory.write_json(FAILED, mark)
                    return self._over("failed", message)
                retry = {"time": time.time(), "event": "retry", "attempt": self._attempt, "error": message}
                self._directory.append_event("events", retry)
                _sleep(pause_before_retry(error, self._attempt, placement), stopped)

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
            num_gpus=placement.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )
        assignment = Assignment(shared.study, trial_id, rows, device, bool(self.config.get("watched")))
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


def pause_before_retry(error: BaseException, attempt: int, placement: Placement) -> float:
    """Return seconds; packed trials that ran out of memory together come back one after the other."""
    if not is_out_of_memory(error):
        return placement.pause
    return min(LONGEST_PAUSE, placement.oom_pause * 2 ** (attempt - 1) * (1 + (os.getpid() % 8) / 8))


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stopped():
        time.sleep(min(0.2, max(0.0, until - time.monotonic())))


def _forgotten() -> None:
    """What Tune's throw-away folder keeps of an object that belongs to this process."""


class PlanSearcher(Searcher):
    """Hands out the planned trials in their order; the wish to stop ends it."""

    def __init__(self, waiting: Iterable[Queued], stopping: Callable[[], bool]) -> None:
        super().__init__()
        self._waiting = deque(waiting)
        self._stopping = stopping

    def __reduce__(self) -> Any:
        return _forgotten, ()

    def suggest(self, trial_id: str) -> Any:
        if self._stopping() or not self._waiting:
            return Searcher.FINISHED
        return config_of(self._waiting.popleft())

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "wb") as file:
            pickle.dump(None, file)

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("Tune's state is never restored: the study directory is the truth")


def config_of(queued: Queued) -> dict[str, Any]:
    """Return what a slot is told of a trial."""
    return {
        "trial": queued.trial_id,
        "images": queued.images,
        "cohort": [queued.rows.cohort.path, queued.rows.cohort.sha256],
        "tests": [queued.rows.tests.path, queued.rows.tests.sha256],
    }


class _Reporter(tune.Callback):
    """Passes what Tune sees on to the driver's queue."""

    def __init__(self, study: Study, news: queue.SimpleQueue[TrialNews]) -> None:
        self._study, self._news = study, news

    def __reduce__(self) -> Any:
        return _forgotten, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._news.put(TrialNews(trial.config["trial"], "running"))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._news.put(TrialNews(trial.config["trial"], "retry", "the slot died"))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "status" not in result:
            return  # a watched trial goes on
        for _ in range(int(result["attempts"]) - 1):
            self._news.put(TrialNews(result["trial"], "retry"))
        self._news.put(TrialNews(result["trial"], result["status"], result["message"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if "status" not in (trial.last_result or {}):
            self._news.put(TrialNews(trial.config["trial"], "stopped"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_error()
        message = words(error) if error is not None else "the slot died"
        mark = {"error": message, "attempts": trial.num_failures, "time": time.time()}
        self._study.trial(trial.config["trial"]).write_json(FAILED, mark)
        self._news.put(TrialNews(trial.config["trial"], "failed", message))


@dataclass
class Sweep:
    """A running sweep; Tune works in a thread of its own.

    Parameters
    ----------
    images : key -> reference of the shared ImageArray.
    stopping : the wish to stop; trials see it by themselves, the sweep hands out no more.
    work : what a trial does.
    """

    study: Study
    waiting: list[Queued]
    images: dict[str, Any]
    placement: Placement
    stopping: Callable[[], bool]
    work: Work = train
    searcher: Searcher | None = None
    scheduler: TrialScheduler | None = None
    news: queue.SimpleQueue[TrialNews] = field(default_factory=queue.SimpleQueue)
    _thread: threading.Thread | None = None
    _error: BaseException | None = None

    def start(self) -> None:
        if self.waiting or self.searcher is not None:
            self._thread = threading.Thread(target=self._run, name="raystudy-tune", daemon=True)
            self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the end and raise what ended Tune, if something did."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="raystudy-tune-", ignore_cleanup_errors=True) as folder:
                self._tune(folder)
        except BaseException as error:  # handed to the driver's thread, which raises it
            self._error = error

    def _tune(self, folder: str) -> None:
        os.environ.update({**_TUNE_SETTINGS, "TUNE_MAX_PENDING_TRIALS_PG": str(self.placement.pending)})
        for name in ("ray.tune", "ray.train", "ray.air"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        shared = _Shared(self.study, self.images, self.placement, self.work)
        bundle = {"CPU": float(self.placement.cpus), "GPU": float(self.placement.gpus)}
        bundles = [{}, {name: share for name, share in bundle.items() if share}]
        slot = tune.with_resources(
            tune.with_parameters(TrialSlot, shared=shared), tune.PlacementGroupFactory(bundles, strategy="PACK")
        )
        searcher = self.searcher or PlanSearcher(self.waiting, self.stopping)
        tuner = tune.Tuner(
            slot,
            param_space={},
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=self.scheduler,
                num_samples=-1,
                max_concurrent_trials=self.placement.max_concurrent,
                reuse_actors=True,
                trial_name_creator=lambda trial: str(trial.config["trial"]),
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name=self.study.name,
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=max(1, self.placement.max_failures)),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[_Reporter(self.study, self.news)],
            ),
        )
        tuner.fit()


def check_placement(placement: Placement, cpus: float, gpus: float) -> None:
    """Refuse trials that can never be placed on a machine that does not grow.

    Raises
    ------
    StudyError : a trial asks for more than there is.
    """
    for name, wanted, have in (("cpus", placement.cpus, cpus), ("gpus", placement.gpus, gpus)):
        if wanted > have:
            raise StudyError(
                f"a trial asks for {wanted:g} {name}, this machine has {have:g}",
                where=f"resources.{name}",
                remedy=f"--set resources.{name}={math.floor(have)}, or --address of a larger cluster",
            )
