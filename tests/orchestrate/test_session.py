import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray.exceptions
from ray._private import services

from raystudy.config import Resources
from raystudy.errors import StudyError
from raystudy.explanation_settings import ExplainSettings
from raystudy.orchestrate import explain, slot
from raystudy.orchestrate.access import token
from raystudy.orchestrate.assignment import Rows, TrialRows
from raystudy.orchestrate.cluster import placement_of
from raystudy.orchestrate.session import Session, check_address, connect, head_of, is_elsewhere
from raystudy.storage import open_storage
from raystudy.study import Study


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "nobody answers"),
        ("http://127.0.0.1:8265", "dashboard"),
        ("ray://127.0.0.1:10001", "Ray Client is not supported"),
        ("localhost", "is no address"),
        ("localhost:99999", "is no address"),
        ("127.0.0.1:²", "is no address"),
        (f"127.0.0.1:{'1' * 5000}", "is no address"),
        ("host..name:6379", "is no address"),
        (f"{'a' * 64}:6379", "is no address"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_with_its_remedy(address: str, message: str) -> None:
    with pytest.raises(StudyError, match=message) as refusal:
        check_address(address)
    assert refusal.value.remedy


def test_a_token_is_found_where_ray_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert token() == "secret"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    assert token() is None
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert token() == "secret"


def test_run_names_an_address_where_nobody_is_and_ends_with_2(tmp_path: Path) -> None:
    from tests.orchestrate import tiny

    file = tiny.experiment_file(tmp_path, tmp_path / "studies")
    command = [sys.executable, "-m", "raystudy.cli", "run", str(file), "--address", "127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "nobody answers" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "studies" / "tiny" / "lock.json").exists()


NESTED = """
from raystudy.orchestrate.session import connect
with connect() as outer, connect() as inner:
    print(outer.local, inner.local)
"""


def test_a_second_connection_of_a_submitted_job_is_no_machine_of_its_own_either(ray_local: None) -> None:
    address = ray.get_runtime_context().gcs_address
    command, environment = [sys.executable, "-c", NESTED], {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.stdout.split() == ["False", "False"], done.stderr
    with connect() as own:
        assert own.local


def test_auto_names_a_ray_that_runs_here_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "find_gcs_addresses", set[str])  # as on a machine without Ray
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(StudyError, match="no Ray is found on this machine") as refusal:
        head_of("auto")
    assert "ray start --head" in str(refusal.value.remedy)
    assert head_of(None) is head_of("local") is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    assert head_of(None) == head_of("auto") == "10.0.0.5:6379"
    assert head_of("local") is None


def test_a_host_whose_name_is_none_is_refused_before_it_is_looked_up() -> None:
    with pytest.raises(StudyError, match="is no address"):
        is_elsewhere("host..name:6379")


def test_a_head_is_elsewhere_unless_its_address_is_this_machines() -> None:
    own = ray.util.get_node_ip_address()
    heads = [f"{host}:6379" for host in ("127.0.0.1", "localhost", own, "192.0.2.1")]  # the last is nobody's
    assert [is_elsewhere(head) for head in heads] == [False, False, False, True]


def test_memory_that_ran_out_is_waited_for_longer_each_time_and_a_broken_rule_is_final() -> None:
    placement = slot.Placement(pause=1, oom_pause=10)
    memory = ray.exceptions.OutOfMemoryError("the node")
    pauses = [slot.pause_before_retry(memory, attempt, placement) for attempt in (1, 2, 3, 9)]
    assert 10 <= pauses[0] < 20 <= pauses[1] < 40 <= pauses[2] < 80
    assert pauses[3] == slot.LONGEST_PAUSE
    assert slot.pause_before_retry(ray.exceptions.WorkerCrashedError(), 3, placement) == 1
    broken = ray.exceptions.RayTaskError("f", "traceback", ValueError("rule"))
    assert slot.is_final(broken)
    assert not slot.is_final(memory)


def test_an_explanation_that_ran_out_of_memory_rests_and_the_driver_goes_on(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @ray.remote(max_retries=0)
    def run_out(*told: object) -> None:
        raise MemoryError("told to run out")

    monkeypatch.setattr(explain, "explanation_task", run_out)
    study, rows, wished = Study(open_storage(tmp_path)), TrialRows(Rows("a", ""), Rows("b", "")), threading.Event()
    rests = slot.Placement(cpus=1, max_failures=1, oom_pause=2)
    explainer = explain.Explainer(study, {"k": ray.put(0)}, 2, rests, own_resource=False, stopping=wished.is_set)

    def next_news() -> list[explain.ExplainNews]:
        while not (news := explainer.poll(trials_running=False)):
            time.sleep(0.02)
        return news

    explainer.add(explain.ExplainJob("a", "prototypes", ExplainSettings(), rows, "k"))
    (retry,) = next_news()
    rested = time.monotonic()
    assert (retry.state, explainer.running, explainer.queue) == ("retry", [], 1)
    explainer.add(explain.ExplainJob("one", "prototypes", ExplainSettings(), rows, "k"))
    assert [(n.job.trial_id, n.state) for n in next_news()] == [("one", "retry")]  # it did not wait for the first
    assert [(n.job.trial_id, n.state) for n in next_news()] == [("a", "failed")]
    assert time.monotonic() - rested > 2
    wished.set()
    assert [(n.job.trial_id, n.state) for n in next_news()] == [("one", "interrupted")]
    assert explainer.queue == 0


def test_an_explanation_that_waits_for_a_machine_is_dropped_by_the_wish_to_stop(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "STOP_SECONDS", 0.1)
    study, rows, wished = Study(open_storage(tmp_path)), TrialRows(Rows("a", ""), Rows("b", "")), threading.Event()
    never = slot.Placement(cpus=1, gpus=2)  # there is one
    explainer = explain.Explainer(study, {"k": ray.put(0)}, 1, never, own_resource=False, stopping=wished.is_set)
    explainer.add(explain.ExplainJob("a", "prototypes", ExplainSettings(), rows, "k"))
    assert explainer.poll(trials_running=False) == []
    assert explainer.queue == 1
    wished.set()
    until = time.monotonic() + 60
    while not (news := explainer.poll(trials_running=False)):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert [(n.job.trial_id, n.state) for n in news] == [("a", "interrupted")]
    assert (explainer.queue, study.storage.list()) == (0, [])


def test_cpus_are_left_for_explanations_where_the_cluster_has_no_slots_for_them() -> None:
    plain = Session(False, cpus=8, gpus=0, explain_slots=0, dashboard=None)
    slots = Session(False, cpus=8, gpus=0, explain_slots=2, dashboard=None)
    assert placement_of(Resources(cpus=2), plain).max_concurrent == 3
    assert placement_of(Resources(cpus=2), slots).max_concurrent is None
    assert placement_of(Resources(cpus=2, max_concurrent=1), plain).max_concurrent == 1
    assert placement_of(Resources(gpus=0.25), plain).max_concurrent is None


def test_a_trial_that_no_machine_here_can_hold_is_refused() -> None:
    with pytest.raises(StudyError, match="asks for 4 cpus, this machine has 2"):
        slot.check_placement(slot.Placement(cpus=4), cpus=2, gpus=0)
    with pytest.raises(StudyError, match=r"resources\.gpus"):
        slot.check_placement(slot.Placement(gpus=0.25), cpus=2, gpus=0)


def test_an_explanation_that_no_machine_here_can_hold_is_refused_together_with_its_trial() -> None:
    task = slot.Placement(cpus=1, gpus=0.1)
    slot.check_placement(slot.Placement(), cpus=2, gpus=1, explanation=task)
    with pytest.raises(StudyError, match=r": an explanation asks for 0\.1 gpus, this machine has 0\n") as refusal:
        slot.check_placement(slot.Placement(), cpus=2, gpus=0, explanation=task)
    assert "--set resources.explain_gpus=0," in str(refusal.value.remedy)
    with pytest.raises(StudyError, match=r"a trial asks for 0\.25 gpus.*; an explanation asks for 0\.1 gpus") as both:
        slot.check_placement(slot.Placement(gpus=0.25), cpus=2, gpus=0, explanation=task)
    assert "--set resources.gpus=0 --set resources.explain_gpus=0," in str(both.value.remedy)


def test_ctrl_c_that_python_discards_while_ray_starts_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    def start(**options: object) -> SimpleNamespace:
        with contextlib.suppress(KeyboardInterrupt):  # as in a hook of a fork
            signal.raise_signal(signal.SIGINT)
        return SimpleNamespace(dashboard_url=None)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append("Ray"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    try:
        with pytest.raises(KeyboardInterrupt), connect("local"):
            pytest.fail("the study went on")
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == ["Ray"]
