"""What the service's benchmarks let a trial slot do; Ray's workers get these functions by value."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import ray.cloudpickle

from raystudy.images.array import ImageArray
from raystudy.orchestrate.assignment import Assignment, Status

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def nothing(assignment: Assignment, images: ImageArray, should_stop: Callable[[], bool]) -> Status:
    """Finish at once."""
    result = {"status": "finished", "tests": {}, "selected": {"val_accuracy": 50.0}}
    assignment.directory.write_json("result.json", result)
    return "finished"


def sleep(assignment: Assignment, images: ImageArray, should_stop: Callable[[], bool], *, seconds: float) -> Status:
    """Sleep, then finish."""
    time.sleep(seconds)
    return nothing(assignment, images, should_stop)


def train_and_die_once(
    assignment: Assignment, images: ImageArray, should_stop: Callable[[], bool], *, checkpoints: int
) -> Status:
    """Train until so many checkpoints are there and be killed; the second time stop after the first step."""
    from raystudy.orchestrate.worker import train  # torch: imports are not counted

    began, directory = time.time(), assignment.directory
    resumed = directory.exists("killed.json")

    def after_step() -> bool:
        if resumed:
            directory.write_json("first_step.json", {"began": began, "time": time.time()})
            return True
        if sum(event["event"] == "checkpoint" for event in directory.read_events("events")) >= checkpoints:
            directory.write_json("killed.json", {"time": time.time()})
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    return train(assignment, images, after_step)
