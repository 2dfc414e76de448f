"""Commands against real Ray heads, one with a token, then one without: run inside namespaces of their own.

    unshare --net --pid --fork --mount-proc python -m tests.orchestrate.guarded_cluster FOLDER < commands.json

The heads have addresses that are no loopback and that nobody outside the namespace reaches.  Reads {address: commands},
prints the answers as a list of lists, as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from tests.orchestrate.verbs import Answer, Command, run

GUARDED, OPEN = "10.77.1.1", "10.77.1.2"
TOKEN = "0123456789abcdef" * 4
HEADS = {GUARDED: {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, OPEN: {"RAY_AUTH_MODE": "disabled"}}
RAY = str(Path(sys.executable).parent / "ray")


def main(folder: Path) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    assert not subprocess.run(["ip", "route"], check=True, capture_output=True).stdout, "there are routes"
    os.environ |= {"RAY_TMPDIR": str(folder), "HOME": str(folder)}
    answers: list[list[Answer]] = []
    for address, commands in json.load(sys.stdin).items():
        start_head(address, HEADS[address])
        answers.append(run([Command(**c) for c in commands]))
        subprocess.run([RAY, "stop", "--force"], check=True, capture_output=True)  # sees this namespace alone
    print(json.dumps([[asdict(answer) for answer in some] for some in answers]))


def start_head(address: str, environment: dict[str, str]) -> None:
    """Start a head on an address of its own."""
    subprocess.run(["ip", "addr", "add", f"{address}/32", "dev", "lo"], check=True)
    command = [RAY, "start", "--head", f"--node-ip-address={address}", f"--dashboard-host={address}"]
    command += ["--port=6379", "--dashboard-port=8265", "--num-cpus=1", "--object-store-memory=100000000"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main(Path(sys.argv[1]))
