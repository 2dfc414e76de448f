"""`ray up cluster.local.yaml` for real: three SSH hosts, a study on S3, a machine that dies, `ray down`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.lab import CLIENT, HOSTS, Lab, missing_tools

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
S3_PORT, DASHBOARD_PORT = 8333, 8265
KEYS = {"AWS_ACCESS_KEY_ID": "raystudy", "AWS_SECRET_ACCESS_KEY": "raystudy-secret", "AWS_REGION": "us-east-1"}

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}"),
]

EXPERIMENT = """
name: cluster
storage: s3://studies/raystudy
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
        time.sleep(2)
    return found


def _cluster_file(lab: Lab, folder: Path) -> Path:
    """The committed file with the lab's addresses and key; the hosts share this machine's environment."""
    tree = yaml.safe_load((ROOT / "cluster.local.yaml").read_text())
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
    return f"{command} {flags}" if "ray start" in command else command


def _raystudy(lab: Lab, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return _client(lab, str(BIN / "raystudy"), *arguments, check=check)


def _states(lab: Lab, experiment: Path) -> dict[str, dict[str, Any]]:
    shown = _raystudy(lab, "status", str(experiment), "--json", check=False)
    if shown.returncode:
        return {}
    return {t["trial_id"]: t for t in json.loads(shown.stdout)["trials"]}


def test_a_study_on_ssh_hosts_survives_the_death_of_a_machine(lab: Lab, bucket: None, tmp_path: Path) -> None:
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(EXPERIMENT)
    cluster = _cluster_file(lab, tmp_path)
    ray = str(BIN / "ray")
    _client(lab, ray, "up", "-y", "--no-config-cache", str(cluster))
    alive = "import ray; ray.init('auto', logging_level=40); print('alive', sum(n['Alive'] for n in ray.nodes()))"

    def all_joined() -> bool:
        shown = _client(lab, ray, "exec", "--no-config-cache", str(cluster), f'python -c "{alive}"', check=False)
        return "alive 3" in shown.stdout

    _wait("joining of the workers", 180, all_joined)
    ports = f"{DASHBOARD_PORT}:127.0.0.1:{DASHBOARD_PORT}"
    known = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null")
    tunnel = ("ssh", "-i", str(lab.key), *known, "-N", "-L", ports, f"root@{HOSTS['head']}")
    forward = subprocess.Popen(lab.command(*tunnel), stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{DASHBOARD_PORT}"
    try:
        _wait("the dashboard", 30, lambda: _raystudy(lab, "doctor", "--address", address, check=False).returncode == 0)
        _raystudy(lab, "submit", str(experiment), "--address", address, "--no-follow")

        def checkpointed() -> list[str]:
            running = [t for t, s in _states(lab, experiment).items() if s["state"] == "running" and s["epoch"] >= 5]
            return [t for t in running if _events(lab, t).count("checkpoint") >= 1]

        _wait("the first checkpoints", 240, lambda: len(checkpointed()) >= 2)
        lab.kill("w1")

        def finished() -> bool:
            states = _states(lab, experiment)
            return len(states) == 3 and all(s["state"] == "finished" for s in states.values())

        _wait("the study's end on the machine that is left", 420, finished)
    finally:
        forward.terminate()
        forward.wait()
    resumed = [t for t in _states(lab, experiment) if "resumed" in _events(lab, t)]
    assert resumed, "the killed machine's trial went on from its checkpoint"
    down = _client(lab, ray, "down", "-y", str(cluster), check=False)
    for name in ("head", "w2"):  # with a machine gone Ray may leave its other workers to us
        if _ray_processes(lab, name):
            ssh = ("ssh", "-i", str(lab.key), *known, f"root@{HOSTS[name]}")
            _client(lab, *ssh, "bash -ic 'ray stop --force'", check=False)
        left = _wait_for_none(lambda name=name: _ray_processes(lab, name), 60)
        assert not left, f"left on {name}: {left}\n{down.stdout[-2000:]}\n{down.stderr[-2000:]}"


def _ray_processes(lab: Lab, name: str) -> list[str]:
    return [line for line in lab.processes(name) if "ray/" in line or "raylet" in line or "ray::" in line]


def _wait_for_none(found: Callable[[], list[str]], seconds: float) -> list[str]:
    until = time.monotonic() + seconds
    while (left := found()) and time.monotonic() < until:
        time.sleep(1)
    return left


def _events(lab: Lab, trial_id: str) -> list[str]:
    read = (
        "from raystudy.study import Study; import json, sys; "
        "print(json.dumps([e['event'] for e in Study.at('s3://studies/raystudy', 'cluster')"
        ".trial(sys.argv[1]).read_events('events')]))"
    )
    found = _client(lab, sys.executable, "-c", read, trial_id, check=False)
    return json.loads(found.stdout) if found.returncode == 0 and found.stdout else []


def test_the_committed_file_needs_only_addresses_user_and_key() -> None:
    tree = yaml.safe_load((ROOT / "cluster.local.yaml").read_text())
    assert tree["provider"]["type"] == "local"
    assert "available_node_types" not in tree  # Ray refuses them for the type local
    assert not os.path.isabs(tree["auth"]["ssh_private_key"])
