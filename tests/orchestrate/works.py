"""Things a trial slot can do instead of training: they finish at once, sleep, or fail as they are told."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ray.cloudpickle

from raystudy.images.array import ImageArray
from raystudy.orchestrate.assignment import Assignment, Status, write_stop

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not see the tests


def null(assignment: Assignment, images: ImageArray, should_stop: Callable[[], bool]) -> Status:
    result = {"status": "finished", "tests": {}, "selected": {"val_accuracy": 50.0}}
    assignment.directory.write_json("result.json", result)
    return "finished"


def in_fours(assignment: Assignment, images: ImageArray, should_stop: Callable[[], bool]) -> Status:
    """Come in, wait until the party of four is whole, stay a while, and leave together; note the most ever inside."""
    hall = assignment.study.storage.child("hall")
    number = next(n for n in itertools.count(1) if hall.create_exclusive(f"came-{n:03d}", b""))
    whole, most, looks = 4 * math.ceil(number / 4), 0, 0

    def count(what: str) -> int:
        return sum(name.startswith(what) for name in hall.list())

    while count("stayed") < whole:  # nobody leaves before all four have seen each other
        came = count("came")  # before those who left, so nobody is counted twice
        most = max(most, came - count("left"))
        looks += came >= whole
        if looks == 50:
            hall.write_bytes(f"stayed-{number:03d}", b"")
        time.sleep(0.02)
    note = {"most": most, "whole": whole, "writeable": bool(images.pixels.flags.writeable)}
    assignment.directory.write_json("note.json", note)
    hall.write_bytes(f"left-{number:03d}", b"")
    return null(assignment, images, should_stop)


def until_stopped(assignment: Assignment, images: ImageArray, should_stop: Callable[[], bool]) -> Status:
    assignment.directory.append_event("events", {"time": time.time(), "event": "started", "epoch": 0, "epochs": 9})
    while not should_stop():
        time.sleep(0.05)
    return "interrupted"


def wish_to_stop(assignment: Assignment, images: ImageArray, should_stop: Callable[[], bool]) -> Status:
    """Ask the whole study to end as soon as one trial runs."""
    write_stop(assignment.study, "a test")
    return until_stopped(assignment, images, should_stop)


def fail_by_file(assignment: Assignment, images: ImageArray, should_stop: Callable[[], bool]) -> Status:
    """Fail as often as the trial's file `fail` says, with the error that it names."""
    folder = Path(assignment.directory.uri)
    try:
        kind, left = (folder / "fail").read_text().split()
    except FileNotFoundError:
        return null(assignment, images, should_stop)
    if int(left) > 0:
        (folder / "fail").write_text(f"{kind} {int(left) - 1}")
        if kind == "crash":
            import os

            os._exit(1)
        raise {"memory": MemoryError, "value": ValueError, "other": OSError}[kind]("told to fail")
    return null(assignment, images, should_stop)


def learn(assignment: Assignment, images: ImageArray, should_stop: Callable[[], bool]) -> Status:
    """Pretend to learn: the validation accuracy is best at a learning rate of 0.001 and grows with the epoch."""
    directory = assignment.directory
    spec = directory.read_json("spec.json")
    best = 100 - 20 * abs(math.log10(spec["training"]["lr_backbone"]) + 3)
    for epoch in range(1, spec["training"]["epochs"] + 1):
        if should_stop():
            return "interrupted"
        reached = best * epoch / spec["training"]["epochs"]
        directory.append_event(
            "events",
            {"time": time.time(), "event": "epoch", "epoch": epoch, "epochs": 9, "val_accuracy": reached},
        )
        time.sleep(0.8 if assignment.watched else 0)
    result = {"status": "finished", "tests": {}, "selected": {"val_accuracy": best}}
    directory.write_json("result.json", result)
    return "finished"
