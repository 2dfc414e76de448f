"""What a user can get wrong about services: `raystudy doctor` and every verb name it with its remedy and end with 2."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from raystudy.config import Tracking
from raystudy.errors import StudyError
from raystudy.orchestrate.access import is_loopback, token
from raystudy.orchestrate.dashboard import check_dashboard
from raystudy.study import FORMAT_VERSION, Study
from raystudy.tracking import sync_study
from raystudy.tracking_server import check_server
from tests.orchestrate import tiny
from tests.orchestrate.verbs import Answer, Ask, Command, refused, typist
from tests.s3_server import free_port

NOWHERE = "127.0.0.1:9"
READERS = ("status", "report", "stop", "explain")  # of a study directory
OLD_RAY = "2.40.0"
WORDS = {
    "wrong address": "nobody answers",
    "storage away": "no answer from http://127.0.0.1:",
    "storage's address": "AWS_ENDPOINT_URL 'localhost:9000' is no address of a server",
    "storage is a file": "storage",
    "study is a file": "the folder cannot be used: it is none",
    "newer study": "was written by a newer raystudy",
    "older Ray": f"Ray {OLD_RAY} does not fit",
    "older MLflow": "MLflow server 1.30.0 is not supported",
}
VERBS = {
    "wrong address": ("run", "prepare", "submit", "doctor"),
    "storage away": ("run", "prepare", "doctor", *READERS),
    "storage's address": ("run", "prepare", "doctor", *READERS),
    "storage is a file": ("run", "plan", "prepare", "doctor", *READERS),
    "study is a file": ("run", "plan", "prepare", "doctor", *READERS),
    "newer study": ("run", "plan", "prepare", "doctor", *READERS),
    "older Ray": ("run", "prepare", "submit", "doctor"),
    "older MLflow": ("run", "doctor"),
}


@dataclass(frozen=True)
class Places:
    """An experiment, and everything that can be wrong around it."""

    file: Path
    mlflow: str

    def command(self, wrong: str, verb: str) -> Command:
        """Return the command line by which a user meets what is wrong."""
        typed = [verb, str(self.file), *(["pneumonia", "H1/film.png"] if verb == "explain" else [])]
        environment: dict[str, str] = {}
        folder = self.file.parent
        if wrong == "wrong address" and verb == "prepare":  # it has no --address
            environment["RAY_ADDRESS"] = NOWHERE
        elif verb == "submit" or (verb, wrong) == ("doctor", "wrong address"):
            typed += ["--address", f"http://{NOWHERE}"]
        elif wrong == "wrong address":
            typed += ["--address", NOWHERE]
        elif wrong in ("storage away", "storage's address"):
            typed += ["--storage", "s3://bucket/studies"]
            server = f"http://127.0.0.1:{free_port()}" if wrong == "storage away" else "localhost:9000"
            environment |= {"AWS_ENDPOINT_URL": server, "AWS_REGION": "us-east-1"}
            environment |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        elif wrong == "storage is a file":
            typed += ["--storage", str(folder / "table.csv")]
        elif wrong == "study is a file":
            typed += ["--storage", str(folder / "file" / "studies")]
        elif wrong == "newer study":
            typed += ["--storage", str(folder / "newer")]
        elif wrong == "older MLflow":
            typed += ["--set", "tracking.enabled=true", "--set", f"tracking.uri={self.mlflow}"]
        return Command(typed, environment, OLD_RAY if wrong == "older Ray" else None)


class OldMLflow(BaseHTTPRequestHandler):
    """Answers what an MLflow server of long ago says of itself."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/version" else 404)
        self.end_headers()
        self.wfile.write(b"1.30.0")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def old_mlflow() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), OldMLflow) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    with typist() as answers:
        yield answers


@pytest.fixture(scope="module")
def answers(old_mlflow: str, ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Answer]:
    """What every verb says of everything that can be wrong, all at once: most of the time is waiting."""
    folder = tmp_path_factory.mktemp("wrong")
    places = Places(tiny.experiment_file(folder, folder / "studies"), old_mlflow)
    (folder / "studies").mkdir()
    Study.at(str(folder / "newer"), "tiny").storage.write_json("plan.json", {"format": FORMAT_VERSION + 1})
    (folder / "file" / "studies").mkdir(parents=True)
    (folder / "file" / "studies" / "tiny").write_text("this is no study")
    pairs = [(wrong, verb) for wrong, verbs in VERBS.items() for verb in verbs]
    said = ask([places.command(*pair) for pair in pairs])
    assert list((folder / "studies").rglob("lock.json")) == []
    return dict(zip(pairs, said, strict=True))


