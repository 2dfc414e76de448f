"""The wall clock may be set, forward or back: nothing is believed dead, alive, due or late because of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from raystudy.checkpoint import CheckpointClock
from raystudy.lock import LOCK, StudyLock, locked
from raystudy.storage import open_storage
from raystudy.study import Study
from tests.faults.conftest import Tally, Undisturbed
from tests.faults.processes import driver, wait_until

HOUR = 3600.0

# Every Python process of a study sees this clock, also Ray's workers; a file says by how much it is wrong.
SITE = """
import os, time
known = time.time

def moved():
    try:
        with open(os.environ["RAYSTUDY_TEST_CLOCK"]) as file:
            return known() + float(file.read() or 0)
    except OSError:
        return known()

time.time = moved
"""


@pytest.mark.parametrize("moved", [HOUR, -HOUR])
def test_a_dead_driver_is_dead_and_a_living_one_alive_whatever_the_clock_says(
    moved: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path / "tiny")
    clock = time.time
    with locked(storage, beat_seconds=0.05) as lock:
        monkeypatch.setattr(time, "time", lambda: clock() + moved)
        beat = storage.read_json(LOCK)["heartbeat"]
        until = time.monotonic() + 60
        while abs(storage.read_json(LOCK)["heartbeat"] - beat) < HOUR / 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert not lock.lost
        assert Study(storage).driver() is not None
        left = storage.read_bytes(LOCK)
    monkeypatch.undo()
    storage.write_bytes(LOCK, json.dumps({**json.loads(left), "pid": 2**22 + 1}).encode())  # no process has that
    assert Study(storage).driver() is None  # its last heartbeat is an hour away
    with locked(storage):
        assert StudyLock(storage).lost is False


@pytest.mark.parametrize("moved", [HOUR, -HOUR])
def test_checkpoints_are_due_by_a_clock_that_nobody_sets(moved: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, known = CheckpointClock(share=0.05, n_bytes=0, shortest=100.0), time.time
    monkeypatch.setattr(time, "time", lambda: known() + moved)
    assert not clock.due()


@pytest.mark.parametrize("moved", [HOUR, -HOUR])
def test_a_status_of_events_from_a_moved_clock_has_no_time_below_zero(
    moved: float, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    root = undisturbed.place(tmp_path / "studies", finished=True)
    study = Study.at(str(root), "tiny")
    with locked(study.storage) as lock:
        for trial_id in study.trial_ids():
            directory = study.trial(trial_id)
            directory.delete("result.json")
            events = [e for e in directory.read_events("events") if e["event"] in ("started", "epoch")]
            directory.delete("events")
            for n, event in enumerate(events[:2]):
                changed = {"time": event["time"] + n * moved, "epoch": n, "driver": lock.token}
                directory.append_event("events", {**event, **changed})
        status = study.status()
    assert status.counts["running"] == 3
    for trial in status.trials:
        assert trial.seconds_left is None or trial.seconds_left > 0


@pytest.mark.faults
def test_a_clock_that_is_moved_by_an_hour_and_back_changes_no_byte(
    undisturbed: Undisturbed, tmp_path: Path, tally: Tally
) -> None:
    site, clock = tmp_path / "site", tmp_path / "clock"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    root = undisturbed.place(tmp_path / "studies")
    moves = 0
    with driver(undisturbed.file, root, PYTHONPATH=str(site), RAYSTUDY_TEST_CLOCK=str(clock)) as started:
        for n_events, moved in ((1, HOUR), (2, -HOUR), (3, 0.0), (3, 24 * HOUR)):
            wait_until(lambda n=n_events: len(list(root.glob("tiny/trials/*/events"))) >= n, started)
            clock.write_text(str(moved))
            moves += started.alive
            time.sleep(0.5)
        code, out = started.end()
    assert code == 0, out
    undisturbed.assert_same(root)
    times = [e["time"] for p in root.glob("tiny/trials/*") for e in open_storage(p).read_events("events")]
    assert max(times) - min(times) > HOUR / 2  # the trials did see it
    tally(f"the clock of a study moved {moves} times, identical")
