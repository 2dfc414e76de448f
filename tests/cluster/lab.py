"""A lab of SSH hosts on one machine: own network, processes, mounts and name each; nothing outside is reached.

Three hosts (head, w1, w2) and a client hang on one bridge inside network namespaces that this module makes and removes.
A host's home is an overlay in memory and its /tmp/ray is its own, so a local path below them is not there on another.
Processes are ended by ending the first process of a host's own PID namespace.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HOSTS = {"head": "10.77.0.11", "w1": "10.77.0.12", "w2": "10.77.0.13"}
CLIENT = "10.77.0.1"
NEEDED = ("ip", "unshare", "nsenter", "sshd", "ssh-keygen", "rsync")


# What every host needs, tried in namespaces that vanish with it.
TRIAL_MOUNTS = """
ip link add br0 type bridge && hostname host && mount -t tmpfs tmpfs /mnt && mkdir /mnt/upper /mnt/work &&
mount -t overlay overlay -o lowerdir=/root,upperdir=/mnt/upper,workdir=/mnt/work /root
"""


def missing_tools() -> list[str]:
    """Return what this machine lacks for a lab: tools, root, or a kernel that lets root make namespaces."""
    lacking = [tool for tool in NEEDED if shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    lacking += [] if os.geteuid() == 0 else ["root"]
    if lacking:
        return lacking
    alone = ["unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc", "--uts", "sh", "-c", TRIAL_MOUNTS]
    allowed = subprocess.run(alone, check=False, capture_output=True).returncode == 0
    return [] if allowed else ["namespaces of its own"]


class Lab:
    """The hosts, the client's namespace and the files that both need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = f"rs{secrets.token_hex(2)}"
        self.key, self.token = folder / "key", folder / "auth_token"
        self._boots: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Lab:
        for name in ("key", "hostkey"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        shutil.copy(self.folder / "key.pub", self.folder / "authorized_keys")
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        client = self._space("client")
        _run("ip", "netns", "add", client)
        for line in (
            "link set lo up",
            "link add br0 type bridge",
            "link set br0 up",
            f"addr add {CLIENT}/24 dev br0",
        ):
            _run("ip", "-n", client, *line.split())
        for name in HOSTS:
            self._start(name)
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._boots):
            self.kill(name)
        for name in (*HOSTS, "client"):
            subprocess.run(["ip", "netns", "del", self._space(name)], check=False, capture_output=True)

    def _space(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def _start(self, name: str) -> None:
        client, space, address = self._space("client"), self._space(name), HOSTS[name]
        _run("ip", "netns", "add", space)
        _run("ip", "-n", space, "link", "set", "lo", "up")
        veth = f"{self.prefix}{name}"
        _run("ip", "link", "add", veth, "netns", client, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "-n", client, "link", "set", veth, "master", "br0", "up")
        _run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")
        _run("ip", "-n", space, "route", "add", "default", "via", CLIENT)
        home = self.folder / name
        (home / "disk").mkdir(parents=True)
        script = home / "boot.sh"
        script.write_text(self._boot_script(name))
        command = ["ip", "netns", "exec", space, "unshare", "--pid", "--fork", "--mount", "--mount-proc", "--uts"]
        with (home / "boot.log").open("wb") as log:
            self._boots[name] = subprocess.Popen(
                [*command, "--kill-child", "bash", str(script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _boot_script(self, name: str) -> str:
        home, lines = self.folder / name, "\\n".join(f"{ip} {host}" for host, ip in HOSTS.items())
        exports = {
            "PATH": f"{Path(sys.executable).parent}:$PATH",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            **{k: v for k, v in os.environ.items() if k.startswith("AWS_")},
        }
        profile = "\n".join(f'export {k}="{v}"' for k, v in exports.items())
        (home / "bashrc").write_text(profile + "\n")
        options = {
            "ListenAddress": HOSTS[name],
            "HostKey": self.folder / "hostkey",
            "AuthorizedKeysFile": self.folder / "authorized_keys",
            "StrictModes": "no",
            "PermitRootLogin": "prohibit-password",
            "UsePAM": "no",
            "PidFile": "none",
            "UseDNS": "no",
            "MaxStartups": "50",
            "Subsystem": "sftp internal-sftp",
        }
        flags = " ".join(f"-o '{k}={v}'" for k, v in options.items())
        return f"""set -e
hostname {name}
printf '127.0.0.1 localhost\\n{lines}\\n' > {home}/hosts
: > {home}/resolv
mount --bind {home}/hosts /etc/hosts
mount --bind {home}/resolv /etc/resolv.conf
mkdir -p /run/sshd
mount -t tmpfs -o size=1g tmpfs {home}/disk
mkdir {home}/disk/upper {home}/disk/work
mount -t overlay overlay -o lowerdir=/root,upperdir={home}/disk/upper,workdir={home}/disk/work /root
rm -rf /root/.ray /root/.bash_history
mkdir -p /tmp/ray
mount -t tmpfs -o size=2g tmpfs /tmp/ray
mount -t tmpfs -o size=2g tmpfs /dev/shm
cp {home}/bashrc /root/.bashrc
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin /usr/sbin/sshd -D -e -f /dev/null {flags}
"""

    def kill(self, name: str) -> None:
        """Take a host away as a power cut would: every process of its PID namespace ends at once."""
        boot = self._boots.pop(name)
        for child in _children(boot.pid):
            os.kill(child, signal.SIGKILL)
        boot.kill()  # a host that was still to make its namespaces never will
        boot.wait(30)

    def processes(self, name: str) -> list[str]:
        """Return the command lines that run on a host, its sshd left out."""
        (first,) = _children(self._boots[name].pid)
        shown = _run("nsenter", "-t", str(first), "-p", "-m", "ps", "-ww", "-eo", "args=")
        lines = [line.strip() for line in shown.splitlines()]
        return [line for line in lines if line and "sshd" not in line and not line.startswith("ps ")]

    def command(self, *arguments: str) -> list[str]:
        """Return a command that runs on the client."""
        return ["ip", "netns", "exec", self._space("client"), *arguments]

    def wait_for_ssh(self, seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        for address in HOSTS.values():
            probe = ["bash", "-c", f"exec 3<>/dev/tcp/{address}/22"]
            while subprocess.run(self.command(*probe), check=False, capture_output=True).returncode:
                if time.monotonic() > until:
                    raise TimeoutError(f"no sshd at {address}")
                time.sleep(0.2)


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in found]


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
