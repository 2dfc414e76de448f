"""What the driver sees of a running study: states and events, passed on to the display and the metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from raystudy.errors import StudyError
from raystudy.orchestrate.explain import ExplainNews
from raystudy.orchestrate.metrics import StudyMetrics
from raystudy.orchestrate.plan import PlannedTrial
from raystudy.orchestrate.progress import Display
from raystudy.orchestrate.sweep import TrialNews
from raystudy.study import Study

ENDS = ("finished", "diverged", "failed", "interrupted", "stopped")


@dataclass
class Watch:
    """States of all trials and explanation jobs of one run.

    Parameters
    ----------
    states : of every trial of the plan.
    metrics : None where no Ray is connected.
    """

    study: Study
    shown: Display
    states: dict[str, str]
    metrics: StudyMetrics | None = None
    trials: dict[str, PlannedTrial] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    explain_total: int = 0
    explain_done: int = 0
    explain_running: list[str] = field(default_factory=list)
    _events: dict[str, int] = field(default_factory=dict)
    _detail: dict[str, str] = field(default_factory=dict)
    _spoke: dict[str, float] = field(default_factory=dict)
    _retried: set[str] = field(default_factory=set[str])  # whose last word is that they are tried again
    _looked: float = 0.0

    def begin(self, trials: Iterable[PlannedTrial]) -> None:
        """Show the trials that this run is about."""
        self.trials |= {t.trial_id: t for t in trials}
        self._counted()

    def trial(self, news: TrialNews) -> None:
        """Take over what the sweep says of a trial."""
        trial_id = news.trial_id
        self.states[trial_id] = "waiting" if news.state == "retry" else news.state
        if news.state == "retry":
            self._look_at(trial_id)
            if trial_id not in self._retried:  # else its slot told of the same death
                self._again(trial_id, news.message)
            self._rests(trial_id)
        if news.state == "running":
            self._retried.discard(trial_id)
            self._spoke[trial_id] = time.monotonic()
            if self.metrics and trial_id in self.trials:
                spec = self.trials[trial_id].spec
                self.metrics.begin(trial_id, spec.task, spec.h1_share)
            if trial_id not in self._events:
                self._look_at(trial_id)
        if news.state in ENDS:
            self._look_at(trial_id)
            self._rests(trial_id)
            self._ended(news)
        self._counted()

    def explanation(self, news: ExplainNews) -> None:
        """Take over how an explanation job ended."""
        if news.state == "retry":
            self.shown.say(f"again {news.job.name}: {news.message}")
            if self.metrics:
                self.metrics.retry()
            return
        if news.state == "failed":
            self.failures[news.job.name] = news.message
            self.shown.say(f"failed {news.job.name}: {news.message}")
        if news.state in ("finished", "failed"):
            self.explain_done += 1
            if self.metrics:
                self.metrics.explained(news.state)
        self._counted()

    def tick(self, explain_queue: int = 0) -> None:
        """Look at the events of the running trials, now and then."""
        pause = 0.5 if self.study.storage.is_local else 3.0
        now = time.monotonic()
        if now - self._looked < pause:
            return
        self._looked = now
        running = [t for t, state in self.states.items() if state == "running"]
        for trial_id in running:
            self._look_at(trial_id)
            if self.metrics:
                self.metrics.silence(trial_id, now - self._spoke.get(trial_id, now))
        lines = {t: self._detail.get(t, "0/1 starting") for t in running}
        self.shown.running({**lines, **dict.fromkeys(self.explain_running, "0/1 explaining")})
        if self.metrics:
            self.metrics.queue(explain_queue)
            self.metrics.refresh()

    def _look_at(self, trial_id: str) -> None:
        """Take over what a trial has said since the last look; the first one only counts what earlier runs left."""
        before = self._events.get(trial_id)
        try:
            events = self.study.trial(trial_id).read_events("events", before or 0)
        except StudyError:
            return  # the storage is away; the trial and the next look will tell
        self._events[trial_id] = (before or 0) + len(events)
        if before is None:
            return
        if events:
            self._spoke[trial_id] = time.monotonic()
        for event in events:
            if event.get("event") == "retry":
                self._retried.add(trial_id)
                self._again(trial_id, str(event.get("error", "")))
            else:
                self._retried.discard(trial_id)
            if self.metrics and trial_id in self.trials:
                self.metrics.event(trial_id, event)
            self._detail[trial_id] = _detail(event) or self._detail.get(trial_id, "")

    def _again(self, trial_id: str, message: str) -> None:
        self.shown.say(f"again {trial_id}: {message}" if message else f"again {trial_id}")
        if self.metrics:
            self.metrics.retry()

    def _rests(self, trial_id: str) -> None:
        """A trial runs no more, or not for now."""
        for kept in (self._detail, self._spoke):
            kept.pop(trial_id, None)
        if self.metrics:
            self.metrics.rests(trial_id)

    def _ended(self, news: TrialNews) -> None:
        trial_id, detail = news.trial_id, ""
        result = self._result(trial_id) if news.state == "finished" else {}
        if news.state == "failed":
            self.failures[trial_id] = news.message
            detail = f": {news.message}"
        elif news.state == "finished":
            detail = _verdict(result)
        if self.metrics:
            self.metrics.tested(trial_id, result.get("tests", {}))
        self.shown.say(f"{news.state} {trial_id}{detail}")

    def _result(self, trial_id: str) -> dict[str, Any]:
        try:
            return dict(self.study.trial(trial_id).read_json("result.json"))
        except (FileNotFoundError, StudyError, ValueError):
            return {}

    def _counted(self) -> None:
        counts = Counter(self.states.values())
        done = counts["finished"] + counts["diverged"] + counts["stopped"]
        detail = ", ".join(
            f"{counts[s]} {s}" for s in ("running", "failed", "diverged", "stopped", "interrupted") if counts[s]
        )
        self.shown.count("trials", done, len(self.states), detail)
        if self.explain_total:
            self.shown.count("explanations", self.explain_done, self.explain_total)
        if self.metrics:
            self.metrics.states(counts)


def _detail(event: dict[str, Any]) -> str:
    if event.get("epoch") is None or event.get("epochs") is None:
        return ""
    speed = f"  {event['images_per_second']:.0f} images/s" if event.get("images_per_second") else ""
    validation = f"  validation {event['val_accuracy']:.1f} %" if event.get("val_accuracy") is not None else ""
    return f"{event['epoch']}/{event['epochs']} {event.get('stage', '')}{speed}{validation}"


def _verdict(result: dict[str, Any]) -> str:
    tests = result.get("tests", {})
    shown = "  ".join(f"{name} {found['accuracy']:.1f} %" for name, found in tests.items())
    return f": {shown}" if shown else ""
