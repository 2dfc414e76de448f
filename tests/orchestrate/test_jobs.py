"""`raystudy submit` and `stop` against a real head in namespaces of its own: the job outlives its client."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.job_submission import JobSubmissionClient

from raystudy.config import Resources, load_experiment
from raystudy.errors import StudyError
from raystudy.orchestrate import driver, jobs
from raystudy.orchestrate.cluster import placement_of
from raystudy.orchestrate.dashboard import Dashboard
from raystudy.orchestrate.local_paths import refuse_local_paths
from raystudy.orchestrate.session import Session
from raystudy.study import Study
from tests.orchestrate import tiny
from tests.orchestrate.private_space import ADDRESS, BIN, GATE, Space, needs_a_space, wait_for

HERE, FROM_ELSEWHERE = "http://127.0.0.1:8265", f"http://{GATE}:8265"
TASKS = """
import json, ray
from ray.util.state import list_actors, list_tasks
ray.init("auto", logging_level=40)
print(json.dumps([[t.name for t in list_tasks(limit=1000)], [[a.class_name, a.name] for a in list_actors()]]))
"""


@pytest.fixture
def long_study(space: Space) -> Path:
    """An experiment whose trials take long enough to be stopped, with paths from the current folder on."""
    training = {
        "epochs": 60, "warm_epochs": 1, "projection_interval": 20, "last_layer_epochs": 2, "batch_size": 8,
        "schedule": "constant", "lr_backbone": 1e-3,
    }  # fmt: skip
    two = {"mixtures": [0, 100], "resources": {"cpus": 0.5}, "explain": {"enabled": False}}  # at the same time
    path = tiny.experiment_file(space.home / "films", "studies", training=training, **two)
    path.write_text(path.read_text().replace(str(space.home / "films"), "films"))
    return path


def job_names(space: Space) -> list[str]:
    listed = space.run(BIN / "ray", "job", "list", "--address", HERE, RAY_AUTH_MODE="token")
    assert listed.returncode == 0, listed.stderr
    return sorted(set(re.findall(r"raystudy-tiny-[\w-]+", listed.stdout)))


def states(space: Space, experiment: Path) -> dict[str, str]:
    """Return each trial's state as `raystudy status` tells it."""
    told: dict[str, Any] = json.loads(space.raystudy("status", experiment, "--json").stdout)
    return {t["trial_id"]: t["state"] for t in told["trials"]}


def epochs(study: Path) -> list[int]:
    """Return how many epochs each trial that has started trained, from its events."""
    return [p.read_text().count('"event":"epoch"') for p in study.glob("trials/*/events")]


@needs_a_space
def test_local_paths_are_refused_for_a_cluster_elsewhere(space: Space, long_study: Path) -> None:
    before = job_names(space)
    for more, refused in (
        ([], "storage is the local path 'studies'"),
        (["--set", "storage=s3://bucket/studies"], "sources.H1.root is the local path 'films'"),
    ):
        done = space.raystudy("submit", long_study, "--address", FROM_ELSEWHERE, *more, elsewhere=True)
        assert done.returncode == 2
        assert refused in done.stderr
        assert "=s3://bucket/path" in done.stderr
    assert job_names(space) == before


@pytest.mark.parametrize("key", ["storage", "sources.H1.root", "sources.H2.root", "sources.H1.images"])
@pytest.mark.parametrize("scheme", ["", "file://", "FILE://"])
def test_a_local_path_is_one_however_it_is_written(key: str, scheme: str, tmp_path: Path) -> None:
    nih = {"kind": "nih", "root": "s3://bucket/nih", "images": "s3://bucket/films"}
    chexpert = {"kind": "chexpert", "root": "s3://bucket/chexpert"}
    file = tiny.experiment_file(tmp_path, "s3://bucket/studies", sources={"H1": nih, "H2": chexpert})
    refuse_local_paths(load_experiment(file), "the cluster")
    with pytest.raises(StudyError, match=f"{key} is the local path '{scheme}{tmp_path}'") as refusal:
        refuse_local_paths(load_experiment(file, [f"{key}={scheme}{tmp_path}"]), "the cluster")
    assert refusal.value.remedy == f"put it on object storage and name it: --set {key}=s3://bucket/path"


