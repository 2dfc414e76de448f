"""What the service costs beside the training itself: starting trials, keeping slots busy, checkpoints, `status`.

Everything runs through the product's own driver on one local Ray with two slots; bare Tune runs in the same session.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from benchmarks import service_works
from raystudy.orchestrate.assignment import Work
from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.session import connect
from raystudy.results import write_sealed
from raystudy.status_text import table
from raystudy.storage import open_storage
from raystudy.study import Study
from tests.orchestrate import tiny

SLOTS = 2
ROUNDS = 3
NULL_TRIALS = 60
MANY = 2000
SLEEPERS = 22
SLEEP_SECONDS = 20.0
CHECKPOINTS = 2
RESNET34 = [
    "mixtures=[50]",
    "images.size=64",
    "model={backbone: resnet34, weights: none}",
    "cohort={train: 20, val: 6, test: 6}",
    "training={epochs: 100000, warm_epochs: 1, projection_interval: 100000, batch_size: 8, schedule: constant}",
]
LONG_SCHEDULE = [  # the paper's: its results are as long as they get
    "mixtures=[50]",
    "training={epochs: 50, warm_epochs: 5, projection_interval: 10, last_layer_epochs: 20, batch_size: 8}",
]


def rows(sleep_seconds: float = SLEEP_SECONDS, many: int = MANY) -> Iterator[dict[str, Any]]:
    """Yield the measured rows: name, ratio, ours, peer, unit, n, note."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else every other process goes before Ray's workers
    with tempfile.TemporaryDirectory(prefix="raystudy-bench-") as folder:
        place = Path(folder)
        tiny.make_films(place)
        with connect(cpus=SLOTS, dashboard=False):
            yield from null_trials(place)
            yield sleepers(place, sleep_seconds)
            yield from many_null_trials(place, many)
            yield from checkpoints(place)
            _run(place, "long", LONG_SCHEDULE)
        yield from status(place, many)


