import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from subprocess import PIPE

import pytest
from typer.testing import CliRunner

from raystudy.cli import app
from raystudy.errors import StudyError
from raystudy.lock import LOCK, StudyLock, gone_from_here, locked
from raystudy.orchestrate import driver
from raystudy.orchestrate.assignment import stop_watch
from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.explain import Explainer, ExplainJob
from raystudy.orchestrate.films import prepare_films
from raystudy.orchestrate.ledger import Ledger
from raystudy.orchestrate.progress import Silent
from raystudy.orchestrate.slot import Placement
from raystudy.storage import Storage, open_storage
from raystudy.study import Study
from tests.orchestrate import tiny, works
from tests.tiny_study import TinyStudy


def dead_record(storage: Storage, **more: object) -> dict[str, object]:
    """Leave the lock of a driver of this host that was killed."""
    code = (
        "import sys, os; from raystudy.lock import StudyLock; from raystudy.storage import open_storage; "
        "StudyLock(open_storage(sys.argv[1])).acquire(); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, storage.uri], check=False, timeout=60)
    record = {**storage.read_json(LOCK), **more}
    storage.write_json(LOCK, record)
    return record


def test_the_lock_names_its_owner_and_goes_with_it(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with locked(storage):
        record = storage.read_json(LOCK)
        assert record["pid"] == os.getpid()
        assert str(os.getpid()) in record["owner"]
        assert record["host"] in record["owner"]
    assert storage.list() == []


def test_a_second_driver_is_refused_and_told_who_works(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with locked(storage), pytest.raises(StudyError, match=f"process {os.getpid()}"), locked(storage):
        pass
    with locked(storage):
        pass


def test_the_lock_of_a_driver_that_was_killed_on_this_host_is_taken_over(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    dead = dead_record(storage)
    with locked(storage):
        assert storage.read_json(LOCK)["token"] != dead["token"]
        assert storage.list() == [LOCK]


def test_a_pid_that_was_given_to_another_process_is_not_taken_for_the_owner(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    dead_record(storage, pid=os.getpid())
    with locked(storage):
        pass
    dead_record(storage, pid="no number")
    with pytest.raises(StudyError, match="--take-over"):
        StudyLock(storage).acquire()


@pytest.mark.parametrize("foreign", [True, False])
def test_a_process_that_proc_hides_is_not_taken_for_dead(
    foreign: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another_users(pid: int, signal: int) -> None:
        assert (pid, signal) == (os.getpid(), 0)
        if foreign:
            raise PermissionError

    storage = open_storage(tmp_path)
    with locked(storage, beat_seconds=0.05):
        record = storage.read_json(LOCK)
        monkeypatch.setattr("raystudy.lock._start_time", lambda pid: None)  # /proc with hidepid
        monkeypatch.setattr(os, "kill", another_users)
        assert gone_from_here(record) is None
        with pytest.raises(StudyError, match="--take-over"):
            StudyLock(storage).acquire()
        with pytest.raises(StudyError, match="another driver works"):  # its heartbeat goes on
            StudyLock(storage, take_over=True, beat_seconds=0.1).acquire()
        assert storage.read_json(LOCK)["token"] == record["token"]
    storage.write_json(LOCK, record)  # nobody keeps it any longer
    StudyLock(storage, take_over=True, beat_seconds=0.01).acquire()
    assert storage.read_json(LOCK)["token"] != record["token"]


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="needs Linux's /proc")
def test_a_process_whose_name_was_cut_within_a_letter_is_alive(tmp_path: Path) -> None:
    name = Path("/proc/self/comm")
    before = name.read_bytes()
    name.write_bytes("fourteen bytesä".encode())  # the kernel keeps fifteen
    try:
        with locked(storage := open_storage(tmp_path)):
            assert gone_from_here(storage.read_json(LOCK)) is False
    finally:
        name.write_bytes(before)


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1, 2**31, 10**30])
def test_a_pid_that_no_process_can_have_is_dead(pid: int, tmp_path: Path) -> None:
    with locked(storage := open_storage(tmp_path)):
        assert gone_from_here({**storage.read_json(LOCK), "pid": pid}) is True


def test_a_killed_driver_that_nobody_has_waited_for_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=PIPE)
    with locked(storage := open_storage(tmp_path)):
        record = {**storage.read_json(LOCK), "pid": child.pid}
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    assert gone_from_here(record) is True
    child.communicate()
    assert gone_from_here(record) is True


def test_a_driver_elsewhere_is_taken_over_only_when_the_user_says_so_and_it_is_silent(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    dead_record(storage, host="elsewhere", owner="process 7 on elsewhere")
    with pytest.raises(StudyError, match="--take-over"):
        StudyLock(storage).acquire()
    with locked(storage, take_over=True, beat_seconds=0.1):
        assert storage.read_json(LOCK)["pid"] == os.getpid()


def test_a_driver_elsewhere_that_still_beats_is_not_taken_over_whatever_the_clocks_say(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    record = dead_record(storage, host="elsewhere", heartbeat=0.0)
    ended = threading.Event()

    def beat() -> None:
        n = 0
        while not ended.wait(0.05):
            n += 1
            storage.write_json(LOCK, {**record, "heartbeat": float(n)})

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(StudyError, match="another driver"):
            StudyLock(storage, take_over=True, beat_seconds=0.1).acquire()
    finally:
        ended.set()
        thread.join()


def test_of_many_drivers_that_take_over_one_wins(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    dead_record(storage)
    code = (
        "import sys; from raystudy.lock import StudyLock; from raystudy.errors import StudyError\n"
        "from raystudy.storage import open_storage\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: StudyLock(open_storage(sys.argv[1])).acquire(); print('won', flush=True)\n"
        "except StudyError: print('refused', flush=True)\n"
        "sys.stdin.readline()"  # a winner holds the lock until the last racer has tried
    )
    command = [sys.executable, "-uc", code, storage.uri]
    racers = [subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, bufsize=1) for _ in range(6)]
    streams = [(racer.stdin, racer.stdout) for racer in racers if racer.stdin and racer.stdout]
    assert [out.readline() for _, out in streams] == ["ready\n"] * 6
    for start, _ in streams:
        start.write("\n")
    assert sorted(out.readline() for _, out in streams) == ["refused\n"] * 5 + ["won\n"]
    for racer in racers:
        racer.communicate()


def test_a_claim_that_was_left_half_done_does_not_block_for_ever(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    dead = dead_record(storage)
    claimant = {**dead, "token": "feed", "pid": 999_999_999}
    storage.write_bytes(f"lock-{dead['token']}.json", json.dumps(claimant).encode())
    with locked(storage):
        assert storage.list() == [LOCK]


def test_a_driver_whose_lock_was_taken_over_learns_it(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with locked(storage, beat_seconds=0.05) as lock:
        storage.write_json(LOCK, {"token": "another"})
        until = time.monotonic() + 60
        while not lock.lost and time.monotonic() < until:
            time.sleep(0.02)
        assert lock.lost
    assert storage.read_json(LOCK) == {"token": "another"}


def test_a_damaged_claim_is_refused_by_name_and_passed_when_the_user_says_so(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    dead = dead_record(storage)
    for claim in (f"lock-{dead['token']}.json", f"lock-{dead['token']}-damaged.json"):
        storage.write_bytes(claim, b"{")
    with pytest.raises(StudyError, match=f"a damaged lock-{dead['token']}") as refusal:
        StudyLock(storage).acquire()
    assert "--take-over" in str(refusal.value)
    with locked(storage, take_over=True, beat_seconds=0.1):
        assert storage.list() == [LOCK]


def test_a_run_takes_the_lock_of_another_host_over_when_the_user_says_so(
    tiny_study: TinyStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "locked", partial(locked, beat_seconds=0.1))
    study, typed = tiny_study.copy(tmp_path), ["run", str(tiny_study.file), "--storage", str(tmp_path)]
    lock = {"owner": "process 1 on gone", "host": "gone", "token": "t", "heartbeat": 1.0}
    study.storage.write_json(LOCK, lock)
    done = CliRunner().invoke(app, typed)
    assert (done.exit_code, "--take-over" in done.output) == (2, True), done.output
    assert study.storage.read_json(LOCK) == lock
    done = CliRunner().invoke(app, [*typed, "--take-over"])
    assert (done.exit_code, "0 of 3 trials to run" in done.output) == (0, True), done.output
    assert not study.storage.exists(LOCK)


def test_the_lock_holds_on_object_storage(s3_bucket: str) -> None:
    storage = open_storage(s3_bucket)
    with locked(storage, beat_seconds=0.1) as lock:
        beat = storage.read_json(LOCK)["heartbeat"]
        with pytest.raises(StudyError, match="another driver"), locked(storage):
            pass
        until = time.monotonic() + 60
        while storage.read_json(LOCK)["heartbeat"] == beat and time.monotonic() < until:
            time.sleep(0.05)
        assert storage.read_json(LOCK)["heartbeat"] > beat
        assert not lock.lost
    assert storage.list() == []
    dead = dead_record(storage)
    with locked(storage):
        assert storage.read_json(LOCK)["token"] != dead["token"]


def test_a_trial_tells_its_drivers_lock_from_anothers_and_from_none(tmp_path: Path) -> None:
    study = Study(open_storage(tmp_path))
    for lock, ends in ((b'{"token": "mine"}', False), (b'{"token": "other"}', True), (b"{", False)):
        study.storage.write_bytes(LOCK, lock)
        assert stop_watch(study, owner="mine")() is ends
        assert not stop_watch(study)()
    study.storage.delete(LOCK)
    assert not stop_watch(study, owner="mine")()


def test_a_damaged_lock_names_itself(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write_bytes(LOCK, b"{")
    with pytest.raises(StudyError, match=r"damaged lock\.json"):
        StudyLock(storage).acquire()


def test_running_trials_end_when_another_driver_takes_the_study_over(
    films: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "locked", partial(locked, beat_seconds=600))  # no heartbeat tells it
    plan, root = tiny.planned(films, place, ["resources.max_concurrent=1"])
    study = Study(root.child("tiny"))
    other = {"token": "another", "owner": "process 1 on elsewhere", "host": "elsewhere", "heartbeat": 1.0}

    def take_over() -> None:
        while not any("/events" in n for n in study.storage.list("trials")):
            time.sleep(0.05)
        study.storage.write_json("lock.json", other)

    rival = threading.Thread(target=take_over)
    rival.start()
    with pytest.raises(StudyError, match="another driver took this study over"):
        run_study(plan, root, work=works.until_stopped)
    rival.join()
    assert study.storage.read_json("lock.json") == other
    assert not study.storage.exists("stop.json")
    events = [e["event"] for t in plan.trials for e in study.trial(t.trial_id).read_events("events")]
    assert events.count("started") == 1


def test_an_explanation_ends_when_another_driver_takes_the_study_over(films: Path, place: Path) -> None:
    plan, root = tiny.planned(films, place, ["mixtures=[50]"])
    study, trial = Study(root.child("tiny")), plan.trials[0]
    tiny.run(films, place, ["mixtures=[50]", "explain.enabled=false"], executor="plain")
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
