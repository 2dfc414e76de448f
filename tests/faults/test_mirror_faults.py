"""MLflow down, slow, answering 500 or twice, dying in a batch: training is untouched, every datum is there once."""

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from raystudy.config import Tracking
from raystudy.mirror import Mirror
from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.progress import Silent
from raystudy.report.page import write_report
from raystudy.storage import json_bytes, open_storage
from raystudy.streams import stream
from raystudy.study import Study
from raystudy.tracking import sync_study
from tests.mlflow_server import BadLine, MLflowServer
from tests.mlflow_view import assert_mirrored_once, cursor_file, replay
from tests.orchestrate import tiny
from tests.tiny_study import TinyStudy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own, of its SQLAlchemy


class Said(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def seeded(*kinds: str) -> Callable[[int], str]:
    return lambda n: str(stream(11, "bad line", *kinds, n).choice(kinds))


LINES: dict[str, Callable[[int], str]] = {
    "down until the study's end": lambda _: "refuse",
    "down for a while": lambda n: "refuse" if n < 2 else "ok",
    "slow": lambda _: "slow",
    "answering 500 now and then": seeded("ok", "ok", "ok", "ok", "500"),
    "losing its answers in a batch": seeded("ok", "ok", "ok", "ok", "lost"),
    "doing everything twice": lambda _: "twice",
    "all of it": seeded("ok", "ok", "ok", "ok", "ok", "ok", "refuse", "slow", "500", "lost", "twice"),
}


@pytest.mark.parametrize("name", LINES)
def test_every_datum_is_there_once_after_a_server_was(
    name: str, tiny_study: TinyStudy, tmp_path: Path, mlflow_server: MLflowServer
) -> None:
    study = Study(open_storage(tmp_path).child("tiny"))
    with BadLine(mlflow_server.uri, LINES[name]).open() as line:
        mirror = Mirror(study, Tracking(uri=line.uri, experiment=name), interval=0.1)
        steps = replay(tiny_study.study, study)
        next(steps)
        began = time.monotonic()
        mirror.start()
        for _ in steps:
            time.sleep(0.02)
        assert time.monotonic() - began < 30  # nobody waited for it
        closing = time.monotonic()
        mirror.close()
        assert time.monotonic() - closing < 60
        assert line.seen
        line.fault = lambda _: "ok"
        sync_study(study, Tracking(uri=line.uri, experiment=name))
        assert_mirrored_once(study, line.uri, name)


def test_a_study_without_its_server_ends_with_the_same_bytes_and_is_mirrored_later(
    tiny_study: TinyStudy, tmp_path: Path, mlflow_server: MLflowServer
) -> None:
    root = tiny_study.file.parent
    experiment = tiny_study.experiment.with_values({"mixtures": [50], "storage": str(tmp_path)})
    storage = open_storage(tmp_path)
    os.symlink(root / "studies" / "_images", tmp_path / "_images")
    study = Study(storage.child("tiny"))
    with BadLine(mlflow_server.uri, LINES["down until the study's end"]).open() as line:
        settings, said, trained = Tracking(uri=line.uri, experiment="later"), Said(), list[int]()
        for fault in ("refuse", "ok"):
            line.fault = lambda _, fault=fault: fault
            outcome = run_study(
                plan_study(experiment, storage), storage, executor="plain", shown=said,
                mirror=Mirror(study, settings, interval=0.1), report=lambda s: write_report(s).text(),
            )  # fmt: skip
            assert outcome.exit_code == 0
            trained.append(outcome.trained)
            found = tiny.result_bytes(tmp_path)
            kept = tiny.result_bytes(root / "studies")
            assert found == {k: kept[k] for k in found}
        assert trained == [1, 0]
        assert sum("the MLflow mirror is behind" in text for text in said.lines) == 1
        assert_mirrored_once(study, line.uri, "later")


def test_damage_in_the_cursor_loses_nothing_and_repeats_nothing(tiny_study: TinyStudy, tmp_path: Path) -> None:
    study = Study(open_storage(tmp_path).child("tiny"))
    settings = Tracking(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    MlflowClient(tracking_uri=settings.uri).search_experiments()  # makes the tables

    def mirror_all() -> None:
        mirror = Mirror(study, settings)
        mirror.start()
        assert mirror.close()

    steps = replay(tiny_study.study, study)
    while "result" not in next(steps):
        pass
    for _ in range(2):  # the second trial has begun
        next(steps)
    mirror_all()
    name = cursor_file(study)
    whole, database = study.storage.read_bytes(name), (tmp_path / "mlflow.db").read_bytes()
    for _ in steps:
        pass
    draw = stream(12, "cursor")
    counts = [m.start(1) for m in re.finditer(rb'"events": (\d)', whole)]
    assert len(counts) == 2
    damaged = [whole[:at] + b"7" + whole[at + 1 :] for at in counts]
    damaged += [whole[: int(draw.integers(len(whole)))], json_bytes(json.loads(whole)["sent"]), b"[]"]
    for cursor in damaged:
        (tmp_path / "mlflow.db").write_bytes(database)
        study.storage.write_bytes(name, cursor)
        mirror_all()
        assert_mirrored_once(study, settings.uri)


def test_a_mirror_that_was_killed_anywhere_goes_on(tiny_study: TinyStudy, tmp_path: Path) -> None:
    study = tiny_study.copy(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    MlflowClient(tracking_uri=uri).search_experiments()  # makes the tables
    script = """
        import os, signal, sys
        import mlflow.store.tracking.sqlalchemy_store
        from raystudy.config import Tracking
        from raystudy.study import Study
        from raystudy.tracking import Line, Store

        class Fatal(Line):
            left = 0
            def __call__(self, request, *args, **kwargs):
                self.left -= 1
                if self.left == 0 and self.late:
                    request(*args, **kwargs)  # done, but nobody will know
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__call__(request, *args, **kwargs)

        killed = 0
        for n in range(1, 60):
            child = os.fork()
            if child == 0:
                line = Fatal()
                line.left, line.late = 6 * n, n % 2
                Store(Study.at(sys.argv[1], "tiny"), Tracking(uri=sys.argv[2]), line).sync(final=True)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            if os.WIFEXITED(status):
                sys.exit(os.WEXITSTATUS(status) or killed < 4)
            killed += 1
        sys.exit(3)
    """
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), uri],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert_mirrored_once(study, uri)
