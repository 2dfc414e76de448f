"""The README keeps its word: its commands run as printed, its experiment is accepted, its files exist."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from raystudy.config import load_experiment
from tests.s3_server import free_port

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = [
    line.split("#")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines() if line.strip()
]
ON_A_CLUSTER = [c for c in COMMANDS if "cluster.yaml" in c or "experiments/paper.yaml" in c]
HERE = [c for c in COMMANDS if c.startswith("raystudy") and c not in ON_A_CLUSTER]
MAKE = [c for c in COMMANDS if c.startswith("make")]
ACTIVATE = next(c for c in COMMANDS if c.startswith(". "))
SMALLER = (  # the demo in half a minute
    "mixtures=[0,100]",
    "tasks={pneumonia: {positive: pneumonia, negatives: other_pathology}}",
    "cohort={train: 20, val: 8, test: 8, split_fractions: [0.5, 0.2, 0.3]}",
    "sources.H1.settings.patients=120",
    "sources.H2.settings.patients=120",
    "model.backbone_layers=2",
    "training.epochs=2",
    "training.projection_interval=2",
    "explain.adai_images=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A newcomer's folder."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    return folder


def run(command: str, folder: Path, *more: str) -> str:
    activate = ACTIVATE.replace(".venv", str(BIN.parent))
    done = subprocess.run(
        ["sh", "-e", "-c", f"{activate}\n{command} {shlex.join(more)}"],
        cwd=folder, env={**os.environ, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def test_every_command_is_run_by_this_file_by_make_or_on_the_test_cluster() -> None:
    assert len(HERE) >= 6
    assert set(COMMANDS) == {*HERE, *MAKE, ACTIVATE, *ON_A_CLUSTER}
    assert f"VENV := {ACTIVATE.split()[1].removesuffix('/bin/activate')}\n" in (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {c.split()[1] for c in MAKE} | set(re.findall(r"`make ([\w-]+)`", TEXT)) <= set(targets)
    cluster_test = (ROOT / "tests/cluster/test_ray_up.py").read_text()
    for command in ON_A_CLUSTER:
        program, verb, *words = command.split()
        assert f'"{verb}"' in cluster_test, f"the cluster test does not run `{program} {verb}`"
        for flag in (w for w in words if w.startswith("--")):
            run_here = any(c.startswith(f"{program} {verb} ") and flag in c for c in HERE)
            assert run_here or f'"{flag}"' in cluster_test, f"nothing runs `{program} {verb} {flag}`"


def test_commands_of_a_study_run_as_printed_one_after_the_other(folder: Path) -> None:
    for command in HERE:
        smaller = [word for value in SMALLER for word in ("--set", value)] if "experiments/" in command else []
        printed = run(command, folder, *smaller)
        if "--check" in command:
            assert "184/288" in printed
        if command.startswith("raystudy run") and "seeds" not in command and "only" not in command:
            assert "report" in printed
    results = list(folder.glob("studies/demo/trials/*/result.json"))
    assert len(results) == 4  # two mixtures; a second seed by --set seeds=[0,1]
    assert (folder / "studies/demo/report/index.html").stat().st_size > 100_000
    trial = next(r.parent.name for r in results if "-seed0-" in r.parent.name)  # the last command's plan
    film = next(folder.glob("studies/_phantoms/H1-*/*.png")).name
    smaller = [word for value in SMALLER for word in ("--set", value)]
    picture = run(f"raystudy explain experiments/demo.yaml {trial} H1/{film}", folder, *smaller).strip()
    assert Path(picture).read_bytes().startswith(b"\x89PNG")


def test_the_mlflow_command_serves_the_runs(folder: Path) -> None:
    (command,) = set(re.findall(r"`(mlflow ui [^`]+)`", TEXT))
    assert (folder / "mlflow.db").exists(), "written by the commands of the study"
    port = free_port()
    with subprocess.Popen(
        [str(BIN / "mlflow"), *shlex.split(command)[1:], "--port", str(port), "--workers", "1"],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    ) as server:  # fmt: skip
        try:
            uri = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=2):
                    break
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.3)
            asked = urllib.request.Request(
                f"{uri}/api/2.0/mlflow/runs/search",
                data=b'{"experiment_ids": ["1"], "max_results": 100}',
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(asked, timeout=30) as answer:
                told = answer.read().decode()
            trials = [p.parent.name for p in folder.glob("studies/demo/trials/*/result.json")]
            assert len(trials) == 4
            assert all(trial in told for trial in trials)
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # a session of its own: nobody else is in the group


def test_the_experiment_of_ones_own_hospitals_is_accepted(tmp_path: Path) -> None:
    (block,) = [block for kind, block in BLOCKS if kind == "yaml"]
    file = tmp_path / "ours.yaml"
    file.write_text(block)
    experiment = load_experiment(file)
    assert [s.kind for s in experiment.sources.values()] == ["manifest", "manifest"]


def test_files_and_pictures_that_are_named_exist() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / name).exists(), name
