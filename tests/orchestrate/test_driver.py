import os
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from ray.util import placement_group_table

from raystudy.config import load_experiment
from raystudy.errors import StudyError
from raystudy.lock import locked
from raystudy.orchestrate import jobs
from raystudy.orchestrate.assignment import Status, write_stop
from raystudy.orchestrate.driver import Executor, Outcome, _report, run, run_study
from raystudy.orchestrate.films import plan_readable
from raystudy.orchestrate.ledger import Ledger
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.progress import Silent
from raystudy.storage import open_storage
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


def test_plain_loop_and_ray_one_at_a_time_and_three_at_a_time_leave_the_same_bytes(
    films: Path, plain: dict[str, bytes], place: Path
) -> None:
    assert tiny.kinds(plain)["result.json"] == 3
    assert tiny.kinds(plain)["done.json"] == 6
    for overrides in (["resources.max_concurrent=1"], PACKED):
        outcome = tiny.run(films, place, overrides)
        assert (outcome.trained, outcome.explained, outcome.failures) == (3, 6, {})
        assert tiny.result_bytes(place) == plain
        shutil.rmtree(place / "tiny")


def test_films_streamed_from_a_file_of_the_node_leave_the_same_bytes(
    films: Path, plain: dict[str, bytes], place: Path
) -> None:
    node = Path(tempfile.gettempdir()) / f"raystudy-films-{os.getuid()}"
    before = {path: path.stat().st_mtime_ns for path in node.glob("squash32-*.u8")}
    outcome = tiny.run(films, place, ["images.node_memory_share=1e-9", "mixtures=[50]"])
    assert (outcome.trained, outcome.explained, outcome.failures) == (1, 2, {})
    assert {path: path.stat().st_mtime_ns for path in node.glob("squash32-*.u8")} != before
    streamed = tiny.result_bytes(place)
    assert tiny.kinds(streamed)["result.json"] == 1
    assert streamed == {name: plain[name] for name in streamed}


def test_a_seed_more_runs_exactly_the_missing_trials(films: Path, place: Path) -> None:
    first = tiny.run(films, place, work=works.null, executor="plain")
    before = {p: p.stat().st_mtime_ns for p in (place / "tiny" / "trials").glob("*/result.json")}
    second = tiny.run(films, place, ["seeds=[0, 1]"], works.null, executor="plain")
    assert (first.trained, second.trained, len(second.states)) == (3, 3, 6)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert tiny.run(films, place, ["seeds=[0, 1]"], works.null, executor="plain").trained == 0


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
    tiny.run(films, place, work=works.null, executor="plain")
    said = Said()
    tiny.run(films, place, ["training.epochs=4"], works.null, shown=said, executor="plain")
    assert any("training.epochs: 2 → 4  (3 trials)" in line for line in said.lines)
    assert len(list((place / "tiny" / "trials").iterdir())) == 6


def test_what_fails_is_marked_what_runs_out_of_memory_comes_back_and_the_study_finishes(
    films: Path, place: Path
) -> None:
    plan, root = tiny.planned(films, place, [*PACKED, "resources.max_failures=1", "mixtures=[0, 30, 70, 100]"])
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
    assert retry["driver"]  # so that another driver's `status` does not take it for its own
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
    plan, root = tiny.planned(films, place, ["resources.cpus=0.5", "resources.explain_cpus=0.5"])
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


class Wishing(Said):
    """Wishes that the study stops as soon as something is counted."""

    def __init__(self, study: Study) -> None:
        super().__init__()
        self.study = study

    def count(self, what: str, done: int, total: int, detail: str = "") -> None:
        write_stop(self.study, "a test")


def test_the_wish_to_stop_ends_the_preparation_of_films(films: Path, tmp_path: Path, ray_local: None) -> None:
    plan, root = tiny.planned(films, tmp_path / "studies")
    study = Study(root.child("tiny"))
    outcome = run_study(plan, root, shown=Wishing(study), work=works.null, executor="plain")
    assert (outcome.exit_code, outcome.trained, outcome.failures) == (130, 0, {})
    assert set(outcome.states.values()) == {"waiting"}
    assert not study.storage.exists("lock.json")
    assert run_study(plan, root, work=works.null, executor="plain").trained == 3