def null_trials(place: Path, n: int = NULL_TRIALS, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """The driver against bare Tune, in turns after one short round that decodes the films and starts the processes."""
    arms: list[Callable[[int, str], None]] = [
        lambda count, name: _run(place, name, _mixtures(count), service_works.nothing),
        lambda count, name: _bare_tune(place, count),
        lambda count, name: _bare_tune(place, count, reuse_actors=True),
    ]
    seconds: list[list[float]] = [[] for _ in arms]
    for turn in range(rounds + 1):
        for arm, found in zip(arms, seconds, strict=True):
            begun = time.monotonic()
            arm(n if turn else 10, f"null-{turn}")
            if turn:
                found.append(time.monotonic() - begun)
    ours, peer, quick_peer = (statistics.median(found) / n for found in seconds)
    note = f"{SLOTS} slots, {n} no-op trials a round, {rounds} rounds, Tune without its loggers; ≤ 1.5"
    return [
        _row("null trials / bare Tune", ours / peer, ours, peer, "s/trial", rounds * n, note),
        _row(
            "null trials / bare Tune, actors reused", ours / quick_peer, ours, quick_peer, "s/trial", rounds * n, note
        ),
    ]


def sleepers(place: Path, seconds: float) -> dict[str, Any]:
    """Trials that only sleep keep both slots busy."""
    begun = time.monotonic()
    _run(place, "sleepers", _mixtures(SLEEPERS), partial(service_works.sleep, seconds=seconds))
    spent, ideal = time.monotonic() - begun, SLEEPERS / SLOTS * seconds
    note = f"{SLEEPERS} × {seconds:g} s on {SLOTS} slots, Ray running; peer is the ideal; ≤ 1.05"
    return _row("sleepers / ideal", spent / ideal, spent, ideal, "s", SLEEPERS, note)


def many_null_trials(place: Path, n: int) -> list[dict[str, Any]]:
    """Seconds a trial do not grow with the number of trials."""
    few, seconds = n // 10, []
    for count, name in ((few, "few"), (n, "many")):
        begun = time.monotonic()
        _run(place, name, _mixtures(count), service_works.nothing)
        seconds.append((time.monotonic() - begun) / count)
    ends = sorted(p.stat().st_mtime for p in (place / "studies" / "many" / "trials").glob("*/result.json"))
    early, late = ((ends[i + few] - ends[i]) / few for i in (few // 4, n - few - 1))
    return [
        _row(f"a null trial among {n} / among {few}", seconds[1] / seconds[0], *seconds[::-1], "s", n, "whole runs"),
        _row(f"the last {few} of {n} / {few} early ones", late / early, late, early, "s", few, "about 1 = linear"),
    ]


def checkpoints(place: Path) -> list[dict[str, Any]]:
    """A trial with checkpoints of ResNet34 size is killed and goes on."""
    _run(place, "killed", RESNET34, partial(service_works.train_and_die_once, checkpoints=CHECKPOINTS))
    study = Study(open_storage(place / "studies" / "killed"))
    (trial_id,) = study.trial_ids()
    trial = study.trial(trial_id)
    killed, step = trial.read_json("killed.json")["time"], trial.read_json("first_step.json")
    events = [event for event in trial.read_events("events") if event["time"] <= killed]
    writes = [event for event in events if event["event"] == "checkpoint"]
    first, whole = step["time"] - step["began"], events[-1]["time"] - events[0]["time"]
    spent, size = sum(event["seconds"] for event in writes), writes[-1]["bytes"] / 1e6
    note = f"{size:.0f} MB, after SIGKILL; {step['time'] - killed:.1f} s with a new process and its imports; peer: 10 s"
    share = f"{len(writes)} of {size:.0f} MB, {spent / len(writes):.2f} s each; peer: 5 % of the time"
    return [
        _row("resume to the first step", first / 10, first, 10, "s", 1, note),
        _row("checkpoints' share of a trial", spent / whole / 0.05, spent, 0.05 * whole, "s", len(writes), share),
    ]


def status(place: Path, n: int) -> list[dict[str, Any]]:
    """`raystudy status` on a study of real trials; needs the study `long`."""
    experiment = _study_of(place, n)
    command = [sys.executable, "-m", "raystudy.cli", "status", str(experiment)]
    study, seconds = Study(open_storage(place / "studies" / "status")), []
    for arm in (lambda: subprocess.run(command, check=True, capture_output=True), lambda: _printed(study)):
        found = []
        for _ in range(ROUNDS):
            begun = time.monotonic()
            arm()
            found.append(time.monotonic() - begun)
        seconds.append(statistics.median(found))
    note = f"{n} trials with the paper's schedule on a local folder; peer: 2 s allowed"
    return [
        _row("raystudy status, the command", seconds[0] / 2, seconds[0], 2, "s", ROUNDS, note),
        _row("raystudy status, without start", seconds[1] / 2, seconds[1], 2, "s", ROUNDS, "the same in a process"),
    ]


def _printed(study: Study) -> None:
    from rich.console import Console

    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        Console(file=nowhere, width=200).print(table(study.status()))


def _study_of(place: Path, n: int) -> Path:
    """Make a study of n trials out of a finished one: 95 % finished, the rest running; return its experiment file."""
    file = tiny.experiment_file(place, place / "studies", **{"name": "status"})
    root, source = place / "studies" / "status", Study(open_storage(place / "studies" / "long"))
    (finished,) = source.trial_ids()
    files = source.files()[finished]
    ids = [f"{finished[:-6]}{i:06x}" for i in range(n)]
    for i, trial_id in enumerate(ids):
        for name in files if i % 20 else ("spec.json", "events"):
            target = root / "trials" / trial_id / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(place / "studies" / "long" / "trials" / finished / name, target)
    plan = {key: value for key, value in source.plan().items() if key not in ("checksum", "sha256")}
    write_sealed(open_storage(root), "plan.json", {**plan, "study": "status", "trials": ids}, ())
    return file


def _mixtures(n: int) -> list[str]:
    """Ask for n trials: the mixtures of the paper as far as they go, and seeds."""
    shares = next(k for k in (11, 10, 5, 2, 1) if n % k == 0)
    return [f"mixtures={[100 * i // max(1, shares - 1) for i in range(shares)]}", f"seeds={list(range(n // shares))}"]


def _run(place: Path, name: str, overrides: list[str], work: Work | None = None) -> None:
    storage = open_storage(place / "studies")
    plan = plan_study(tiny.experiment(place, place / "studies", overrides, name=name), storage)
    outcome = run_study(plan, storage, work=work)
    assert not outcome.failures, outcome.failures


def _bare_tune(place: Path, n: int, reuse_actors: bool = False) -> None:
    def nothing(config: dict[str, Any]) -> None:
        pass

    for name in ("TUNE_MAX_PENDING_TRIALS_PG", "RAY_AIR_NEW_OUTPUT"):  # what the driver's sweep set
        os.environ.pop(name, None)
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    tuner = tune.Tuner(
        tune.with_resources(nothing, {"CPU": 1}),
        tune_config=tune.TuneConfig(num_samples=n, reuse_actors=reuse_actors),
        run_config=tune.RunConfig(name=f"bare-{time.time_ns()}", storage_path=str(place / "bare"), verbose=0),
    )
    assert tuner.fit().num_errors == 0


def _row(name: str, ratio: float, ours: float, peer: float, unit: str, n: int, note: str) -> dict[str, Any]:
    return {"name": name, "ratio": ratio, "ours": ours, "peer": peer, "unit": unit, "n": n, "note": note}
