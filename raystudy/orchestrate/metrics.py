"""What Prometheus sees of a study, through Ray: ``ray_raystudy_…``.

The driver alone exports them, from the study directory's events, so that no series ends with the worker that wrote it.
Everything exists from the start with the value 0; Ray's own counter cannot say 0, so the counts (``…_total``) are
gauges that only grow.
"""

from __future__ import annotations

from collections import Counter as Tally
from typing import Any

from ray.util.metrics import Gauge

from raystudy.study import STATES

_PER_TRIAL = ("study", "trial_id", "task", "h1_share")


class StudyMetrics:
    """The metrics of one study; needs a connected Ray."""

    def __init__(self, study: str) -> None:
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
        self._images = Gauge("raystudy_images", "Images of the study.", ("study",))
        self._live: dict[str, dict[str, str]] = {}
        for state in STATES:
            self._trials.set(0, {**self._study, "state": state})
        for gauge in (self._queue, self._quarantined, self._images):
            gauge.set(0, self._study)
        self._sums: dict[tuple[str, str], float] = {}
        for counter in (self._checkpoint_seconds, self._checkpoints, self._retries):
            self._add(counter, 0)
        for state in ("finished", "failed"):
            self._add(self._explained, 0, state=state)

    def _add(self, counter: Gauge, value: float, **tags: str) -> None:
        key = counter.info["name"], str(tags)
        self._sums[key] = self._sums.get(key, 0.0) + value
        counter.set(self._sums[key], {**self._study, **tags})

    def states(self, states: Tally[str]) -> None:
        for state in STATES:
            self._trials.set(states[state], {**self._study, "state": state})

    def images(self, n: int, quarantined: int) -> None:
        self._images.set(n, self._study)
        self._quarantined.set(quarantined, self._study)

    def queue(self, n: int) -> None:
        self._queue.set(n, self._study)

    def explained(self, state: str) -> None:
        self._add(self._explained, 1, state=state)

    def retry(self) -> None:
        self._add(self._retries, 1)

    def event(self, trial_id: str, task: str, h1_share: int, event: dict[str, Any]) -> None:
        """Take one event of a trial over."""
        tags = {**self._study, "trial_id": trial_id, "task": task, "h1_share": str(h1_share)}
        self._live[trial_id] = tags
        gauges = {
            "epoch": self._epoch,
            "epochs": self._epochs,
            "images_per_second": self._speed,
            "val_accuracy": self._validation,
        }
        for key, gauge in gauges.items():
            if event.get(key) is not None:
                gauge.set(float(event[key]), tags)
        if event.get("event") == "checkpoint":
            self._add(self._checkpoints, 1)
            self._add(self._checkpoint_seconds, max(0.0, float(event.get("seconds", 0))))

    def silence(self, trial_id: str, seconds: float) -> None:
        """Say how long ago a running trial wrote its last event."""
        if trial_id in self._live:
            self._event_age.set(seconds, self._live[trial_id])

    def ended(self, trial_id: str, tests: dict[str, Any]) -> None:
        """A trial ended; `tests` of its result.json."""
        tags = self._live.get(trial_id)
        if tags is None:
            return
        self._speed.set(0, tags)
        self._event_age.set(0, tags)
        for test_set, found in tests.items():
            self._accuracy.set(float(found["accuracy"]), {**tags, "test_set": test_set})
