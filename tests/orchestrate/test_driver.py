import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from raystudy.config import load_experiment
from raystudy.errors import StudyError
from raystudy.orchestrate.assignment import Status, Work, write_stop
from raystudy.orchestrate.driver import Executor, Outcome, _report, run, run_study
from raystudy.orchestrate.explain import Explainer, ExplainJob
from raystudy.orchestrate.films import plan_readable, prepare_films
from raystudy.orchestrate.ledger import Ledger
from raystudy.orchestrate.lock import locked
from raystudy.orchestrate.plan import StudyPlan, plan_study
from raystudy.orchestrate.progress import Silent
from raystudy.orchestrate.slot import Placement
from raystudy.storage import Storage, open_storage
from raystudy.study import Study
from tests.orchestrate import tiny, works
from tests.tiny_study import TinyStudy

PACKED = ["resources.cpus=0.3", "resources.explain_cpus=0.3"]


class Said(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def planned(
    films: Path, storage: Path, overrides: list[str] | None = None, **more: object
) -> tuple[StudyPlan, Storage]:
    experiment = tiny.experiment(films, storage, overrides, **more)
    root = open_storage(storage)
    return plan_study(experiment, root), root


def run_tiny(
    films: Path, storage: Path, overrides: list[str] | None = None, work: Work | None = None, **more: object
) -> Outcome:
    plan, root = planned(films, storage, overrides)
    return run_study(plan, root, work=work, **more)


@pytest.fixture(scope="module")
def plain(films: Path, image_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the study leaves when one trial follows the other in one process."""
    storage = tmp_path_factory.mktemp("plain")
    shutil.copytree(image_store, storage / "_images")
    outcome = run_tiny(films, storage, executor="plain")
    assert (outcome.trained, outcome.explained, outcome.exit_code) == (3, 6, 0)
    return tiny.result_bytes(storage)


def test_plain_loop_and_ray_one_at_a_time_and_three_at_a_time_leave_the_same_bytes(
    films: Path, plain: dict[str, bytes], place: Path
) -> None:
    assert tiny.kinds(plain)["result.json"] == 3
    assert tiny.kinds(plain)["done.json"] == 6
    for overrides in (["resources.max_concurrent=1"], PACKED):
        outcome = run_tiny(films, place, overrides)
        assert (outcome.trained, outcome.explained, outcome.failures) == (3, 6, {})
        assert tiny.result_bytes(place) == plain
        shutil.rmtree(place / "tiny")


def test_films_streamed_from_a_file_of_the_node_leave_the_same_bytes(
    films: Path, plain: dict[str, bytes], place: Path
) -> None:
    node = Path(tempfile.gettempdir()) / f"raystudy-films-{os.getuid()}"
    before = {path: path.stat().st_mtime_ns for path in node.glob("squash32-*.u8")}
    outcome = run_tiny(films, place, ["images.node_memory_share=1e-9", "mixtures=[50]"])
    assert (outcome.trained, outcome.explained, outcome.failures) == (1, 2, {})
    assert {path: path.stat().st_mtime_ns for path in node.glob("squash32-*.u8")} != before
    streamed = tiny.result_bytes(place)
    assert tiny.kinds(streamed)["result.json"] == 1
    assert streamed == {name: plain[name] for name in streamed}


def test_a_seed_more_runs_exactly_the_missing_trials(films: Path, place: Path) -> None:
    first = run_tiny(films, place, work=works.null, executor="plain")
    before = {p: p.stat().st_mtime_ns for p in (place / "tiny" / "trials").glob("*/result.json")}
    second = run_tiny(films, place, ["seeds=[0, 1]"], works.null, executor="plain")
    assert (first.trained, second.trained, len(second.states)) == (3, 3, 6)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert run_tiny(films, place, ["seeds=[0, 1]"], works.null, executor="plain").trained == 0


def test_the_page_follows_the_plan_and_the_notes_without_anything_to_train(
    tiny_study: TinyStudy, tmp_path: Path
) -> None:
    study = tiny_study.copy(tmp_path)
    root, page = open_storage(tmp_path), "report/index.html"

    def again(*overrides: str) -> Outcome:
        experiment = load_experiment(tiny_study.file, [f"storage={tmp_path}", *overrides])
        return run_study(plan_study(experiment, root), root, report=_report)

    assert again().trained == 0
    whole = study.storage.stamps("report")
    assert b"3 of 3 trials finished" in study.storage.read_bytes(page)
    assert again().trained == 0
    assert study.storage.stamps("report") == whole  # nothing else to say
    assert again("mixtures=[0,50]").trained == 0
    assert b"2 of 2 trials finished" in study.storage.read_bytes(page)
    assert again("mixtures=[0,50]", "notes=[Looked at twice]").trained == 0
    assert b"Looked at twice" in study.storage.read_bytes(page)


def test_a_changed_spec_is_told_before_other_trials_start(films: Path, place: Path) -> None:
    run_tiny(films, place, work=works.null, executor="plain")
    said = Said()
    run_tiny(films, place, ["training.epochs=4"], works.null, shown=said, executor="plain")
    assert any("training.epochs: 2 → 4  (3 trials)" in line for line in said.lines)
    assert len(list((place / "tiny" / "trials").iterdir())) == 6


def test_what_fails_is_marked_what_runs_out_of_memory_comes_back_and_the_study_finishes(
    films: Path, place: Path
) -> None:
    plan, root = planned(films, place, [*PACKED, "resources.max_failures=1", "mixtures=[0, 30, 70, 100]"])
    study = Study(root.child("tiny"))
    crash, value, memory, sound = (study.trial(t.trial_id) for t in plan.trials)
    for directory, fail in ((crash, b"crash 9"), (value, b"value 9"), (memory, b"memory 1")):
        directory.write_bytes("fail", fail)
    started = time.monotonic()
    outcome = run_study(plan, root, work=works.fail_by_file)
    assert time.monotonic() - started >= 10  # the pause after memory ran out
    assert outcome.exit_code == 1
    assert list(outcome.states.values()) == ["failed", "failed", "finished", "finished"]
    assert set(outcome.failures) == {plan.trials[0].trial_id, plan.trials[1].trial_id}
    assert crash.read_json("failed.json")["attempts"] == 2
    assert value.read_json("failed.json")["attempts"] == 1  # a broken rule is not tried again
    assert "told to fail" in value.read_json("failed.json")["error"]
    (retry,) = memory.read_events("events")
    assert (retry["event"], retry["attempt"]) == ("retry", 1)
    assert "MemoryError" in retry["error"]
    assert not sound.exists("events")
    counts = study.status().counts
    assert (counts["failed"], counts["finished"]) == (2, 2)

    crash.delete("fail")
    value.delete("fail")
    again = run_study(plan, root, only_failed=True, work=works.fail_by_file, executor="plain")
    assert (again.trained, again.exit_code) == (2, 0)
    assert not crash.exists("failed.json")


def test_the_wish_to_stop_ends_the_study_and_the_next_run_goes_on(films: Path, place: Path) -> None:
    plan, root = planned(films, place, ["resources.cpus=0.5", "resources.explain_cpus=0.5"])
    study = Study(root.child("tiny"))

    def ask() -> None:
        while not any("/events" in n for n in study.storage.list("trials")):
            time.sleep(0.05)
        write_stop(study, "a test")

    asker = threading.Thread(target=ask)
    asker.start()
    outcome = run_study(plan, root, work=works.until_stopped)
    asker.join()
    assert (outcome.exit_code, outcome.trained) == (130, 0)
    assert set(outcome.states.values()) <= {"interrupted", "waiting"}
    assert "interrupted" in outcome.states.values()
    assert run_study(plan, root, work=works.null, executor="plain").trained == 3


@pytest.mark.parametrize("executor", ["plain", "ray"])
def test_only_failed_goes_on_with_the_failed_trials_after_an_interruption(
    executor: Executor, films: Path, place: Path
) -> None:
    plan, root = planned(films, place, ["resources.max_concurrent=1"])
    study, ids = Study(root.child("tiny")), [t.trial_id for t in plan.trials]
    run_study(plan, root, work=works.null, executor="plain")
    for trial_id in ids[1:]:
        study.trial(trial_id).delete("result.json")
        study.trial(trial_id).write_json("failed.json", {"error": "no memory", "attempts": 4})
    stopped = run_study(plan, root, only_failed=True, work=works.wish_to_stop, executor=executor)
    assert stopped.exit_code == 130
    assert [t.state for t in study.status().trials] == ["finished", "interrupted", "failed"]
    again = run_study(plan, root, only_failed=True, work=works.null, executor="plain")
    assert (again.trained, again.exit_code) == (2, 0)
    assert [t.state for t in study.status().trials] == ["finished"] * 3
    assert not [n for n in study.storage.list("trials") if n.endswith(("/failed.json", "/retried.json"))]


def test_only_failed_remembers_an_explanation_until_it_is_done(films: Path, place: Path) -> None:
    plan, root = planned(films, place, ["mixtures=[50]"])
    study = Study(root.child("tiny"))
    run_study(plan, root, executor="plain")
    directory = study.trial(plan.trials[0].trial_id)
    for folder in {n.rsplit("/", 1)[0] for n in directory.list("explain") if n.endswith("done.json")}:
        directory.delete_tree(folder)
        directory.write_json(f"{folder}/failed.json", {"error": "no memory", "attempts": 4})

    class Leaves(Said):
        def say(self, text: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(plan, root, only_failed=True, executor="plain", shown=Leaves())
    again = run_study(plan, root, only_failed=True, executor="plain")
    assert (again.explained, again.exit_code) == (2, 0)
    assert not [n for n in directory.list() if n.endswith("failed.json")]


def test_running_trials_end_when_another_driver_takes_the_study_over(films: Path, place: Path) -> None:
    plan, root = planned(films, place, ["resources.max_concurrent=1"])
    study = Study(root.child("tiny"))
    other = {"token": "another", "owner": "process 1 on elsewhere", "host": "elsewhere", "heartbeat": 1.0}
    lost: list[float] = []

    def take_over() -> None:
        while not any("/events" in n for n in study.storage.list("trials")):
            time.sleep(0.05)
        study.storage.write_json("lock.json", other)
        lost.append(time.monotonic())

    rival = threading.Thread(target=take_over)
    rival.start()
    with pytest.raises(StudyError, match="another driver took this study over"):
        run_study(plan, root, work=works.until_stopped)
    assert time.monotonic() - lost[0] < 8  # the next heartbeat is up to ten seconds away
    rival.join()
    assert study.storage.read_json("lock.json") == other
    assert not study.storage.exists("stop.json")
    assert count(place / "tiny", "started") == 1


def test_an_explanation_ends_when_another_driver_takes_the_study_over(films: Path, place: Path) -> None:
    plan, root = planned(films, place, ["mixtures=[50]"])
    study, trial = Study(root.child("tiny")), plan.trials[0]
    run_tiny(films, place, ["mixtures=[50]", "explain.enabled=false"], executor="plain")
    ledger = Ledger(study, plan)
    ledger.open()
    ledger.prepare_trials(plan.trials)
    shared = prepare_films(plan.trials, plan.image_table, root, Silent())
    images, key = shared.shared(), shared.key(trial)

    def ends(owner: str) -> str:
        explainer = Explainer(study, images, 1, Placement(), own_resource=False, owner=owner)
        explainer.add(ExplainJob(trial.trial_id, "prototypes", trial.explain, ledger.rows[trial.trial_id], key))
        news = explainer.poll(trials_running=False)
        while not news:
            time.sleep(0.05)
            news = explainer.poll(trials_running=False)
        return news[0].state

    study.storage.write_json("lock.json", {"token": "another"})
    assert ends("mine") == "interrupted"
    assert ends("another") == "finished"


def test_a_diverged_trial_is_marked_not_tried_again_and_in_the_report(films: Path, place: Path) -> None:
    wild = ["mixtures=[50]", "axes={training.lr_add_on: [3e-3, 1e30]}", "explain.enabled=false"]
    plan, root = planned(films, place, wild)
    study = Study(root.child("tiny"))
    first = run_study(plan, root, report=_report)
    assert (first.exit_code, list(first.states.values())) == (0, ["finished", "diverged"])
    tame, lost = study.status().trials
    assert (tame.state, lost.state, lost.message) == ("finished", "diverged", "the loss is not finite in epoch 2")
    page = study.storage.read_bytes("report/index.html").decode()
    assert "1 diverged" in page
    assert lost.message in page
    again = run_study(plan, root, report=_report)
    assert (again.trained, again.states) == (0, first.states)
    events = [e["event"] for e in study.trial(lost.trial_id).read_events("events")]
    assert (events.count("started"), events.count("diverged"), events.count("retry")) == (1, 1, 0)


def test_a_study_of_which_every_trial_diverged_ends_and_says_so(
    films: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = tiny.experiment(
        films, place, ["mixtures=[50]", "training.lr_backbone=1e30", "training.lr_add_on=1e30"]
    )
    for _ in range(2):
        assert run(experiment) == 0
        out = capsys.readouterr().out
        assert "no trial is finished, so there is no report: 1 diverged" in out
        assert "open the report" not in out


def test_checkpoints_of_a_finished_trial_go_where_its_driver_died_before_it_cleared_them(
    films: Path, place: Path
) -> None:
    bare = ["explain.enabled=false"]
    run_tiny(films, place, ["mixtures=[50]", *bare], executor="plain")
    plan, root = planned(films, place, ["mixtures=[0, 50]", *bare])
    study = Study(root.child("tiny"))
    begun, finished = (study.trial(t.trial_id) for t in plan.trials)
    for directory in (begun, finished):
        directory.write_bytes("checkpoint/000001.json", b"{}")
        directory.write_bytes("checkpoint/state-000001-abc.safetensors", b"tensors")
    Ledger(study, plan).open()
    assert finished.list("checkpoint") == []
    assert len(begun.list("checkpoint")) == 2
    finished.write_bytes("checkpoint/000001.json", b"{}")
    finished.write_bytes("result.json", finished.read_bytes("result.json")[:-9])
    with pytest.raises(StudyError, match="result is damaged"):
        Ledger(study, plan).open()
    assert finished.list("checkpoint") == ["checkpoint/000001.json"]


def test_a_trial_that_was_interrupted_is_an_interrupted_run_however_late_the_wish_is_seen(
    films: Path, place: Path
) -> None:
    def interrupted(*told: object) -> Status:
        return "interrupted"

    assert run_tiny(films, place, work=interrupted, executor="plain").exit_code == 130


def test_a_driver_starts_without_torch() -> None:
    slow = "{'torch', 'scipy.stats', 'mlflow'}"
    code = f"import sys, raystudy.orchestrate.driver; sys.exit({slow} & {{*sys.modules}} or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_second_driver_is_refused(films: Path, tmp_path: Path) -> None:
    plan, root = planned(films, tmp_path)
    with locked(root.child("tiny")), pytest.raises(StudyError, match="another driver"):
        run_study(plan, root, executor="plain")


def test_a_study_of_a_newer_raystudy_is_refused(films: Path, tmp_path: Path) -> None:
    plan, root = planned(films, tmp_path)
    root.child("tiny").write_json("plan.json", {"format": 99})
    with pytest.raises(StudyError, match="newer raystudy"):
        run_study(plan, root)


def test_a_damaged_result_is_named_before_anything_starts(films: Path, tmp_path: Path) -> None:
    plan, root = planned(films, tmp_path)
    Study(root.child("tiny")).trial(plan.trials[0].trial_id).write_bytes("result.json", b'{"schema": 1, "status')
    with pytest.raises(StudyError, match="result is damaged"):
        run_study(plan, root)
    assert not root.child("tiny").exists("lock.json")


def test_films_that_cannot_be_read_are_named_or_left_out(tmp_path: Path, ray_local: None) -> None:
    films = tiny.make_films(tmp_path / "films")
    plan, root = planned(films, tmp_path / "studies")
    row = plan.trials[0].cohort.iloc[0]
    (films / "films" / Path(row["uri"]).name).write_bytes(b"no film")
    with pytest.raises(StudyError, match=r"1 images cannot be used: H"):
        run_study(plan, root, work=works.null, executor="plain")

    table = pd.read_csv(films / "table.csv")
    twice = f"H1/{table['file'][9]}"
    pd.concat([table, table[9:10]]).to_csv(films / "table.csv", index=False)
    with pytest.raises(StudyError, match="the image id stands in several rows"):
        planned(films, tmp_path / "studies")
    experiment = tiny.experiment(films, tmp_path / "studies", ["images.unreadable=drop"])
    said = Said()
    readable = plan_readable(experiment, root, said)
    (line,) = said.lines
    assert line.startswith("3 images cannot be used and are left out: ")
    assert f"{row['image_id']} (not an image)" in line
    (listed,) = re.findall(r"; listed in (\S+quarantine\.parquet)$", line)
    reasons = pd.read_parquet(listed).groupby("image_id")["reason"].agg(list).to_dict()
    assert reasons == {row["image_id"]: ["not an image"], twice: ["duplicated id"] * 2}
    for trial in readable.trials:
        assert not {row["image_id"], twice} & {*trial.cohort["image_id"], *trial.tests["image_id"]}
    assert run_study(readable, root, work=works.null, executor="plain").trained == 3


COMMAND = [sys.executable, "-m", "raystudy.cli", "run"]


def start_driver(file: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen(
        [*COMMAND, str(file), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def count(study: Path, *events: str) -> int:
    texts = [p.read_text() for p in study.glob("trials/*/events")]
    return sum(text.count(f'"event":"{event}"') for text in texts for event in events)


def wait_for(study: Path, before: int, driver: subprocess.Popen[str], *events: str) -> None:
    until = time.monotonic() + 120
    while count(study, *events) <= before:
        assert driver.poll() is None, driver.stdout and driver.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.05)


def wait_until_locked(study: Path, driver: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until the lock is this driver's; a lock is replaced whole, so it can be read at any time."""
    until = time.monotonic() + seconds
    while json.loads((study / "lock.json").read_text())["pid"] != driver.pid:
        assert driver.poll() is None, "the driver ended before it took the lock"
        assert time.monotonic() < until, "the driver did not take the lock"
        time.sleep(0.05)


def test_a_killed_and_an_interrupted_driver_leave_a_study_that_ends_with_the_same_bytes(
    films: Path, plain: dict[str, bytes], place: Path
) -> None:
    file = tiny.experiment_file(films, place)
    study = place / "tiny"
    driver = start_driver(file)
    wait_for(study, 0, driver, "epoch")
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    assert json.loads((study / "lock.json").read_text())["pid"] == driver.pid

    driver = start_driver(file)
    wait_until_locked(study, driver)  # what the dead driver's workers still write does not count
    before = count(study, "started", "resumed")
    wait_for(study, before, driver, "started", "resumed")
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, out
    assert "run the same command again" in out
    assert not (study / "lock.json").exists()

    driver = start_driver(file)
    out, _ = driver.communicate(timeout=200)
    assert driver.returncode == 0, out
    assert tiny.result_bytes(place) == plain
    assert (study / "report" / "index.html").exists()

    started = time.monotonic()
    driver = start_driver(file, "--address", "127.0.0.1:9")  # nobody is there: a finished study starts no Ray
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0, out
    assert "all 3 trials are done" in out
    assert time.monotonic() - started < 20