def test_a_weights_file_is_refused_wherever_it_is_asked_for(tmp_path: Path) -> None:
    nih, chexpert = ({"kind": kind, "root": f"s3://bucket/{kind}"} for kind in ("nih", "chexpert"))
    for weights in ("none", "imagenet", "../w.safetensors", str(tmp_path / "w.safetensors"), "s3://bucket/w"):
        both = ["none", weights] if weights != "none" else [weights]
        asked = {
            "model.weights": {"model": {"weights": weights}},
            "axes.model.weights": {"axes": {"model.weights": both}},
            "search.space.model.weights": {"search": {"space": {"model.weights": {"choice": both}}, "trials": 2}},
        }
        for key, more in asked.items():
            two = {"H1": nih, "H2": chexpert}
            experiment = tiny.experiment(tmp_path, "s3://bucket/studies", sources=two, **more)
            if weights in ("none", "imagenet"):
                refuse_local_paths(experiment, "the cluster")
                continue
            with pytest.raises(StudyError, match=f"{key} is the file '{weights}'"):
                refuse_local_paths(experiment, "the cluster")


def test_a_run_on_a_cluster_elsewhere_refuses_local_paths_before_it_does_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny.experiment(tmp_path, tmp_path / "studies")
    with pytest.raises(StudyError, match="storage is the local path"):
        driver.run(experiment, address="192.0.2.1:6379")  # nobody's
    with pytest.raises(StudyError, match=r"sources\.H1\.root is the local path"):
        driver.run(experiment.model_copy(update={"storage": "s3://bucket/studies"}), address="192.0.2.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    for command in (driver.run, driver.prepare_only):
        with pytest.raises(StudyError, match="storage is the local path"):
            command(experiment)
    assert not (tmp_path / "studies").exists()


@needs_a_space
def test_an_mlflow_on_the_heads_loopback_is_not_expected_here(space: Space, long_study: Path) -> None:
    tracking = ("--set", "tracking.enabled=true", "--set", "tracking.uri=http://127.0.0.1:9")
    done = space.raystudy("doctor", long_study, *tracking, "--address", HERE)
    assert (done.returncode, "on the cluster's head" in done.stdout) == (0, True), done.stdout


@needs_a_space
def test_a_newer_study_is_refused_before_a_job_is_made(space: Space, long_study: Path) -> None:
    before = job_names(space)
    newer = space.home / "studies" / "newer" / "plan.json"
    newer.parent.mkdir(parents=True)
    newer.write_text(json.dumps({"format": 99}))
    newer.with_name("lock.json").write_text(json.dumps({"owner": "process 1 on gone", "host": "gone", "token": "t"}))
    for verb, *more in (("submit", "--address", HERE), ("stop",)):
        done = space.raystudy(verb, long_study, *more, "--set", "name=newer")
        assert (done.returncode, "newer raystudy" in done.stderr) == (2, True), done.stderr
    assert {file.name for file in newer.parent.iterdir()} == {"plan.json", "lock.json"}
    assert job_names(space) == before


class LostDashboard(BaseHTTPRequestHandler):
    """Tells its version, and goes away when a job's log (RFC 6455: one text frame, in the end a close) is followed."""

    lost = ""

    def do_GET(self) -> None:
        self.close_connection = True
        if self.path.startswith("/api/version"):
            self.send_response(200)
            self.end_headers()
            names = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}
            self.wfile.write(json.dumps(names).encode())
        elif self.path.endswith("/logs/tail") and self.lost != "before the log":
            key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            self.send_response(101)
            for name in ("Upgrade: websocket", "Connection: Upgrade"):
                self.send_header(*name.split(": "))
            self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
            self.end_headers()
            self.wfile.write(b"\x81\x09it trains")
            if self.lost.startswith("after the log"):
                self.wfile.write(b"\x88\x02\x03\xe8")  # 1000: a normal end

        elif self.lost == "after the log, and back":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"type": "SUBMISSION", "status": "RUNNING", "entrypoint": ""}).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # Ray's client
@pytest.mark.parametrize("lost", ["before the log", "in the log", "after the log", "after the log, and back"])
def test_a_connection_that_is_lost_while_a_job_is_followed_is_told_with_the_ways_to_see_it(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LostDashboard, "lost", lost)
    monkeypatch.setattr(jobs, "check_dashboard", lambda _: Dashboard(ray.__version__, asks=True, here=True))
    monkeypatch.setattr(JobSubmissionClient, "submit_job", lambda _, **job: job["submission_id"])
    with ThreadingHTTPServer(("127.0.0.1", 0), LostDashboard) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(StudyError, match="the connection is lost") as refusal:
            jobs.submit(tiny.experiment(tmp_path, tmp_path / "studies"), address)
        server.shutdown()
    said = capsys.readouterr().out
    (job,) = re.findall(r"submitted (raystudy-tiny-[\w-]+)", said)
    assert said.endswith("it trains") is (lost != "before the log")
    log = f"ray job logs {job} --follow --address {address}"
    for words in (f"{job} goes on and holds the study", "raystudy status", log):
        assert words in str(refusal.value)


