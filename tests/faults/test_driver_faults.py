"""The driver, or the Ray below it, may die at any moment: the next `raystudy run` ends with the same bytes."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from raystudy.results import damaged_files
from raystudy.storage import open_storage
from raystudy.streams import stream
from raystudy.study import Study
from tests.faults.conftest import Tally, Undisturbed
from tests.faults.processes import Driver, driver, wait_until

ONE = ("--set", "mixtures=[50]")  # one trial and its two explanations


def progress(study: Path) -> int:
    """Return how far a study is: files and events, whichever they are."""
    n = 0
    for folder, _, names in os.walk(study):
        n += len(names)
        if "events" in names:
            n += (Path(folder) / "events").read_bytes().count(b"\n")
    return n


def moment(study: Path) -> str:
    """Name what a driver is about."""
    place = open_storage(study)
    names = place.list()
    n_trials = len({n.split("/")[1] for n in names if n.startswith("trials/")})
    results = sum(n.endswith("/result.json") for n in names)
    done = sum(n.endswith("/done.json") for n in names)
    if "lock.json" not in names:
        return "before the lock"
    if not any(n.endswith("/events") for n in names):
        return "preparation"
    if results < n_trials:
        events = [e for n in names if n.endswith("/events") for e in place.read_events(n)]
        staged = [e for e in events if "stage" in e]  # a slot that is tried again says so without one
        return str(max(staged, key=lambda e: e["time"])["stage"]) if staged else "preparation"
    return "explanation" if done < 2 * n_trials else "report"


def wait_for_a_moment(started: Driver, study: Path, whole: int, draw: np.random.Generator) -> None:
    """Wait until somewhere on a driver's way: up to a third of a study further, or the seconds of its start."""
    if draw.random() < 0.1:
        time.sleep(float(draw.uniform(0, 4)))
        return
    aim = progress(study) + int(draw.integers(1, max(2, whole // 3)))
    wait_until(lambda: progress(study) >= aim, started)
    time.sleep(float(draw.uniform(0, 0.3)))


def strike(started: Driver, how: str) -> bool:
    """Let a driver meet with an accident; return False when it was done before."""
    if not started.alive:
        return False
    if how == "driver":
        started.kill()
        return True
    if how == "raylet":
        raylet = started.one("/raylet")
        if raylet is not None:
            os.kill(raylet, signal.SIGKILL)
        return started.end()[0] != 0  # it ends by itself
    started.process.send_signal(signal.SIGTERM)
    code, out = started.end(10)  # the grace that schedulers give; later it fails
    assert code in (0, 130, signal.SIGTERM, -signal.SIGTERM), out  # the last two: before it listens
    return code != 0


def assert_checkpointed(study: Study) -> None:
    """A trial that was told to stop has said so last, after its checkpoint."""
    for trial_id, names in study.files().items():
        events = study.trial(trial_id).read_events("events") if "result.json" not in names else []
        if any(event["event"] == "epoch" for event in events):
            assert events[-1]["event"] == "interrupted"
            assert any(name.startswith("checkpoint/") for name in names)


def strike_drivers(
    undisturbed: Undisturbed, folder: Path, accidents: list[str], seed: int, tally: Tally, *options: str
) -> Counter[str]:
    """Let drivers meet with accidents, a new study after each end; every end must be the same bytes."""
    draw, moments, studies = stream(seed, "driver accidents"), Counter[str](), 0
    n_trials = 1 if options else 3
    whole = progress(undisturbed.root / "tiny") * n_trials // 3  # until a study of as many trials has ended
    waiting = list(accidents)
    while waiting:
        studies += 1
        storage = undisturbed.place(folder / f"{studies}")
        struck = True
        while struck and waiting:
            with driver(undisturbed.file, storage, *options) as started:
                wait_for_a_moment(started, storage / "tiny", whole, draw)
                about = moment(storage / "tiny")
                struck = strike(started, waiting[0])
                if struck:
                    how = waiting.pop(0)
                    moments[f"{how} at {about}"] += 1
                    if how == "SIGTERM":
                        assert_checkpointed(Study(open_storage(storage / "tiny")))
                if draw.random() < 0.5:  # the other half of the drivers meet what the last one left behind
                    started.wait_until_gone()
        with driver(undisturbed.file, storage, *options) as last:
            code, out = last.end()
            assert code == 0, out
            last.wait_until_gone()
        undisturbed.assert_same(storage, n_trials)
        whole = progress(storage / "tiny")
        study = open_storage(storage / "tiny")
        assert not damaged_files(study, "report.json")  # a driver that died in its report has one that is whole
        assert study.exists("report/tables/accuracy.csv")
        assert not (storage / "tiny" / "lock.json").exists()
    tally(f"{moments.total()} accidents ({dict(sorted(moments.items()))}), {studies} studies, identical")
    return moments


@pytest.mark.faults
def test_a_driver_that_is_terminated_in_training_leaves_a_checkpoint_within_its_grace(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    storage = undisturbed.place(tmp_path / "studies")
    study = Study(open_storage(storage / "tiny"))

    def trains() -> bool:
        return any(e["event"] == "epoch" for t in study.files() for e in study.trial(t).read_events("events"))

    longer = (*ONE, "--set", "training.epochs=80", "--set", "explain.enabled=false")
    with driver(undisturbed.file, storage, *longer) as started:
        wait_until(trains, started)
        assert strike(started, "SIGTERM")
        ((trial_id, names),) = study.files().items()
        assert "result.json" not in names
        assert_checkpointed(study)
    with driver(undisturbed.file, storage, *longer) as last:
        code, out = last.end()
        assert code == 0, out
    assert "resumed" in [e["event"] for e in study.trial(trial_id).read_events("events")]


@pytest.mark.faults
def test_a_search_whose_driver_dies_keeps_what_it_decided(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Suggestions and stops that were written down before the death are what the next driver goes on with."""
    storage = undisturbed.place(tmp_path / "studies")
    study = Study(open_storage(storage / "tiny"))
    space = '{"training.lr_backbone": {"loguniform": [1e-5, 1e-1]}}'
    options = ("--set", f"search={{space: {space}, trials: 6, algorithm: random, scheduler: asha, mixtures: [50]}}")
    options += ("--set", "training.epochs=40", "--set", "explain.enabled=false")

    def told() -> dict[str, bytes]:
        names = [n for n in study.storage.list("search") if n.endswith(".json")]
        return {n: study.storage.read_bytes(n) for n in names}

    def decided() -> list[tuple[str, str, bool]]:
        return [(e["rung"], e["trial"], e["goes_on"]) for e in study.storage.read_events("search/rungs")]

    with driver(undisturbed.file, storage, *options) as started:
        wait_until(lambda: any(not goes_on for *_, goes_on in decided()), started)
        started.kill()
        started.wait_until_gone()
    before, first = told(), decided()
    with driver(undisturbed.file, storage, *options) as last:
        code, out = last.end()
        assert code == 0, out
    after = told()
    assert {n: after[n] for n in before} == before
    assert decided()[: len(first)] == first
    assert len({(rung, trial) for rung, trial, _ in decided()}) == len(decided())  # asked once a rung
    states = {t.trial_id: t.state for t in study.status().trials}
    assert set(states.values()) == {"finished", "stopped"}
    assert len(states) == 6
    hopeless = {t for _, t, goes_on in decided() if not goes_on}
    assert {t for t, s in states.items() if s == "stopped"} <= hopeless  # one may have ended before it was told
    assert len(first) < len(decided())


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(2))
def test_fifty_killed_drivers_change_no_byte(part: int, undisturbed: Undisturbed, tmp_path: Path, tally: Tally) -> None:
    moments = strike_drivers(undisturbed, tmp_path, ["driver"] * 25, 10 + part, tally, *ONE)
    assert moments.total() == 25
    assert len(moments) >= 4  # all along a driver's way


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", ["raylet", "SIGTERM"])
def test_dead_raylets_and_terminated_drivers_change_no_byte(
    how: str, undisturbed: Undisturbed, tmp_path: Path, tally: Tally
) -> None:
    assert strike_drivers(undisturbed, tmp_path, [how] * 6, 20, tally, *ONE).total() == 6
