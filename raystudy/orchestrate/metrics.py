"""What Prometheus sees of a study, through Ray: ``ray_raystudy_…``.

The driver alone exports them, from the study directory's events, so that no series ends with the worker that wrote it.
Everything exists from the start with the value 0; Ray's own counter cannot say 0, so the counts (``…_total``) are
gauges that only grow.  Ray forgets a gauge that nobody sets for a while, so all are set again now and then.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from typing import Any

from ray.util.metrics import Gauge

from raystudy.study import STATES

REFRESH_SECONDS = 2.0
_PER_TRIAL = ("study", "trial_id", "task", "h1_share")


class StudyMetrics:
    """The metrics of one study; needs a connected Ray.

    Parameters
    ----------
    on_cluster : this Ray outlives its drivers.  One of the driver's own ends with it, and takes its last words along.
    """

    def __init__(self, study: str, *, on_cluster: bool) -> None:
        self._study = {"study": study}
        self._trials = Gauge("raystudy_trials", "Trials by state.", ("study", "state"))
        self._epoch = Gauge("raystudy_epoch", "Completed epochs of a running trial.", _PER_TRIAL)
        self._epochs = Gauge("raystudy_epochs", "Epochs that a running trial will have.", _PER_TRIAL)
        self._speed = Gauge("raystudy_images_per_second", "Training speed of a running trial.", _PER_TRIAL)
        self._validation = Gauge("raystudy_validation_accuracy", "Validation accuracy of a trial, percent.", _PER_TRIAL)
        self._accuracy = Gauge(
            "raystudy_accuracy",
            "Test accuracy of a finished trial, percent.",
            ("study", "trial_id", "task", "h1_share", "test_set"),
        )
        self._event_age = Gauge(
            "raystudy_last_event_seconds", "Seconds since a running trial last said anything.", _PER_TRIAL
        )
        self._queue = Gauge("raystudy_explanation_queue", "Explanation jobs that wait or run.", ("study",))
        self._explained = Gauge("raystudy_explanations_total", "Explanation jobs that ended.", ("study", "state"))
        self._checkpoint_seconds = Gauge(
            "raystudy_checkpoint_seconds_total", "Seconds spent on checkpoints.", ("study",)
        )
        self._checkpoints = Gauge("raystudy_checkpoints_total", "Checkpoints written.", ("study",))
        self._retries = Gauge("raystudy_retries_total", "Trials and explanations that were tried again.", ("study",))
        self._quarantined = Gauge("raystudy_quarantined_images", "Images that cannot be read.", ("study",))
        self._images = Gauge("raystudy_images", "Images of the study, with those that cannot be read.", ("study",))
        self._on_cluster = Gauge("raystudy_on_cluster", "1 where Ray outlives the study's driver, else 0.", ("study",))
        self._live: dict[str, dict[str, str]] = {}
        self._last: dict[tuple[str, str], tuple[Gauge, float, dict[str, str]]] = {}
        self._refreshed = time.monotonic()
        for state in STATES:
            self._set(self._trials, 0, {**self._study, "state": state})
        self._set(self._on_cluster, float(on_cluster), self._study)
        for gauge in (self._queue, self._quarantined, self._images):
            self._set(gauge, 0, self._study)
        for counter in (self._checkpoint_seconds, self._checkpoints, self._retries):
            self._add(counter, 0)
        for state in ("finished", "failed"):
            self._add(self._explained, 0, state=state)

    def _add(self, counter: Gauge, value: float, **tags: str) -> None:
        tags = {**self._study, **tags}
        _, before, _ = self._last.get(_series(counter, tags), (counter, 0.0, tags))
        self._set(counter, before + value, tags)

    def _set(self, gauge: Gauge, value: float, tags: dict[str, str]) -> None:
        gauge.set(value, tags)
        self._last[_series(gauge, tags)] = gauge, value, tags

    def refresh(self) -> None:
        """Set every gauge again, when it is time."""
        now = time.monotonic()
        if now - self._refreshed >= REFRESH_SECONDS:
            self._refreshed = now
            for gauge, value, tags in self._last.values():
                gauge.set(value, tags)

    def states(self, states: Tally[str]) -> None:
        for state in STATES:
            self._set(self._trials, states[state], {**self._study, "state": state})

    def images(self, n: int, quarantined: int) -> None:
        self._set(self._images, n, self._study)
        self._set(self._quarantined, quarantined, self._study)

    def queue(self, n: int) -> None:
        self._set(self._queue, n, self._study)

    def explained(self, state: str) -> None:
        self._add(self._explained, 1, state=state)

    def retry(self) -> None:
        self._add(self._retries, 1)

    def begin(self, trial_id: str, task: str, h1_share: int) -> None:
        """A trial runs; from here on it is heard, or is silent."""
        self._live[trial_id] = self._tags(trial_id, task, h1_share)

    def event(self, trial_id: str, event: dict[str, Any]) -> None:
        """Take over one event of a trial that began."""
        tags = self._live.get(trial_id)
        if tags is None:
            return
        gauges = {
            "epoch": self._epoch,
            "epochs": self._epochs,
            "images_per_second": self._speed,
            "val_accuracy": self._validation,
        }
        for key, gauge in gauges.items():
            if event.get(key) is not None:
                self._set(gauge, float(event[key]), tags)
        if event.get("event") == "checkpoint":
            self._add(self._checkpoints, 1)
            self._add(self._checkpoint_seconds, max(0.0, float(event.get("seconds", 0))))

    def silence(self, trial_id: str, seconds: float) -> None:
        """Say how long ago a running trial began or wrote its last event."""
        if trial_id in self._live:
            self._set(self._event_age, seconds, self._live[trial_id])

    def rests(self, trial_id: str) -> None:
        """A trial runs no more, or not for now: its speed and silence are 0."""
        if trial_id in self._live:
            self._set(self._speed, 0, self._live[trial_id])
            self._set(self._event_age, 0, self._live[trial_id])

    def tested(self, trial_id: str, tests: dict[str, Any]) -> None:
        """A trial that began has ended; `tests` of its result.json, if any."""
        if trial_id in self._live:
            self._accuracies(self._live[trial_id], tests)

    def finished_before(self, trial_id: str, task: str, h1_share: int, tests: dict[str, Any]) -> None:
        """An earlier run finished a trial; `tests` of its result.json."""
        self._accuracies(self._tags(trial_id, task, h1_share), tests)

    def _tags(self, trial_id: str, task: str, h1_share: int) -> dict[str, str]:
        return {**self._study, "trial_id": trial_id, "task": task, "h1_share": str(h1_share)}

    def _accuracies(self, tags: dict[str, str], tests: dict[str, Any]) -> None:
        for test_set, found in tests.items():
            self._set(self._accuracy, float(found["accuracy"]), {**tags, "test_set": test_set})


def _series(gauge: Gauge, tags: dict[str, str]) -> tuple[str, str]:
    return str(gauge.info["name"]), str(sorted(tags.items()))
