"""Real Ray heads with and without a token, on addresses that are no loopback: who may enter is checked first."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.orchestrate import tiny
from tests.orchestrate.guarded_cluster import GUARDED, OPEN, TOKEN
from tests.orchestrate.verbs import ROOT, Answer, Command, refused

NAMESPACE = ("unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")
CLUSTERS = {
    "no token": ({}, GUARDED, "there is no token for this cluster here"),
    "wrong token": ({"RAY_AUTH_TOKEN": TOKEN[::-1]}, GUARDED, "the token is wrong"),
    "nobody is asked": ({}, OPEN, "asks nobody for a token"),
    "nobody is asked, token here": ({"RAY_AUTH_TOKEN": TOKEN}, OPEN, "asks nobody for a token"),
    "authentication off here": ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": TOKEN}, GUARDED, "RAY_AUTH_MODE"),
}

FOUND = ("no token", "nobody is asked")  # also without their address
DOCTORS = ("doctor", "doctor by its head", "doctor by auto", "doctor by RAY_ADDRESS")


def on_cluster(file: Path, verb: str, address: str, environment: dict[str, str]) -> Command:
    word, _, how = verb.partition(" ")
    storage = str(file.parent / os.urandom(4).hex())  # they all run at once
    typed = [word, str(file), "--storage", storage]
    if how == "by RAY_ADDRESS":
        return Command(typed, {**environment, "RAY_ADDRESS": f"{address}:6379"})
    where = {"by its head": f"{address}:6379", "by loopback": "127.0.0.1:6379", "by auto": "auto"}
    return Command([*typed, "--address", where.get(how, f"http://{address}:8265")], environment)


def namespace_is_allowed() -> bool:
    if any(shutil.which(tool) is None for tool in ("unshare", "ip")):
        return False
    up = [*NAMESPACE, "ip", "link", "set", "lo", "up"]
    return subprocess.run(up, check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not namespace_is_allowed(), reason="needs a network namespace of its own (root, unshare, ip)")
@pytest.mark.parametrize("address", [GUARDED, OPEN])
def test_tokens_of_real_clusters_are_checked_before_anything_is_sent_there(address: str, tmp_path: Path) -> None:
    file = tiny.experiment_file(tmp_path, tmp_path / "studies")
    here = [name for name, (_, where, _) in CLUSTERS.items() if where == address]
    pairs = [(name, verb) for name in here for verb in ("run by its head", "doctor", "submit")]
    ways = ("doctor by its head", "run by auto", "doctor by loopback", "doctor by RAY_ADDRESS")
    pairs += [(name, verb) for name in here if name in FOUND for verb in ways]
    commands = {(name, verb): on_cluster(file, verb, address, CLUSTERS[name][0]) for name, verb in pairs}
    for verb in ("doctor", "submit"):  # the dashboard is asked with the token all the same
        commands.pop(("authentication off here", verb), None)
    if address == GUARDED:
        token = {"RAY_AUTH_TOKEN": TOKEN}
        commands |= {("right token", verb): on_cluster(file, verb, address, token) for verb in DOCTORS}
    folder = Path(tempfile.mkdtemp(prefix="raystudy-"))  # Ray's socket names must be short
    quiet = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-m", "tests.orchestrate.guarded_cluster", address, str(folder)],
        cwd=ROOT, input=json.dumps([asdict(c) for c in commands.values()]), capture_output=True, text=True, check=False,
        timeout=240, env=quiet,
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [Answer(**answer) for answer in json.loads(done.stdout)]
    for (name, verb), answer in zip(commands, said, strict=True):
        if name == "right token":
            assert answer.code == 0, answer
            assert "token accepted" in answer.said
            assert GUARDED in answer.said
        else:
            assert refused(answer, CLUSTERS[name][2]), (name, verb, answer)
        assert TOKEN not in answer.said
        assert TOKEN[::-1] not in answer.said
