"""S3 as a storage, on a real server: its refusals by name, what it lists, and that it may go and come back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import obstore
import pytest
from moto.server import ThreadedMotoServer

from raystudy.errors import StudyError
from raystudy.storage import Storage, open_storage
from tests.s3_server import ADMIN, READER, Door, S3Server


def set_environment(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("identity", "says"),
    [((ADMIN[0], "wrong"), "refuses the credentials"), (("unknown", "wrong"), "refuses the credentials")],
)
def test_wrong_credentials_are_one_clear_message(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, identity: tuple[str, str], says: str
) -> None:
    set_environment(monkeypatch, s3_server.environment(identity))
    storage = open_storage(s3_bucket)
    for act in (storage.list, storage.check_writable, lambda: storage.read_bytes("a"), lambda: storage.delete("a")):
        with pytest.raises(StudyError, match=says) as refusal:
            act()
        assert "AWS_SECRET_ACCESS_KEY" in str(refusal.value)
        assert "wrong" not in str(refusal.value)
    with pytest.raises(StudyError, match="denies the access"):  # the answer to HEAD carries no code
        storage.exists("a")


def test_no_credentials_at_all_are_named(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StudyError, match="AWS_ACCESS_KEY_ID"):
        open_storage(s3_bucket).list()


def test_a_missing_bucket_is_not_an_empty_one(s3_server: S3Server) -> None:
    storage = open_storage("s3://no-such-bucket/studies")
    for act in (storage.list, lambda: storage.read_bytes("a"), lambda: storage.stamps("a")):
        with pytest.raises(StudyError, match="no bucket 'no-such-bucket'"):
            act()


def test_a_bucket_that_may_only_be_read_is_read_and_its_writes_are_refused(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_storage(s3_bucket).write_bytes("films/a.png", b"film")
    set_environment(monkeypatch, s3_server.environment(READER))
    storage = open_storage(s3_bucket)
    assert storage.read_bytes("films/a.png") == b"film"
    assert storage.list() == ["films/a.png"]
    for act in (
        lambda: storage.write_bytes("a", b""),
        lambda: storage.create_exclusive("a", b""),
        lambda: storage.append_event("events", {}),
        lambda: storage.delete("films/a.png"),
        storage.check_writable,
    ):
        with pytest.raises(StudyError, match="denies the access"):
            act()
    assert storage.read_bytes("films/a.png") == b"film"


def test_a_server_that_is_not_there_is_named_in_time(monkeypatch: pytest.MonkeyPatch, s3_environment: S3Server) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    for folder in ("films", "Path"):  # a word of the address is no word of the answer
        with pytest.raises(StudyError, match=r"no answer from http://127\.0\.0\.1:9 within 1 s"):
            open_storage(f"s3://bucket/{folder}", retry_seconds=1).list()
    assert 1 < time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_ENDPOINT_URL", server) for server in (
        "localhost:9000", "nonsense", "http://", "http:/127.0.0.1", "ftp://127.0.0.1", "http://[::1", "http://[zz]:9",
        "http://é..é", "http://a..b", f"http://{'a' * 64}", "http://a b", "http://127.0.0.1:port", "http://h:99999",
        "http://1.2.3.400", "http://xn--zz--", "http://127.0.0.1:9\n",
    )]
    + [("AWS_ENDPOINT_URL_S3", "nonsense"), ("AWS_ENDPOINT_URL_S3", ""), ("AWS_ENDPOINT", "nonsense")]
    + [("AWS_REGION", "us-east-1\n"), ("AWS_REGION", "é"), ("AWS_DEFAULT_REGION", "us east")]
    + [("AWS_SESSION_TOKEN", "a\nb")],
)  # fmt: skip
def test_an_environment_of_which_no_request_can_be_made_is_named(
    name: str, value: str, s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    with pytest.raises(StudyError, match=f"{name} ") as refusal:
        open_storage("s3://bucket/x", retry_seconds=0).list()
    assert name in str(refusal.value.remedy)


def test_a_variable_that_does_not_count_is_not_looked_at(
    s3_environment: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", "minio.local:9000")  # as other tools write it; AWS_ENDPOINT_URL is set
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "no region")
    open_storage(s3_bucket).check_writable()


def test_a_server_below_a_path_is_one(monkeypatch: pytest.MonkeyPatch, s3_environment: S3Server) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9/gateway%20of/team@site:1")
    with pytest.raises(StudyError, match="no answer from"):
        open_storage("s3://bucket/x", retry_seconds=0).list()


@pytest.mark.parametrize(
    "environment",
    [{"AWS_METADATA_ENDPOINT": "nonsense"}, {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "x y"}],
)
def test_what_the_library_panics_at_is_refused_in_words(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StudyError, match="no request can be made") as refusal:
        open_storage("s3://bucket/x", retry_seconds=0).list()
    assert "AWS_" in str(refusal.value.remedy)


def test_a_secret_in_the_environment_is_not_repeated(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AWS_ACCESS_KEY_ID", "hidden\n"), ("AWS_ENDPOINT_URL", "http://user:hidden@127.0.0.1:9")):
        monkeypatch.setenv(name, value)
        with pytest.raises(StudyError, match=name) as refusal:
            open_storage("s3://bucket/x", retry_seconds=1).list()
        assert "hidden" not in str(refusal.value)
        monkeypatch.setenv(name, s3_environment.environment()[name])


def test_every_form_of_a_servers_address_is_asked(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for server in (
        "http://localhost:9",
        "http://127.0.0.1:9/",
        "http://[::1]:9",
        "http://s3_a.b-c.:9/x/y",
        "https://127.0.0.1:9",
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        with pytest.raises(StudyError, match="no answer from"):
            open_storage("s3://bucket/x", retry_seconds=0).list()


class WebServer(BaseHTTPRequestHandler):
    """Is no object storage: it knows none of the pages, or (``forgets``) takes what is sent and keeps nothing."""

    forgets = False

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200 if self.forgets and self.command == "PUT" else 404)
        for name, value in (("Content-Length", "0"), ("ETag", "1")):
            self.send_header(name, value)
        self.end_headers()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def web_server(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), WebServer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield
        server.shutdown()


def test_a_write_that_finds_nothing_is_no_missing_file(web_server: None) -> None:
    storage = open_storage("s3://bucket/x", retry_seconds=0)
    for act in (
        storage.check_writable,
        lambda: storage.write_bytes("a", b"1"),
        lambda: storage.create_exclusive("a", b"1"),
        lambda: storage.delete("a"),
    ):
        with pytest.raises(StudyError, match=r"refuses the request \(404\)") as refusal:
            act()
        assert "AWS_ENDPOINT_URL" in str(refusal.value.remedy)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a")


def test_a_server_that_keeps_nothing_is_found_out_by_the_probe(
    web_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WebServer, "forgets", True)
    with pytest.raises(StudyError, match="does not keep what is written"):
        open_storage("s3://bucket/x", retry_seconds=0).check_writable()


def test_marks_of_folders_are_no_files_and_a_key_that_is_no_path_is_named(
    monkeypatch: pytest.MonkeyPatch, s3_environment: S3Server
) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)  # it takes every key, as S3 does and SeaweedFS does not
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for key, body in (
            ("site/", b""),
            ("site/a/", b""),
            ("site/a/b/film", b"x"),
            ("site/a/b/", b""),
            ("site/0", b""),
        ):
            client.put_object(Bucket="bucket", Key=key, Body=body)
        assert open_storage("s3://bucket").list() == ["site/0", "site/a/b/film"]
        storage = open_storage("s3://bucket/site")
        assert storage.list() == ["0", "a/b/film"]
        assert storage.list("a") == ["a/b/film"]
        for key in ("old//film", "old/./film"):
            client.put_object(Bucket="bucket", Key=f"site/{key}", Body=b"x")
            with pytest.raises(StudyError, match=rf"a name that is no path: 'site/{re.escape(key)}'") as refusal:
                storage.list()
            assert "delete this object" in refusal.value.remedy
            client.delete_object(Bucket="bucket", Key=f"site/{key}")
    finally:
        server.stop()


def check_that_nothing_is_lost(storage: Storage, go: Callable[[], None], come_back: Callable[[], None]) -> None:
    storage.write_bytes("before", b"kept")
    go()
    with ThreadPoolExecutor(3) as pool:
        reading = pool.submit(storage.read_bytes, "before")
        writing = pool.submit(storage.write_bytes, "during", b"written late")
        creating = pool.submit(storage.create_exclusive, "lock", b"me")
        time.sleep(1)
        waiting = [not task.done() for task in (reading, writing, creating)]
        come_back()
        assert reading.result() == b"kept"
        assert creating.result()
        writing.result()
    assert waiting == [True] * 3
    assert storage.list() == ["before", "during", "lock"]


def test_the_head_of_a_film_is_one_request(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(s3_bucket)
    storage.write_bytes("film", b"header and pixels")
    asked: list[str] = []
    for name in ("get", "head"):
        real = getattr(obstore, name)
        monkeypatch.setattr(
            obstore, name, lambda *given, name=name, real=real, **more: asked.append(name) or real(*given, **more)
        )
    assert storage.read_head("film", 6) == b"header"
    assert asked == ["get"]


def test_a_server_that_goes_and_comes_back_loses_nothing(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{door.port}")
    check_that_nothing_is_lost(open_storage(s3_bucket), door.close, door.open)
    door.close()


@pytest.mark.faults
def test_a_server_that_is_killed_and_started_again_loses_nothing(
    tmp_path: Path, s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server(tmp_path)
    set_environment(monkeypatch, server.environment())
    server.start()
    try:
        server.create_bucket("studies")
        check_that_nothing_is_lost(open_storage("s3://studies/x"), server.stop, server.start)
    finally:
        server.stop()


def test_a_forked_process_is_told_so_instead_of_waiting_for_ever(s3_bucket: str) -> None:
    open_storage(s3_bucket).write_bytes("a", b"1")
    code = (
        "import os, sys\n"
        "from raystudy.storage import open_storage\n"
        f"storage = open_storage({s3_bucket!r})\n"
        "storage.read_bytes('a')\n"
        "if os.fork() == 0:\n"
        "    try:\n        storage.read_bytes('a')\n"
        "    except RuntimeError as error:\n        os._exit(7 if 'spawn' in str(error) else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, timeout=60)
    assert done.returncode == 7