FOLLOWER = """
import signal, subprocess, sys
client = subprocess.Popen(
    sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background command would ignore it
)
said = ""
while "to run" not in said and (line := client.stdout.readline()):
    said += line
client.send_signal(signal.SIGINT)
rest, errors = client.communicate(timeout=60)
print(said + rest, errors, client.returncode, sep="\\0")
"""


@needs_a_space
def test_a_study_that_nobody_runs_cannot_be_stopped(space: Space, long_study: Path) -> None:
    done = space.raystudy("stop", long_study, "--set", "name=nobody")
    assert (done.returncode, "there is no study here" in done.stderr) == (2, True)


@needs_a_space
def test_a_job_outlives_its_client_is_stopped_with_checkpoints_and_goes_on(space: Space, long_study: Path) -> None:
    lock = space.home / "studies" / "tiny" / "lock.json"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"owner": "process 1 on gone", "host": "gone", "token": "t", "heartbeat": 1.0}))
    done = space.raystudy("submit", long_study, "--address", HERE)
    assert (done.returncode, "--take-over" in done.stdout) == (2, True), done.stdout

    lock.unlink()
    submit = (BIN / "raystudy", "submit", long_study, "--address", HERE)
    said, errors, code = space.run(BIN / "python", "-c", FOLLOWER, *submit, PYTHONUNBUFFERED="1").stdout.split("\0")
    assert int(code) == 130, said + errors
    job = re.findall(r"submitted (raystudy-tiny-[\w-]+)", said)[0]
    log = f"ray job logs {job} --follow --address {HERE}"
    for words in (f"{job} goes on", "raystudy status", log, "raystudy stop"):
        assert words in errors
    assert "run the same command again" not in errors
    wait_for("two running trials", lambda: sum(e > 1 for e in epochs(lock.parent)) == 2, 240)

    ids = list(states(space, long_study))
    titles = space.run("ps", "-ww", "-eo", "args=").stdout.splitlines()
    stages = re.compile(rf"ray::({'|'.join(ids)}) \w+ \d+/60")
    assert len({m[1] for line in titles if (m := stages.match(line))}) == 2, titles
    tasks, actors = json.loads(space.run(BIN / "python", "-c", TASKS, RAY_AUTH_MODE="token").stdout.splitlines()[-1])
    assert len({*ids} & {*tasks}) == 2
    assert "TrialSlot" in {kind for kind, _ in actors}, actors

    assert space.raystudy("stop", long_study).returncode == 0
    wait_for("the driver's end", lambda: not lock.exists(), 120)
    study = Study.at(str(space.home / "studies"), "tiny")
    then = states(space, long_study)
    interrupted = [*then.values()].count("interrupted")
    assert interrupted, then  # both that ran, unless one ended just before
    for trial_id, state in then.items():
        names = [e["event"] for e in study.trial(trial_id).read_events("events")]
        assert state == "finished" or names == [] or names[-2:] == ["checkpoint", "interrupted"]
    done = space.raystudy("stop", long_study)
    assert (done.returncode, "nobody runs this study" in done.stderr) == (2, True)

    done = space.raystudy("submit", long_study, "--address", HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCEEDED" in done.stdout
    assert "finished" in done.stdout, "the log is followed to its end"
    assert states(space, long_study) == dict.fromkeys(ids, "finished")
    events = [[e["event"] for e in study.trial(t).read_events("events")] for t in ids]
    assert sum("resumed" in names for names in events) == interrupted
    assert len(job_names(space)) == 3


SLOTS = """
import subprocess, sys, time, ray
from pathlib import Path
from raystudy.orchestrate import explain
from raystudy.study import Study
ray.init("auto", logging_level=40)
explain.LOOK_SECONDS = 0
now = int(ray.cluster_resources().get("explain", 0))
study, placement = Study.at(".", "x"), explain.Placement()
fixed, grows = (explain.Explainer(study, {}, now, placement, own_resource=now > 0, may_grow=m) for m in (0, 1))
for explainer in (fixed, grows):
    explainer.poll(trials_running=True)
    assert (explainer.slots, explainer.own_resource) == (0, False)
join = [Path(sys.executable).parent / "ray", "start", sys.argv[1], "--resources", '{"explain": 2}']
subprocess.run([*join, "--num-cpus=0", "--object-store-memory=100000000"], check=True, stdout=sys.stderr)
until = time.monotonic() + 60
while grows.slots == 0 and time.monotonic() < until:
    time.sleep(0.5)
    for explainer in (fixed, grows):
        explainer.poll(trials_running=True)
print(fixed.slots, fixed.own_resource, grows.slots, grows.own_resource)
"""


@needs_a_space
def test_explanations_take_the_slots_of_machines_that_join_later(space: Space) -> None:
    done = space.run(BIN / "python", "-c", SLOTS, f"--address={ADDRESS}:6379", RAY_AUTH_MODE="token")
    assert done.stdout.splitlines()[-1:] == ["0 False 2 True"], done.stderr[-2000:]


VIEW = """
import sys, time, ray, requests
from raystudy.orchestrate.access import token
from raystudy.orchestrate.slot import TitledDirectory
page = ray.init("auto", logging_level=40).dashboard_url
own = {"Authorization": f"Bearer {token()}"}
@ray.remote(num_cpus=0)
def trial():
    TitledDirectory(sys.argv[1], trial_id="a-trial").append_event("events", {"stage": "joint", "epoch": 3, "epochs": 9})
    time.sleep(300)
running, until, shown = trial.remote(), time.monotonic() + 60, []
while "ray::a-trial joint 3/9" not in shown and time.monotonic() < until:
    time.sleep(1)
    pages = [f"http://{page}/nodes/{node['NodeID']}" for node in ray.nodes() if node["Alive"]]
    told = [requests.get(p, headers=own, timeout=30).json()["data"]["detail"].get("workers", []) for p in pages]
    shown = [" ".join(worker["cmdline"]).strip() for workers in told for worker in workers]
print(shown)
"""


@needs_a_space
def test_trial_and_stage_are_read_in_the_dashboards_list_of_processes(space: Space, tmp_path: Path) -> None:
    done = space.run(BIN / "python", "-c", VIEW, tmp_path, RAY_AUTH_MODE="token")
    assert "ray::a-trial joint 3/9" in done.stdout, done.stdout + done.stderr[-2000:]


def test_a_cluster_whose_machines_are_yet_to_come_is_not_held_to_one_trial_at_a_time() -> None:
    def at_a_time(cpus: float, local: bool) -> int | None:
        session = Session(local, cpus=cpus, gpus=0, explain_slots=0, dashboard=None)
        return placement_of(Resources(cpus=2, max_concurrent=None), session).max_concurrent

    assert at_a_time(0, local=False) is None
    assert at_a_time(9, local=False) == 4
    assert at_a_time(2, local=True) == 1


def test_a_package_is_small_and_all_that_a_job_needs(tmp_path: Path) -> None:
    file = tiny.experiment_file(tmp_path, tmp_path / "studies")
    experiment = load_experiment(file, ["training.epochs=7"])
    scratch = tmp_path / "package"
    scratch.mkdir()
    package = jobs._package(experiment, scratch)
    names = [str(p.relative_to(package)) for p in package.rglob("*") if p.is_file()]
    assert not any("__pycache__" in n or "tests" in n for n in names)
    sent = shutil.make_archive(str(tmp_path / "sent"), "zip", package)  # as Ray sends it
    assert Path(sent).stat().st_size < 400_000
    assert yaml.safe_load((package / "work" / "experiment.yaml").read_text())["training"]["epochs"] == 7
    alone = {**os.environ, "PYTHONPATH": str(package)}
    where = "import raystudy; print(raystudy.__file__)"
    for command, said in (
        (["-c", where], str(package)),
        (["-m", "raystudy.cli", "plan", "experiment.yaml", "--set", "resources.gpus=64"], "3 trials"),  # not measured
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=package / "work", env=alone, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


def test_options_of_a_submission_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = "python -m raystudy.cli run"
    assert jobs._entrypoint(False, only_failed=False, take_over=False) == f"{run} experiment.yaml"
    told = jobs._entrypoint(True, only_failed=True, take_over=True)
    assert told == f'cd {tmp_path} && {run} "$OLDPWD/experiment.yaml" --only failed --take-over'


def test_a_package_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LARGEST_PACKAGE", 100_000)
    with pytest.raises(StudyError, match="more than 100,000"):
        jobs._package(tiny.experiment(tmp_path, tmp_path / "studies"), tmp_path)
