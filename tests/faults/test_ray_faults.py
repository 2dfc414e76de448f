"""Workers, tasks and nodes of Ray may die, memory may run out, Tune may lose its state: the bytes are the same."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.plan import StudyPlan, plan_study
from raystudy.storage import Storage, open_storage
from raystudy.streams import stream
from raystudy.study import Study
from tests.faults import works
from tests.faults.conftest import Tally, Undisturbed

PACKED = ["resources.cpus=0.3", "resources.max_failures=6"]  # three trials at a time on two CPUs
STAGES = {"warm": 2, "joint": 2, "projection": 1, "last_layer": 2, "evaluate": 1}  # and the poll that is the last


def planned(undisturbed: Undisturbed, root: Path) -> tuple[StudyPlan, Storage, Study]:
    storage = open_storage(undisturbed.place(root))
    plan = plan_study(undisturbed.experiment(root, PACKED), storage)
    return plan, storage, Study(storage.child("tiny"))


def meet(undisturbed: Undisturbed, root: Path, accidents: list[list[str]]) -> dict[str, int]:
    """Run a study whose three trials meet with accidents; return how many there were and from where they went on."""
    plan, storage, study = planned(undisturbed, root)
    directories = [study.trial(t.trial_id) for t in plan.trials]
    for directory, planned_ones in zip(directories, accidents, strict=True):
        works.plan_accidents(directory, *planned_ones)
    outcome = run_study(plan, storage, work=works.train)
    assert (outcome.trained, outcome.failures) == (3, {})
    events = [e for directory in directories for e in directory.read_events("events")]
    told = [e["error"] for e in events if e["event"] == "retry"]
    assert len(told) == sum(not a.startswith("clock") for planned_ones in accidents for a in planned_ones)
    assert run_study(plan, storage).explained == 6
    undisturbed.assert_same(root)
    memory = sum("MemoryError" in error for error in told)
    resumed = sum(e["event"] == "resumed" for e in events)
    return {"killed": len(told) - memory, "out of memory": memory, "resumed": resumed}


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_workers_killed_in_each_stage_again_and_again(
    undisturbed: Undisturbed, tmp_path: Path, tally: Tally, ray_local: None
) -> None:
    draw, total = stream(7, "worker kills"), {"killed": 0, "out of memory": 0, "resumed": 0}
    for n in range(7):
        accidents: list[list[str]] = []
        for trial in range(3):
            stages = [list(STAGES)[i] for i in sorted(draw.integers(len(STAGES), size=5))]
            accidents.append([f"kill {stage} {draw.integers(1, STAGES[stage] + 1)}" for stage in stages])
            if trial == n % 3:
                accidents[-1][0] = accidents[-1][0].replace("kill", "memory")
        for name, count in meet(undisturbed, tmp_path / f"{n}", accidents).items():
            total[name] += count
    tally(f"7 studies of 3 packed trials, identical: {total}")
    assert total["killed"] == 98


def family(pid: int) -> Iterator[tuple[int, str]]:
    """Yield pid and command line of every process below one."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    below = {pid}
    for _ in range(4):
        below |= {child for child, parent in parents.items() if parent in below}
    for child in below - {pid}:
        yield child, title(child)


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


