"""All missing trials through Ray Tune: it places, retries and stops them; the study directory keeps them.

A Tune trial is a slot (``slot.py``).  Tune brings a slot back that died with its machine; whatever else fails the slot
tries again by itself.  Tune's own state goes to a folder that is thrown away.
"""

from __future__ import annotations

import logging
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

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from raystudy.orchestrate.assignment import FAILED, TrialRows, Work, words
from raystudy.orchestrate.slot import Placement, Shared, TrialSlot
from raystudy.results import write_sealed
from raystudy.study import Study

_TUNE_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the experiment keep their meaning
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # nobody reads it
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


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


def forgotten() -> None:
    """What Tune's throw-away folder keeps of an object that belongs to this process."""


class PlanSearcher(Searcher):
    """Hands out the planned trials in their order; the wish to stop ends it."""

    def __init__(self, waiting: Iterable[Queued], stopping: Callable[[], bool]) -> None:
        super().__init__()
        self._waiting = deque(waiting)
        self._stopping = stopping

    def __reduce__(self) -> Any:
        return forgotten, ()

    def suggest(self, trial_id: str) -> Any:
        if self._stopping() or not self._waiting:
            return Searcher.FINISHED
        return config_of(self._waiting.popleft())

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "wb") as file:
            pickle.dump(None, file)


def config_of(queued: Queued) -> dict[str, Any]:
    """Return what a slot is told of a trial."""
    return {
        "trial": queued.trial_id,
        "images": queued.images,
        "cohort": [queued.rows.cohort.path, queued.rows.cohort.sha256],
        "tests": [queued.rows.tests.path, queued.rows.tests.sha256],
    }


class _Reporter(tune.Callback, tune.Stopper):
    """Passes what Tune sees on to the driver's queue; has it drop what waits, by the wish to stop, when nothing runs.

    What runs ends by itself, with a checkpoint; what waits may wait for a machine that never comes.
    """

    def __init__(self, study: Study, news: queue.SimpleQueue[TrialNews], stopping: Callable[[], bool]) -> None:
        self._study, self._news, self._stopping = study, news, stopping
        self._trials: list[Any] = []

    def __reduce__(self) -> Any:
        return forgotten, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False  # no trial ends for its result

    def stop_all(self) -> bool:
        return self._stopping() and not any(trial.status == Trial.RUNNING for trial in self._trials)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._trials = trials

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._news.put(TrialNews(trial.config["trial"], "running"))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._news.put(TrialNews(trial.config["trial"], "retry", "the slot died"))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "status" not in result:
            return  # a watched trial goes on
        self._news.put(TrialNews(result["trial"], result["status"], result["message"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if "status" not in (trial.last_result or {}):
            self._news.put(TrialNews(trial.config["trial"], "stopped"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_error()
        message = words(error) if error is not None else "the slot died"
        mark = {"error": message, "attempts": trial.num_failures, "time": time.time()}
        write_sealed(self._study.trial(trial.config["trial"]), FAILED, mark, ())
        self._news.put(TrialNews(trial.config["trial"], "failed", message))


@dataclass
class Sweep:
    """A running sweep; Tune works in a thread of its own.

    Parameters
    ----------
    images : key -> reference of the shared ImageArray.
    stopping : the wish to stop; running trials see it by themselves, the sweep hands out no more and drops what waits.
    work : what a trial does; None trains it.
    owner : the token of the driver's lock.
    """

    study: Study
    waiting: list[Queued]
    images: dict[str, Any]
    placement: Placement
    stopping: Callable[[], bool]
    work: Work | None = None
    owner: str = ""
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
        shared = Shared(self.study, self.images, self.placement, self.work, self.owner)
        bundle = {"CPU": float(self.placement.cpus), "GPU": float(self.placement.gpu_request)}
        bundles = [{}, {name: share for name, share in bundle.items() if share}]
        slot = tune.with_resources(
            tune.with_parameters(TrialSlot, shared=shared), tune.PlacementGroupFactory(bundles, strategy="PACK")
        )
        slot.__qualname__ = slot.__name__ = TrialSlot.__name__  # as the Ray dashboard shows it
        searcher = self.searcher or PlanSearcher(self.waiting, self.stopping)
        reporter = _Reporter(self.study, self.news, self.stopping)
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
                callbacks=[reporter],
                stop=reporter,
            ),
        )
        try:
            tuner.fit()
        except ValueError as error:  # at the end, where somebody took away what Tune keeps: nobody asks for it
            if not str(error).startswith("No experiment snapshot file"):
                raise
