"""A trial's process may die at any moment: what a later process ends with are the bytes of an uninterrupted trial."""

import dataclasses
import multiprocessing
import os
import signal
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from raystudy.storage import open_storage
from raystudy.streams import stream
from raystudy.trial import TrialInterrupted, TrialSpec, run_trial
from tests.faults.conftest import Tally
from tests.trial_example import MODEL, contents, data, spec

STAGES = ("warm", "joint", "projection", "last_layer", "evaluate")
SHORT = spec()
PRELOADED = ["raystudy.trial", "raystudy.torchvision_shim", "torch._dynamo", "tests.trial_example"]
# A few seconds, small enough for several checkpoints, published batch norm so that its last layer takes a while.
LONG = spec(
    {"epochs": 24, "projection_interval": 6, "warm_epochs": 4, "last_layer_bn": "published"},
    model=dataclasses.replace(MODEL, backbone_layers=1),
)


def run_until_killed(folder: str, trial: TrialSpec, stage: str | None, polls: int) -> None:
    """Run a trial; with a stage, die by SIGKILL when it has been asked to stop so many times in that stage."""
    storage = open_storage(folder)
    asked = Counter[str]()

    def should_stop() -> bool:
        if stage is not None:
            events = [e for e in storage.read_events("events") if e["event"] != "checkpoint"]
            asked[next_stage(events)] += 1
            if asked[stage] == polls:
                os.kill(os.getpid(), signal.SIGKILL)
        return False

    run_trial(trial, *data(), storage, should_stop=should_stop, checkpoint_pause=0.0)


def next_stage(events: list[dict[str, object]]) -> str:
    """Return the stage that is under way after these events of the short trial."""
    last = events[-1]
    if last["event"] == "evaluate":
        return "evaluate"
    if last["event"] == "projection":
        return "last_layer"
    if last["event"] == "epoch" and last["epoch"] in (2, 4):
        return "projection"
    return str(last["stage"]) if last["event"] in ("started", "resumed") else "joint"


def start(folder: Path, trial: TrialSpec, stage: str | None = None, polls: int = 0) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run_until_killed, args=(str(folder), trial, stage, polls))
    process.start()
    return process


def last_stage(folder: Path) -> str:
    events = open_storage(folder).read_events("events")
    return str(events[-1]["stage"]) if events else "start"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the short trial when nothing happens to it."""
    storage = open_storage(tmp_path_factory.mktemp("whole"))
    run_trial(SHORT, *data(), storage)
    return contents(storage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_trial_killed_in_a_stage_ends_with_the_same_bytes(
    stage: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    asked = iter(range(1, 1000))
    with pytest.raises(TrialInterrupted):  # so that there is a checkpoint to go on from
        run_trial(SHORT, *data(), open_storage(tmp_path / "killed"), should_stop=lambda: next(asked) == 2)
    killed = start(tmp_path / "killed", SHORT, stage, 2)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    run_trial(SHORT, *data(), open_storage(tmp_path / "killed"))
    assert contents(tmp_path / "killed") == whole


def kill_at_random_moments(folder: Path, n_kills: int, seed: int, tally: Tally) -> Counter[str]:
    """Kill a trial's process so many times, a new trial after each end; every end must be the same bytes."""
    run_trial(LONG, *data(), open_storage(folder / "whole"))
    whole, draw, died = contents(folder / "whole"), stream(seed, "kills"), Counter[str]()
    trials = resumed = 0
    while died.total() < n_kills:
        trials += 1
        storage = open_storage(folder / f"{trials}")
        while not storage.exists("result.json") and died.total() < n_kills:
            n_events = len(storage.read_events("events"))
            process = start(folder / f"{trials}", LONG)
            while process.is_alive() and len(storage.read_events("events")) == n_events:
                time.sleep(0.005)  # it still imports
            process.join(float(draw.uniform(0, 1.2)))
            if process.is_alive():
                process.kill()
                died[last_stage(folder / f"{trials}")] += 1
            process.join(60)
        run_trial(LONG, *data(), storage)
        assert contents(folder / f"{trials}") == whole
        resumed += sum(e["event"] == "resumed" for e in storage.read_events("events"))
    tally(f"{died.total()} kills ({dict(died)}), {resumed} resumed from a checkpoint, {trials} trials, identical")
    return died


def test_a_trial_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path, tally: Tally) -> None:
    assert kill_at_random_moments(tmp_path, 3, seed=1, tally=tally).total() == 3


@pytest.mark.faults
def test_a_hundred_kills_at_random_moments_change_no_byte(tmp_path: Path, tally: Tally) -> None:
    died = kill_at_random_moments(tmp_path, 100, seed=2, tally=tally)
    assert died.total() == 100
    assert {"warm", "joint", "last_layer"} <= set(died)