@pytest.mark.parametrize(("wrong", "verb"), [(w, v) for w, verbs in VERBS.items() for v in verbs])
def test_what_is_wrong_is_named_with_its_remedy(wrong: str, verb: str, answers: dict[tuple[str, str], Answer]) -> None:
    answer = answers[wrong, verb]
    assert refused(answer, WORDS[wrong]), answer


class OpenDashboard(BaseHTTPRequestHandler):
    """Answers everybody with the right Ray, and nothing else."""

    def do_GET(self) -> None:
        known = self.path.startswith("/api/version")
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": ray.__version__}).encode() if known else b"")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    "address",
    ["http://[::1", "http://127.0.0.1:99999", "ftp://127.0.0.1", "http://", f"http://{'a' * 70}:1", "http://a..b:1",
     "http://*:1"],
)  # fmt: skip
def test_what_is_no_dashboard_address_is_refused_as_such(address: str) -> None:
    with pytest.raises(StudyError, match="no dashboard address"):
        check_dashboard(address)


class WebServer(BaseHTTPRequestHandler):
    """Is no dashboard: it answers everybody with one ``status``, and keeps what it was told of a token."""

    status, told = 404, list[str | None]()

    def do_GET(self) -> None:
        self.told.append(self.headers.get("Authorization"))
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    ("status", "own", "says", "told"),
    [(404, "secret", r"this is no Ray dashboard \(HTTP 404\)", [None]),
     (404, "", r"this is no Ray dashboard \(HTTP 404\)", [None]),
     (500, "secret", r"this is no Ray dashboard \(HTTP 500\)", [None]),
     (200, "secret", r"this is no Ray dashboard \(HTTP 200\)", [None]),
     (401, "secret", "the token is wrong", [None, "Bearer secret"]),
     (401, "", "there is no token", [None]),
     (403, "secret", "the token is wrong", [None, "Bearer secret"])],
)  # fmt: skip
def test_only_a_server_that_asks_for_a_token_is_told_it(
    status: int, own: str, says: str, told: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WebServer, "status", status)
    monkeypatch.setattr(WebServer, "told", [])
    monkeypatch.setenv("RAY_AUTH_TOKEN", own)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with ThreadingHTTPServer(("127.0.0.1", 0), WebServer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with pytest.raises(StudyError, match=says):
            check_dashboard(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert WebServer.told == told


def test_a_dashboard_that_asks_nobody_and_hides_its_machines_is_refused() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), OpenDashboard) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with pytest.raises(StudyError, match="does not tell its machines"):
            check_dashboard(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


class GuardedDashboard(OpenDashboard):
    """Lets nobody in."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()


@pytest.mark.parametrize("malformed", ["abc\ndef", "abc def", "abcö", "abc\udcff", "abc\x7f", " "])
@pytest.mark.parametrize("place", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_malformed_token_is_named_as_such_and_not_told(
    malformed: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "token"
    file.write_bytes(malformed.encode(errors="surrogateescape"))
    monkeypatch.setenv(place, malformed if place == "RAY_AUTH_TOKEN" else str(file))
    with ThreadingHTTPServer(("127.0.0.1", 0), GuardedDashboard) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with pytest.raises(StudyError, match="the token is malformed") as refusal:
            check_dashboard(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert "abc" not in str(refusal.value)
    assert refusal.value.where == (place if place == "RAY_AUTH_TOKEN" else str(file))
    assert "ray get-auth-token" in str(refusal.value)


@pytest.mark.parametrize("path", ["/proc/self/mem", f"/{'a' * 300}"])  # its first page has nobody; no file has its name
def test_a_token_file_that_cannot_be_read_is_named(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", path)
    with pytest.raises(StudyError, match="the token cannot be read: ") as refusal:
        token()
    assert refusal.value.where == path


@pytest.mark.parametrize(
    ("host", "alone"),
    [("localhost", True), ("127.0.0.53", True), ("::1", True), ("[::1]", True), ("127.evil.example", False),
     ("10.0.0.5", False), ("", False), (None, False)],
)  # fmt: skip
def test_only_loopback_is_this_machine_alone(host: str | None, alone: bool) -> None:
    assert is_loopback(host) is alone


def test_a_database_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database")
    for uri in (f"sqlite:///{tmp_path}/nowhere/m.db", f"sqlite:///{tmp_path}/text.db", "postgresql://127.0.0.1:9/m"):
        with pytest.raises(StudyError, match="database cannot be opened"):
            check_server(uri)
    check_server(f"sqlite:///{tmp_path}/new.db")
    assert not (tmp_path / "new.db").exists()


@pytest.mark.parametrize("must_answer", [True, False])
@pytest.mark.parametrize(
    ("uri", "kind"),
    [("http://é..é", "an MLflow server"), (f"http://{'a' * 64}:5000", "an MLflow server"),
     ("http://127.0.0.1:port", "an MLflow server"), ("postgresql://u@h:port/d", "a database")],
)  # fmt: skip
def test_what_is_no_address_of_mlflow_is_refused_although_a_server_may_be_away(
    uri: str, kind: str, must_answer: bool
) -> None:
    with pytest.raises(StudyError, match=f"this is no address of {kind}") as refusal:
        check_server(uri, must_answer=must_answer)
    assert refusal.value.remedy


@pytest.mark.parametrize(
    ("revision", "known"), [("ffffffffffff", False), ("dc11669786a5", True), ("451aebb31d03", True), (None, True)]
)
def test_a_database_of_an_mlflow_that_is_not_known_is_refused(
    revision: str | None, known: bool, tmp_path: Path
) -> None:
    file = tmp_path / "m ä.db"
    with contextlib.closing(sqlite3.connect(file)) as base, base:
        base.execute("create table alembic_version (version_num varchar(32))")
        if revision is not None:
            base.execute("insert into alembic_version values (?)", [revision])
    before = file.read_bytes()
    for must_answer in (True, False):  # a wrong one stays wrong
        with contextlib.nullcontext() if known else pytest.raises(StudyError, match=r"ffffffffffff.* does not know"):
            check_server(f"sqlite:///{file}", must_answer=must_answer)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_sound_machine_is_not_found_wrong(ask: Ask, tmp_path: Path) -> None:
    file = tiny.experiment_file(tmp_path, tmp_path / "studies")
    odd = str(tmp_path / "x[" / "red]")  # as the markup of rich is written
    for answer in ask([Command(["doctor", str(file)]), Command(["doctor", str(file), "--storage", odd])]):
        assert answer.code == 0, answer
        assert answer.said.count("ok ") == 6
    assert f"{odd} can be written and read" in answer.said


def test_two_addresses_that_are_none_do_not_end_the_other_checks(ask: Ask, tmp_path: Path) -> None:
    file = tiny.experiment_file(tmp_path, tmp_path / "studies")
    mlflow = ["--set", "tracking.enabled=true", "--set", "tracking.uri=http://a..b"]
    (answer,) = ask([Command(["doctor", str(file), *mlflow, "--address", "host..name:6379"])])
    assert refused(answer, "wrong MLflow: ", "wrong cluster: "), answer
    assert answer.said.count("ok ") == 5


def test_an_mlflow_at_loopback_is_the_clusters_only_where_the_driver_is_submitted_there(
    ask: Ask, tmp_path: Path
) -> None:
    uri = f"http://{NOWHERE}"
    typed = ["doctor", str(tiny.experiment_file(tmp_path, tmp_path / "studies"))]
    typed += ["--set", "tracking.enabled=true", "--set", f"tracking.uri={uri}"]
    submitted = [Command([*typed, "--address", uri]), Command(typed, {"RAY_ADDRESS": uri})]
    here = [Command([*typed, "--address", NOWHERE]), Command(typed, {"RAY_ADDRESS": NOWHERE})]
    said = [answer.said for answer in ask([*submitted, *here])]
    assert [f"ok    MLflow: {uri} on the cluster's head" in text for text in said] == [True, True, False, False]
    assert ["wrong MLflow: " in text for text in said] == [False, False, True, True]


def test_repairing_the_mirror_refuses_an_old_server_too(old_mlflow: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"server 1\.30\.0 is not supported"):
        sync_study(Study.at(str(tmp_path), "tiny"), Tracking(uri=old_mlflow))
