"""Commands against a real Ray head, with a token or without: run inside namespaces of their own, which end it.

    unshare --net --pid --fork --mount-proc python -m tests.orchestrate.guarded_cluster ADDRESS FOLDER < commands.json

The head has an address that is no loopback and that nobody outside the namespace reaches.  Reads a list of commands,
prints the list of answers, as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from tests.orchestrate.verbs import Command, run

GUARDED, OPEN = "10.77.1.1", "10.77.1.2"
TOKEN = "0123456789abcdef" * 4
HEADS = {GUARDED: {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, OPEN: {"RAY_AUTH_MODE": "disabled"}}
RAY = str(Path(sys.executable).parent / "ray")


def main(address: str, folder: Path) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    assert not subprocess.run(["ip", "route"], check=True, capture_output=True).stdout, "there are routes"
    os.environ |= {"RAY_TMPDIR": str(folder), "HOME": str(folder)}
    start_head(address, HEADS[address])
    print(json.dumps([asdict(answer) for answer in run([Command(**c) for c in json.load(sys.stdin)])]))


def start_head(address: str, environment: dict[str, str]) -> None:
    """Start a head on an address of its own."""
    subprocess.run(["ip", "addr", "add", f"{address}/32", "dev", "lo"], check=True)
    command = [RAY, "start", "--head", f"--node-ip-address={address}", f"--dashboard-host={address}"]
    command += ["--port=6379", "--dashboard-port=8265", "--num-cpus=1", "--object-store-memory=100000000"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
