"""Real trials that meet with an accident on the way, once each, at a moment that a file of theirs names."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ray.cloudpickle

from raystudy.images.array import ImageArray
from raystudy.orchestrate.assignment import Assignment, Status
from raystudy.storage import Storage

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not see the tests

ACCIDENTS = "accidents"  # lines "kind stage polls", the next one first; "clock anywhere seconds" moves the clock
STEP_SECONDS = 0.3  # a step takes long enough for checkpoints, which may cost a twentieth of the time


def plan_accidents(directory: Storage, *accidents: str) -> None:
    directory.write_bytes(ACCIDENTS, "\n".join(accidents).encode())


def train(assignment: Assignment, images: ImageArray, should_stop: Callable[[], bool]) -> Status:
    """Train with a checkpoint as often as the rule allows; meet the next accident in its stage."""
    from raystudy.orchestrate.worker import read_inputs
    from raystudy.trial import TrialInterrupted, run_trial

    spec, cohort, tests = read_inputs(assignment)
    directory = assignment.directory
    file = Path(directory.uri) / ACCIDENTS
    waiting = file.read_text().splitlines() if file.exists() else []
    clock, asked = time.time, 0
    if waiting and waiting[0].startswith("clock"):
        moved = float(waiting.pop(0).split()[2])
        time.time = lambda: clock() + moved
    kind, stage, polls = waiting[0].split() if waiting else ("none", "", "0")

    def watched() -> bool:
        nonlocal asked
        time.sleep(STEP_SECONDS)
        if kind in ("kill", "memory", "hold") and stage_of(directory) == stage:
            asked += 1
            if asked == int(polls):
                file.write_text("\n".join(waiting[1:]))
                if kind == "memory":
                    raise MemoryError("told to run out")
                while kind == "hold":
                    (file.parent / "holds").touch()
                    time.sleep(0.05)  # until it is killed from outside
                os.kill(os.getpid(), signal.SIGKILL)
        return should_stop()

    try:
        result = run_trial(spec, cohort, tests, images, directory, should_stop=watched, checkpoint_pause=0.0)
    except TrialInterrupted:
        return "interrupted"
    finally:
        time.time = clock
    return "diverged" if result["status"] == "diverged" else "finished"


def stage_of(directory: Storage) -> str:
    """Return the stage that is under way after a trial's events (two epochs, the first of them warm)."""
    last = [e for e in directory.read_events("events") if e["event"] not in ("checkpoint", "retry")][-1]
    if last["event"] == "epoch":
        return {1: "joint", 2: "projection"}[last["epoch"]]
    if last["event"] in ("projection", "last_layer"):
        return "last_layer"
    return str(last["stage"])
