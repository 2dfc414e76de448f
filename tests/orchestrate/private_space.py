"""A network, processes and a /tmp/ray of their own for one test cluster; nothing outside is reached or seen.

The space is a machine with an address beside loopback, and a cable to a second one.  All processes end with it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ADDRESS = "10.99.0.1"
GATE, ELSEWHERE = "10.98.0.1", "10.98.0.2"  # ends of a cable to a second machine, which has addresses of its own
BIN = Path(sys.executable).parent
BOOT = f"""set -e
ip link set lo up
ip addr add {ADDRESS}/24 dev lo
mkdir -p /tmp/ray
mount -t tmpfs -o size=1g tmpfs /tmp/ray
unshare --net sleep infinity &
echo $! > /tmp/ray/elsewhere.pid
ip link add there type veth peer name here
until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.01; done
ip link set here netns $!
ip addr add {GATE}/24 dev there
ip link set there up
nsenter -t $! -n bash -c "ip link set lo up; ip addr add {ELSEWHERE}/24 dev here; ip link set here up"
echo ready
exec sleep infinity
"""
UNSHARE = (
    "setpriv",
    "--pdeathsig",
    "KILL",
    "unshare",
    "--net",
    "--pid",
    "--fork",
    "--mount",
    "--mount-proc",
    "--kill-child",
)


def missing_for_a_space() -> str:
    """Return what this machine lacks for a private space; empty where nothing is missing."""
    lacking = [tool for tool in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(tool) is None]
    if not lacking:
        probe = BOOT.replace("exec sleep infinity", "")
        allowed = subprocess.run([*UNSHARE, "bash", "-c", probe], check=False, capture_output=True)
        lacking = [] if allowed.returncode == 0 else ["root in namespaces of its own"]
    return ", ".join(lacking)


LACKING = missing_for_a_space()
needs_a_space = pytest.mark.skipif(bool(LACKING), reason=f"needs {LACKING}")


class Space:
    """The namespaces, as long as the block lasts; ``home`` is the home folder of what runs in it."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def __enter__(self) -> Space:
        self._boot = subprocess.Popen([*UNSHARE, "bash", "-c", BOOT], stdout=subprocess.PIPE, start_new_session=True)
        assert self._boot.stdout
        assert self._boot.stdout.readline() == b"ready\n"
        self._first = Path(f"/proc/{self._boot.pid}/task/{self._boot.pid}/children").read_text().split()[0]
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(int(self._first), signal.SIGKILL)  # the first process of a PID namespace takes all others along
        self._boot.wait(30)
        assert self._boot.stdout
        self._boot.stdout.close()

    def command(self, *words: str | Path) -> list[str]:
        return ["nsenter", "-t", self._first, "-n", "-p", "-m", "--wdns=" + str(self.home), *map(str, words)]

    def elsewhere(self, *words: str | Path) -> list[str]:
        """Return a command that runs on the second machine."""
        return self.command("bash", "-c", 'exec nsenter -t $(cat /tmp/ray/elsewhere.pid) -n "$@"', "-", *words)

    def environment(self, **more: str) -> dict[str, str]:
        """Return an environment that knows no token, no address and no cluster of this machine's user."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
        quiet |= {k: v for k, v in os.environ.items() if k == "RAY_worker_niceness"}
        path = f"{BIN}:{os.environ.get('PATH', '/usr/bin:/bin')}"
        return {**kept, **quiet, "PATH": path, "HOME": str(self.home), **more}

    def run(self, *words: str | Path, elsewhere: bool = False, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.elsewhere(*words) if elsewhere else self.command(*words),
            env=self.environment(**more), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=480, check=False, cwd=self.home,
        )  # fmt: skip

    def raystudy(self, *words: str | Path, elsewhere: bool = False) -> subprocess.CompletedProcess[str]:
        return self.run(BIN / "raystudy", *words, elsewhere=elsewhere)

    def head(self, *flags: str, **more: str) -> None:
        """Start a Ray head."""
        small = ("--num-cpus=2", "--object-store-memory=150000000", "--disable-usage-stats")
        where = (f"--node-ip-address={ADDRESS}", "--port=6379")
        done = self.run(BIN / "ray", "start", "--head", *where, *small, *flags, **more)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Space]:
    """A head that wants a token; its dashboard is at loopback and at an address that others could reach."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    with Space(home) as made:
        made.head("--dashboard-host=0.0.0.0", RAY_AUTH_MODE="token")
        yield made


def wait_for(what: str, ready: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until ``ready()`` is true."""
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, f"{what} took more than {seconds} s"
        time.sleep(0.3)
