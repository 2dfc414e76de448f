"""The README's cluster commands for real: three SSH hosts, a study on S3, stopped, submitted again, a machine killed.

With `-rP` it says at the end when what happened, what was killed and what went on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.lab import CLIENT, HOSTS, Lab, missing_tools

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
S3_PORT, DASHBOARD_PORT = 8333, 8265
KEYS = {"AWS_ACCESS_KEY_ID": "raystudy", "AWS_SECRET_ACCESS_KEY": "raystudy-secret", "AWS_REGION": "us-east-1"}
LACKING = missing_tools()

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),  # ends what hangs
    pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}"),
]

STORAGE = "s3://studies/raystudy"
EXPERIMENT = (
    f"storage: {STORAGE}"
    + """
name: cluster
sources:
  H1: {kind: phantom, settings: {look: north, patients: 120}}
  H2: {kind: phantom, settings: {look: south, patients: 120}}
tasks:
  pneumonia: {positive: pneumonia, negatives: other_pathology}
cohort: {train: 20, val: 8, test: 8, split_fractions: [0.5, 0.2, 0.3]}
mixtures: [0, 50, 100]
images: {size: 64}
model: {backbone: resnet18, weights: none, backbone_layers: 2, prototype_dim: 16, prototypes_per_class: 2}
training: {epochs: 60, warm_epochs: 0, projection_interval: 30, last_layer_epochs: 2, batch_size: 8, schedule: cosine}
explain: {adai_images: 2}
resources: {cpus: 1, max_failures: 5}
tracking: {enabled: false}
"""
)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    for key, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://{CLIENT}:{S3_PORT}"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("RAY_UP_enable_autoscaler_v2", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with Lab(tmp_path) as made:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(made.token))
        made.wait_for_ssh()
        yield made


@pytest.fixture
def bucket(lab: Lab, tmp_path: Path) -> Iterator[None]:
    """A SeaweedFS server on the client's address with the bucket `studies`."""
    folder = tmp_path / "s3"
    folder.mkdir()
    credentials = {"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}
    identity = {"name": "raystudy", "credentials": [credentials], "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    options = f"-dir={folder} -ip={CLIENT} -ip.bind={CLIENT} -s3 -s3.port={S3_PORT} -s3.config={folder}/s3.json -filer"
    command = [str(BIN / "weed"), "server", *options.split(), "-volume.max=20", "-master.volumeSizeLimitMB=128"]
    with (tmp_path / "weed.log").open("wb") as log:
        server = subprocess.Popen(lab.command(*command, "-s3.iam=false"), stdout=log, stderr=log)
    make = "import boto3; boto3.client('s3').create_bucket(Bucket='studies')"
    try:
        _wait("the S3 server", 60, lambda: _client(lab, sys.executable, "-c", make, check=False).returncode == 0)
        yield
    finally:
        server.terminate()
        try:
            server.wait(40)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _client(lab: Lab, *command: str, check: bool = True, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(lab.command(*command), check=False, capture_output=True, text=True, timeout=seconds)
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def _wait(what: str, seconds: float, ready: Callable[[], Any]) -> Any:
    until = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < until, f"{what} took more than {seconds} s"
        time.sleep(1)
    _say(what)
    return found


def _say(what: str) -> None:
    print(time.strftime("%H:%M:%S"), what)


def _cluster_file(lab: Lab, folder: Path) -> Path:
    """The committed file with the lab's addresses and key; the hosts share this machine's environment."""
    tree = yaml.safe_load((ROOT / "cluster.local.yaml").read_text())
    tree["cluster_name"] = lab.prefix  # Ray remembers clusters by name; this one is not the user's
    head, *workers = HOSTS.values()
    tree["provider"] |= {"head_ip": head, "worker_ips": workers}
    tree["auth"] = {"ssh_user": "root", "ssh_private_key": str(lab.key)}
    tree["file_mounts"] = {"~/.ray/auth_token": str(lab.token)}
    tree["setup_commands"] = [c for c in tree["setup_commands"] if "venv" not in c]
    memory = "--object-store-memory=200000000"
    tree["head_start_ray_commands"] = [_with(c, memory) for c in tree["head_start_ray_commands"]]
    tree["worker_start_ray_commands"] = [_with(c, f"{memory} --num-cpus=1") for c in tree["worker_start_ray_commands"]]
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _with(command: str, flags: str) -> str:
    return command.replace("ray start", f"ray start {flags}")


def _raystudy(lab: Lab, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return _client(lab, str(BIN / "raystudy"), *arguments, check=check)


@contextlib.contextmanager
def _dashboard(lab: Lab, cluster: Path, log: Path) -> Iterator[str]:
    """`ray dashboard`: the head's dashboard at the client's loopback address, which is returned."""
    command = lab.command(str(BIN / "ray"), "dashboard", str(cluster))
    with log.open("wb") as out:
        forward = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    address = f"http://127.0.0.1:{DASHBOARD_PORT}"

    def answers() -> bool:
        assert forward.poll() is None, log.read_text()
        return _raystudy(lab, "doctor", "--address", address, check=False).returncode == 0

    try:
        _wait("ray dashboard", 60, answers)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(forward.pid, signal.SIGTERM)  # a session of its own: Ray and its ssh
        forward.wait(30)


def _status(lab: Lab, experiment: Path) -> dict[str, Any]:
    shown = _raystudy(lab, "status", str(experiment), "--json", check=False)
    return json.loads(shown.stdout) if shown.returncode == 0 else {"trials": [], "driver": "unknown"}


def _events(lab: Lab) -> dict[str, list[dict[str, Any]]]:
    """Return the events of every trial that has any, read from S3."""
    read = """
import json, sys
from raystudy.study import Study
study = Study.at(sys.argv[1], "cluster")
print(json.dumps({t: events for t in study.trial_ids() if (events := study.trial(t).read_events("events"))}))
"""
    found = _client(lab, sys.executable, "-c", read, STORAGE, check=False)
    return json.loads(found.stdout) if found.returncode == 0 else {}


def _names(events: list[dict[str, Any]]) -> list[str]:
    return [e["event"] for e in events]


def _on(lab: Lab, host: str, trial_ids: Iterable[str]) -> list[str]:
    """Return the trials that a host runs, by the titles of its processes."""
    titles = lab.processes(host)
    return [t for t in trial_ids if any(line.startswith(f"ray::{t}") for line in titles)]


def _since_resumed(events: list[dict[str, Any]]) -> list[str]:
    names = _names(events)
    return names[len(names) - names[::-1].index("resumed") :] if "resumed" in names else []


def _to_kill(lab: Lab) -> dict[str, list[str]]:
    """Return a worker all of whose trials wrote a checkpoint since they were resumed, with these trials."""
    events = {t: told for t, told in _events(lab).items() if told[-1]["event"] != "finished"}
    ready = {t for t, told in events.items() if "checkpoint" in _since_resumed(told)}
    runs = {host: _on(lab, host, events) for host in ("w1", "w2")}
    return next(({host: trials} for host, trials in runs.items() if trials and ready >= {*trials}), {})


def test_a_study_on_ssh_hosts_survives_a_stop_and_the_death_of_a_machine(
    lab: Lab, bucket: None, tmp_path: Path
) -> None:
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(EXPERIMENT)
    cluster = _cluster_file(lab, tmp_path)
    ray = str(BIN / "ray")
    _say("three hosts and an S3 server")
    _client(lab, ray, "up", "-y", "--no-config-cache", str(cluster))
    _say("ray up")
    alive = "import ray; ray.init('auto', logging_level=40); print('alive', sum(n['Alive'] for n in ray.nodes()))"

    def all_joined() -> bool:
        shown = _client(lab, ray, "exec", "--no-config-cache", str(cluster), f'python -c "{alive}"', check=False)
        return "alive 3" in shown.stdout

    _wait("joining of the workers", 180, all_joined)
    with _dashboard(lab, cluster, tmp_path / "dashboard.log") as address:
        said = _raystudy(lab, "doctor", str(experiment), "--address", address).stdout
        assert f"{STORAGE} can be written and read" in said
        assert "token accepted" in said
        _stopped_study(lab, experiment, address)
        _raystudy(lab, "submit", str(experiment), "--address", address, "--no-follow")
        victim = _wait("submitted again, resumed, new checkpoints", 240, lambda: _to_kill(lab))
        ((host, trials),) = victim.items()
        before = _events(lab)
        kept = {t: max(e["epoch"] for e in before[t] if e["event"] == "checkpoint") for t in trials}
        lab.kill(host)
        killed_at = time.time()
        _say(f"killed {host} with {kept}: the epochs of their checkpoints")

        def finished() -> bool:
            states = [t["state"] for t in _status(lab, experiment)["trials"]]
            return states == ["finished"] * 3

        _wait("the study's end on the machines that are left", 420, finished)
    told = _events(lab)
    for trial in trials:
        again = [e for e in told[trial] if e["event"] == "resumed" and e["time"] > killed_at]
        assert again, f"{trial} did not go on from a checkpoint: {_names(told[trial])}"
        assert again[0]["epoch"] >= kept[trial] > 0
        _say(f"{trial} went on {again[0]['time'] - killed_at:.0f} s after the kill in epoch {again[0]['epoch']}")
    down = _client(lab, ray, "down", "-y", str(cluster), check=False)
    assert down.returncode == 0, f"{down.stdout[-2000:]}\n{down.stderr[-2000:]}"
    hosts = [name for name in HOSTS if name != host]
    at_once = {name: len(lab.processes(name)) for name in hosts}
    _say(f"ray down; processes that still end: {at_once}")
    left = _wait_for_none(lambda: [line for name in hosts for line in lab.processes(name)], 180)
    assert not left
    _say("no process is left")
    undisturbed = str(tmp_path / "studies")
    shares = sorted(int(t.partition("-h1_")[2][:3]) for t in trials)
    _raystudy(lab, "run", str(experiment), "--storage", undisturbed, "--set", f"mixtures={shares}")
    assert _checksums(lab, STORAGE, trials) == _checksums(lab, undisturbed, trials)
    _say("the same bytes as an undisturbed run on one machine")


def _checksums(lab: Lab, storage: str, trials: list[str]) -> dict[str, list[str]]:
    read = """
import hashlib, json, sys
from raystudy.study import Study
study = Study.at(sys.argv[1], "cluster")
files = ("result.json", "model.safetensors", "prototypes.parquet", "predictions.parquet")
print(json.dumps({t: [hashlib.sha256(study.trial(t).read_bytes(f)).hexdigest() for f in files] for t in sys.argv[2:]}))
"""
    return json.loads(_client(lab, sys.executable, "-c", read, storage, *trials).stdout)


def _wait_for_none(found: Callable[[], list[str]], seconds: float) -> list[str]:
    until = time.monotonic() + seconds
    while (left := found()) and time.monotonic() < until:
        time.sleep(1)
    return left


def _stopped_study(lab: Lab, experiment: Path, address: str) -> None:
    """Submit the study, and stop it as soon as two of its trials run."""
    _raystudy(lab, "submit", str(experiment), "--address", address, "--no-follow")

    def started() -> bool:
        return sum(t["state"] == "running" and t["epoch"] > 0 for t in _status(lab, experiment)["trials"]) >= 2

    _wait("submitted, to two running trials", 240, started)
    _raystudy(lab, "stop", str(experiment))
    _wait("raystudy stop", 120, lambda: _status(lab, experiment)["driver"] is None)
    told = _events(lab)
    assert len(told) >= 2
    assert [_names(events)[-2:] for events in told.values()] == [["checkpoint", "interrupted"]] * len(told)
    states = {t["trial_id"]: t["state"] for t in _status(lab, experiment)["trials"]}
    assert len(states) == 3
    assert {states[t] for t in told} == {"interrupted"}
    epochs = {t: events[-1]["epoch"] for t, events in told.items()}
    _say(f"stopped with checkpoints in epochs {epochs}")


def test_the_committed_file_needs_only_addresses_user_and_key() -> None:
    tree = yaml.safe_load((ROOT / "cluster.local.yaml").read_text())
    assert tree["provider"]["type"] == "local"
    assert "available_node_types" not in tree  # Ray refuses them for the type local
    assert not os.path.isabs(tree["auth"]["ssh_private_key"])
