"""The committed cluster files: Ray accepts them, nothing is open to the world, what they install is pinned."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.orchestrate.private_space import BIN, Space, needs_a_space, wait_for

ROOT = Path(__file__).parents[2]
FILES = ("cluster.yaml", "cluster.local.yaml")
WORLD = {"0.0.0.0/0", "::/0"}
NAMESPACE = ("unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")


def namespace_is_allowed() -> bool:
    if any(shutil.which(tool) is None for tool in ("unshare", "ip")):
        return False
    up = [*NAMESPACE, "ip", "link", "set", "lo", "up"]
    return subprocess.run(up, check=False, capture_output=True).returncode == 0


def cluster_file(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def commands(tree: dict[str, Any]) -> list[str]:
    return [c for key, value in tree.items() if key.endswith("_commands") for c in value]


def starts(tree: dict[str, Any]) -> list[str]:
    return [c for c in commands(tree) if "ray start" in c]


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    prepared = prepare_config(cluster_file(name))
    validate_config(prepared)
    wrong = {**prepared, "setup_comands": []}
    with pytest.raises(Exception, match="setup_comands"):
        validate_config(wrong)


@pytest.mark.parametrize("name", FILES)
def test_every_command_is_sound_shell_and_every_mounted_file_is_there(name: str) -> None:
    tree = cluster_file(name)
    for command in commands(tree):
        subprocess.run(["bash", "-n", "-c", command], check=True)
    for remote, local in tree["file_mounts"].items():
        assert remote == "~/.ray/auth_token" or (ROOT / local).exists()


@pytest.mark.parametrize("name", FILES)
def test_every_node_has_the_token_and_asks_for_it_and_the_dashboard_is_on_loopback(name: str) -> None:
    tree = cluster_file(name)
    assert tree["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in tree["setup_commands"]
    assert any("RAY_AUTH_MODE=token" in c and ".bashrc" in c for c in tree["setup_commands"])
    (head,) = [c for c in starts(tree) if "--head" in c]
    assert "--dashboard-host=127.0.0.1" in head
    assert len(starts(tree)) == 2


def test_the_head_on_aws_serves_mlflow_with_its_database_and_prometheus_on_loopback_alone() -> None:
    tree = cluster_file("cluster.yaml")
    services = {c.split("nohup ")[1].split()[0]: c for c in tree["head_start_ray_commands"] if "nohup" in c}
    assert set(services) == {"~/venv/bin/mlflow", "prometheus"}
    mlflow, prometheus = services["~/venv/bin/mlflow"], services["prometheus"]
    assert "--host 127.0.0.1" in mlflow
    assert "--backend-store-uri postgresql+psycopg2:///mlflow" in mlflow
    assert "--artifacts-destination s3://" in mlflow
    assert "--web.listen-address=127.0.0.1:9090" in prometheus
    config = re.search(r"--config\.file=\$HOME/raystudy/(\S+)", prometheus)
    assert config
    assert (ROOT / config[1]).exists()
    assert tree["file_mounts"]["~/raystudy/dashboards"] == str(Path(config[1]).parent)


def test_gpu_workers_are_spot_instances_from_zero_and_the_head_has_no_gpu() -> None:
    types = cluster_file("cluster.yaml")["available_node_types"]
    assert "GPU" not in types["head"]["resources"]
    worker = types["gpu"]
    assert worker["min_workers"] == 0
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["node_config"]["SecurityGroupIds"] == types["head"]["node_config"]["SecurityGroupIds"]


@pytest.mark.parametrize("name", FILES)
def test_whatever_a_node_installs_is_pinned(name: str) -> None:
    (install,) = [c for c in cluster_file(name)["setup_commands"] if "pip install" in c]
    assert "-c ~/raystudy/constraints.txt" in install
    extras = re.search(r"raystudy\[([\w,]+)\]", install)
    assert extras
    lines = (ROOT / "constraints.txt").read_text().split()
    pinned = {canonicalize_name(n): v for n, v in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = [*project["dependencies"], *(n for e in extras[1].split(",") for n in project["optional-dependencies"][e])]
    needs, seen = [("raystudy", Requirement(line)) for line in own], set()
    while needs:
        package, need = needs.pop()
        name = canonicalize_name(need.name)
        assert name in pinned, f"{name}, which {package} needs, is not in constraints.txt"
        if package == "raystudy" or distribution(package).version == pinned[package]:
            assert pinned[name] in need.specifier, f"{package} needs {need}, constraints.txt has {pinned[name]}"
        if (name, *need.extras) not in seen:
            seen.add((name, *need.extras))
            more = [Requirement(line) for line in distribution(name).requires or []]
            chosen = need.extras or {""}
            needs += [(name, n) for n in more if not n.marker or any(n.marker.evaluate({"extra": e}) for e in chosen)]
    assert len(seen) > 50


@needs_a_space
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus")
def test_the_services_of_the_head_start_once_and_prometheus_finds_the_nodes(space: Space) -> None:
    head = [c for c in cluster_file("cluster.yaml")["head_start_ray_commands"] if "nohup" in c]
    assert len(head) == 2
    here = {  # what only the head has
        "~/venv/bin": str(BIN),
        "postgresql+psycopg2:///mlflow": "sqlite:///mlflow.db",
        "s3://BUCKET-YOURS/mlflow": "artifacts",
    }
    shutil.copytree(ROOT / "dashboards", space.home / "raystudy" / "dashboards")
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_WORKERS": "1"}

    def start() -> None:
        for command in head:
            for there, value in here.items():
                command = command.replace(there, value)  # noqa: PLW2901
            assert space.run("bash", "--login", "-c", "-i", command, **quiet).returncode == 0

    def told(url: str) -> str:
        get = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())"
        return space.run(sys.executable, "-c", get, url).stdout

    def targets() -> list[str]:
        got = told("http://127.0.0.1:9090/api/v1/targets")
        return [t["health"] for t in json.loads(got)["data"]["activeTargets"]] if got else []

    def processes() -> dict[str, list[str]]:
        lines = space.run("ps", "-ww", "-eo", "pid=,args=").stdout.splitlines()
        return {name: [line for line in lines if name in line] for name in ("mlflow server", "prometheus --config")}

    start()
    wait_for("a scraped node", lambda: set(targets()) == {"up"}, 120)
    assert '"raystudy"' in told("http://127.0.0.1:9090/api/v1/rules")
    wait_for("MLflow", lambda: told("http://127.0.0.1:5000/health").strip() == "OK", 120)
    before = processes()
    start()
    assert processes() == before
    assert all(before.values())
    listening = space.run("ss", "-Hltn").stdout
    for port in (5000, 9090):
        assert re.findall(rf"(\S+):{port}\s", listening) == ["127.0.0.1"]


def started_on_moto(text: str, folder: Path) -> dict[str, Any]:
    """Start `ray up` with a cluster file against moto, in a namespace without routes, until the head is made."""
    (folder / ".ray").mkdir(parents=True)
    (folder / ".ray" / "auth_token").write_text("token")
    for local in {p for p in cluster_file("cluster.yaml")["file_mounts"].values() if not p.startswith("~")}:
        source = ROOT / local
        shutil.copytree(source, folder / local) if source.is_dir() else shutil.copy(source, folder)
    (folder / "given.yaml").write_text(text)
    script = Path(__file__).with_name("moto_cloud.py")
    done = subprocess.run(
        [*NAMESPACE, sys.executable, str(script), str(folder / "given.yaml"), str(folder)],
        capture_output=True, text=True, timeout=400, check=False, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def open_to_the_world(groups: list[dict[str, Any]]) -> list[str]:
    """Return the groups with a rule, in or out, beside the default way out, that admits every address."""
    rules = [(g["GroupId"], rule) for g in groups for rule in g["IpPermissions"]]
    return [
        group
        for group, rule in rules
        if WORLD & {*(r["CidrIp"] for r in rule["IpRanges"]), *(r["CidrIpv6"] for r in rule["Ipv6Ranges"])}
    ]


@pytest.mark.skipif(not namespace_is_allowed(), reason="needs a network namespace of its own (root, unshare, ip)")
@pytest.mark.parametrize("explicit", [True, False], ids=["as committed", "without a group"])
def test_ray_up_on_aws_opens_nothing_to_the_world_with_the_explicit_group(explicit: bool, tmp_path: Path) -> None:
    text = (ROOT / "cluster.yaml").read_text()
    if not explicit:
        text, n = re.subn(r"\n *SecurityGroupIds: .*", "", text)
        assert n == 1
    found = started_on_moto(text, tmp_path / "home")
    assert len(found["instances"]) == 1, found["log"]
    (head,) = found["instances"]
    groups = [g["GroupId"] for g in head["SecurityGroups"]]
    if explicit:
        assert groups == [found["given"]]
        assert open_to_the_world(found["groups"]) == []
        assert head["IamInstanceProfile"]["Arn"].endswith("/raystudy-head-YOURS")
        assert head["MetadataOptions"]["HttpTokens"] == "required"
    else:  # the control: what Ray does on its own is seen
        assert open_to_the_world(found["groups"]) == groups != [found["given"]]
