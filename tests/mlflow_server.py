"""A real MLflow server on loopback, with PostgreSQL and S3 where this machine has them, and a bad line to it."""

from __future__ import annotations

import contextlib
import glob
import http.client
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.s3_server import S3Server, free_port

START_SECONDS = 120
PAUSE_SECONDS = 0.05  # of a slow line


@dataclass
class MLflowServer:
    """Where the server is, and what it keeps its runs and files in."""

    uri: str
    backend: str
    artifacts: str


@pytest.fixture(scope="session")
def mlflow_server(s3_environment: S3Server, s3_server: S3Server) -> Iterator[MLflowServer]:
    """`mlflow server` with its runs in PostgreSQL (SQLite where there is none) and its artifacts on S3."""
    s3_server.create_bucket("mlflow")
    with tempfile.TemporaryDirectory(prefix="raystudy-mlflow-") as name, contextlib.ExitStack() as stack:
        folder, port = Path(name), free_port()
        postgres = stack.enter_context(_postgres())
        backend = postgres or f"sqlite:///{folder / 'server.db'}"
        command = [
            str(Path(sys.prefix) / "bin" / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port),
            "--workers", "1", "--backend-store-uri", backend, "--artifacts-destination", "s3://mlflow/artifacts",
        ]  # fmt: skip
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        endpoint = {"MLFLOW_S3_ENDPOINT_URL": s3_environment.endpoint}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, env={**os.environ, **quiet, **endpoint},
                start_new_session=True,
            )  # fmt: skip
        try:
            _await_health(f"http://127.0.0.1:{port}", process, folder / "log")
            yield MLflowServer(f"http://127.0.0.1:{port}", backend, "s3://mlflow/artifacts")
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own: nobody else is in the group
            process.wait()


def _await_health(uri: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=2):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the MLflow server did not start: {log.read_text()[-2000:]}")
        time.sleep(0.2)


@contextlib.contextmanager
def _postgres() -> Iterator[str | None]:
    """A PostgreSQL server of its own (never as root), or None where it is not installed."""
    places = [shutil.which("initdb") or "", *sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))]
    initdb = next((Path(p).resolve() for p in places if p), None)
    if initdb is None:
        yield None
        return
    folder, port = Path(tempfile.mkdtemp(prefix="raystudy-postgres-")), free_port()
    user = pwd.getpwuid(os.getuid())
    if user.pw_uid == 0:
        user = pwd.getpwnam("postgres" if "postgres" in {u.pw_name for u in pwd.getpwall()} else "nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
    options = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **options}
    data = folder / "data"
    subprocess.run([initdb, "-D", data, "-U", "mlflow", "-A", "trust", "--no-sync"], check=True, **quiet)
    settings = ["-c", "fsync=off", "-c", f"unix_socket_directories={folder}", "-c", "listen_addresses=127.0.0.1"]
    server = subprocess.Popen([initdb.parent / "postgres", "-D", data, "-p", str(port), *settings], **quiet)
    try:
        ready = [initdb.parent / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow"]
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(ready, check=False).returncode != 0:
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail("PostgreSQL did not start")
            time.sleep(0.1)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # fast: does not wait for clients
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class BadLine:
    """An HTTP relay before a server; ``fault(n)`` names what happens to its n-th request.

    ok: answered.  refuse: the connection breaks before the server hears of it.  500: so it is answered.  slow: answered
    after a while.  lost: the server does it, and its answer is lost.  twice: the server is asked twice.
    """

    target: str
    fault: Callable[[int], str] = lambda _: "ok"
    port: int = field(default_factory=free_port)
    seen: list[str] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def open(self) -> Iterator[BadLine]:
        server = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _handler(line: BadLine) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def relay(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = line.fault(len(line.seen))
            line.seen.append(fault)
            if fault == "refuse":
                return
            if fault == "500":
                self.send_error(500)
                return
            time.sleep(PAUSE_SECONDS if fault == "slow" else 0)
            for _ in range(2 if fault == "twice" else 1):
                status, headers, answer = self.forward(body)
            if fault == "lost":
                return
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            host = line.target.removeprefix("http://")
            connection = http.client.HTTPConnection(host, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
            connection.request(self.command, self.path, body, {**headers, "Host": host})
            answer = connection.getresponse()
            found = answer.status, answer.getheaders(), answer.read()
            connection.close()
            return found

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = relay

    return Handler