def test_a_study_that_looks_which_films_can_be_read_is_held_and_can_be_stopped(
    films: Path, tmp_path: Path, ray_local: None
) -> None:
    experiment = tiny.experiment(films, tmp_path / "studies", ["images.unreadable=drop"])
    study, told = Study(open_storage(experiment.storage).child("tiny")), list[str]()

    def ask() -> None:
        while not study.storage.exists("lock.json"):
            time.sleep(0.01)
        jobs.stop(experiment)
        with pytest.raises(StudyError, match="another driver") as refusal, locked(study.storage):
            pass
        told.append(str(refusal.value))

    asker = threading.Thread(target=ask)
    asker.start()
    assert run(experiment) == 130
    asker.join()
    assert told
    assert study.storage.list() == ["stop.json"]

    def take_over() -> None:
        while not study.storage.exists("lock.json"):
            time.sleep(0.01)
        study.storage.write_json("lock.json", {**study.storage.read_json("lock.json"), "token": "another"})
        write_stop(study, "the other one")

    other = threading.Thread(target=take_over)
    other.start()
    with pytest.raises(StudyError, match="another driver took this study over"):
        run(experiment)
    other.join()


def test_only_failed_where_nothing_failed_says_what_is_left(films: Path, tmp_path: Path) -> None:
    plan, root = tiny.planned(films, tmp_path)
    said = Said()
    assert run_study(plan, root, only_failed=True, shown=said, work=works.null).exit_code == 0
    assert [line for line in said.lines if "no trial failed, 3 of 3 are still to run" in line]


def test_the_wish_to_stop_ends_a_study_whose_trials_wait_for_a_machine_that_does_not_come(
    films: Path, place: Path
) -> None:
    plan, root = tiny.planned(films, place, ["resources.gpus=2"])  # there is one
    study, ended = Study(root.child("tiny")), list[Outcome]()

    def drive() -> None:
        ended.append(run_study(plan, root, work=works.null, address="a cluster that may grow"))

    driver = threading.Thread(target=drive, daemon=True)
    driver.start()
    while not any(group["state"] == "PENDING" for group in placement_group_table().values()):
        assert driver.is_alive()
        time.sleep(0.05)
    write_stop(study, "a test")
    driver.join(30)
    assert [outcome.exit_code for outcome in ended] == [130]
    assert set(ended[0].states.values()) == {"waiting"}
    assert not [n for n in study.storage.list("trials") if n.endswith("failed.json")]
    assert not study.storage.exists("lock.json")


@pytest.mark.parametrize("executor", ["plain", "ray"])
def test_only_failed_goes_on_with_the_failed_trials_after_an_interruption(
    executor: Executor, films: Path, place: Path
) -> None:
    plan, root = tiny.planned(films, place, ["resources.max_concurrent=1"])
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
    plan, root = tiny.planned(films, place, ["mixtures=[50]"])
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


def test_a_diverged_trial_is_marked_not_tried_again_and_in_the_report(films: Path, place: Path) -> None:
    wild = ["mixtures=[50]", "axes={training.lr_add_on: [3e-3, 1e30]}", "explain.enabled=false"]
    plan, root = tiny.planned(films, place, wild)
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
    tiny.run(films, place, ["mixtures=[50]", *bare], executor="plain")
    plan, root = tiny.planned(films, place, ["mixtures=[0, 50]", *bare])
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

    assert tiny.run(films, place, work=interrupted, executor="plain").exit_code == 130


def test_a_second_driver_is_refused(films: Path, tmp_path: Path) -> None:
    plan, root = tiny.planned(films, tmp_path)
    with locked(root.child("tiny")), pytest.raises(StudyError, match="another driver"):
        run_study(plan, root, executor="plain")


def test_a_study_of_a_newer_raystudy_is_refused(films: Path, tmp_path: Path) -> None:
    plan, root = tiny.planned(films, tmp_path)
    root.child("tiny").write_json("plan.json", {"format": 99})
    with pytest.raises(StudyError, match="newer raystudy"):
        run_study(plan, root)


def test_a_damaged_result_is_named_before_anything_starts(films: Path, tmp_path: Path) -> None:
    plan, root = tiny.planned(films, tmp_path)
    Study(root.child("tiny")).trial(plan.trials[0].trial_id).write_bytes("result.json", b'{"schema": 1, "status')
    with pytest.raises(StudyError, match="result is damaged"):
        run_study(plan, root)
    assert not root.child("tiny").exists("lock.json")


def test_films_that_cannot_be_read_are_named_or_left_out(tmp_path: Path, ray_local: None) -> None:
    films = tiny.make_films(tmp_path / "films")
    plan, root = tiny.planned(films, tmp_path / "studies")
    row = plan.trials[0].cohort.iloc[0]
    (films / "films" / Path(row["uri"]).name).write_bytes(b"no film")
    with pytest.raises(StudyError, match=r"1 images cannot be used: H"):
        run_study(plan, root, work=works.null, executor="plain")

    table = pd.read_csv(films / "table.csv")
    twice = f"H1/{table['file'][9]}"
    pd.concat([table, table[9:10]]).to_csv(films / "table.csv", index=False)
    with pytest.raises(StudyError, match="the image id stands in several rows"):
        tiny.planned(films, tmp_path / "studies")
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