class Reaper(threading.Thread):
    """Kills the first attempts of this process's explanation tasks, so many of them."""

    def __init__(self, n_kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.left, self.draw, self.killed, self.ended = n_kills, stream(seed, "reaper"), list[str](), threading.Event()

    def run(self) -> None:
        while self.left > 0 and not self.ended.is_set():
            for pid, line in family(os.getpid()):
                name = line.strip().removeprefix("ray::")
                if line.startswith("ray::") and name.endswith((" prototypes", " faithfulness")):
                    time.sleep(float(self.draw.uniform(0, 0.4)))
                    if self.left > 0 and name not in self.killed and title(pid) == line:
                        os.kill(pid, signal.SIGKILL)
                        self.killed.append(name)
                        self.left -= 1
            time.sleep(0.01)


@pytest.mark.faults
def test_killed_explanation_tasks_end_with_the_same_bytes(
    undisturbed: Undisturbed, tmp_path: Path, tally: Tally, ray_local: None
) -> None:
    root = undisturbed.place(tmp_path / "studies", finished=True)
    for folder in (root / "tiny" / "trials").glob("*/explain"):
        shutil.rmtree(folder)
    storage = open_storage(root)
    plan = plan_study(undisturbed.experiment(root, PACKED), storage)
    reaper = Reaper(6, seed=6)
    reaper.start()
    outcome = run_study(plan, storage)
    reaper.ended.set()
    reaper.join()
    assert (outcome.explained, outcome.failures) == (6, {})
    undisturbed.assert_same(root)
    assert reaper.killed
    tally(f"{len(reaper.killed)} explanation tasks killed, identical")


class Vandal(threading.Thread):
    """Empties or deletes whatever Tune keeps, as long as it lives."""

    def __init__(self, folder: Path, how: str) -> None:
        super().__init__(daemon=True)
        self.folder, self.how, self.done, self.ended = folder, how, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            for path in list(self.folder.glob("raystudy-tune-*/*/*")):
                if self.how == "deleted":
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                    self.done += 1
                elif path.is_file() and path.stat().st_size:
                    path.write_bytes(b"")
                    self.done += 1


@pytest.mark.faults
@pytest.mark.parametrize("how", ["emptied", "deleted"])
def test_tune_may_lose_its_state(
    how: str,
    undisturbed: Undisturbed,
    tmp_path: Path,
    tally: Tally,
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    vandal = Vandal(tmp_path, how)
    vandal.start()
    plan, storage, _ = planned(undisturbed, tmp_path / "studies")
    outcome = run_study(plan, storage)
    vandal.ended.set()
    vandal.join()
    assert (outcome.trained, outcome.explained, outcome.failures) == (3, 6, {})
    undisturbed.assert_same(tmp_path / "studies")
    assert vandal.done
    tally(f"{vandal.done} files of Tune {how}, identical")


def test_packed_trials_and_explanations_that_die_end_with_the_same_bytes(
    undisturbed: Undisturbed, tmp_path: Path, tally: Tally, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    accidents = [["kill warm 2", "kill evaluate 1"], ["memory joint 2"], ["clock any 3600", "kill last_layer 2"]]
    vandal, reaper = Vandal(tmp_path, "deleted"), Reaper(2, seed=2)
    vandal.start()
    reaper.start()
    counts = meet(undisturbed, tmp_path / "studies", accidents)
    for thread in (vandal, reaper):
        thread.ended.set()
        thread.join()
    assert vandal.done
    assert reaper.killed
    tally(f"{counts}, {len(reaper.killed)} explanation tasks killed, {vandal.done} files of Tune deleted, identical")


NODE = """
import json, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from raystudy.config import load_experiment
from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.plan import plan_study
from raystudy.storage import open_storage
from raystudy.study import Study
from tests.faults import works
from tests.orchestrate.test_driver import Said

root = Path(sys.argv[2])
storage = open_storage(root)
plan = plan_study(load_experiment(Path(sys.argv[1]), [f"storage={root}", *json.loads(sys.argv[3])]), storage)
study = Study(storage.child("tiny"))
for trial in plan.trials:
    works.plan_accidents(study.trial(trial.trial_id), "hold joint 2")
options = {"num_cpus": 1, "resources": {"explain": 1}, "object_store_memory": 100_000_000}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
node = cluster.add_node(**options)
ray.init(address=cluster.address, log_to_driver=False)
said, outcomes = Said(), []
thread = threading.Thread(target=lambda: outcomes.append(run_study(plan, storage, work=works.train, shown=said)))
thread.start()
while len(list(root.glob("tiny/trials/*/holds"))) < 3 and thread.is_alive():
    time.sleep(0.05)
killed = len(list(root.glob("tiny/trials/*/holds")))
cluster.add_node(**options)
cluster.remove_node(node, allow_graceful=False)
thread.join()
rest = run_study(plan, storage, shown=said)
print(json.dumps([outcomes[0].trained, outcomes[0].failures, rest.explained, killed, said.lines]))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.faults
def test_a_node_that_dies_with_three_packed_trials_costs_no_byte(
    undisturbed: Undisturbed, tmp_path: Path, tally: Tally
) -> None:
    root = undisturbed.place(tmp_path / "studies")
    command = [sys.executable, "-c", NODE, str(undisturbed.file), str(root), json.dumps(PACKED)]
    here = Path(__file__).parents[2]
    token = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=here, env=token)
    assert done.returncode == 0, done.stderr[-3000:]
    trained, failures, explained, killed, said = json.loads(done.stdout.splitlines()[-1])
    assert (trained, failures, explained, killed) == (3, {}, 6, 3), said
    undisturbed.assert_same(root)
    directories = [Study.at(str(root), "tiny").trial(p.name) for p in (root / "tiny" / "trials").iterdir()]
    resumed = sum(e["event"] == "resumed" for d in directories for e in d.read_events("events"))
    tally(f"a node killed with {killed} trials, {resumed} went on from a checkpoint, identical")
