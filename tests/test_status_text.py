"""What `raystudy status` shows, at the width of a small terminal."""

import io

from rich.console import Console

from raystudy.status_text import as_dict, clock, table
from raystudy.study import STATES, StudyStatus, TrialStatus

IDS = ("pneumonia-h1_060-seed0-3fa9c1", "abnormality-h1_100-seed12-c7737a")


def shown(*trials: TrialStatus, **how: bool) -> str:
    counts = {s: sum(t.state == s for t in trials) for s in STATES}
    sink = io.StringIO()
    Console(file=sink, width=80).print(table(StudyStatus("s", "u", trials, None, counts), **how))
    return sink.getvalue()


def test_ids_and_states_are_whole_and_columns_that_say_nothing_are_left_out() -> None:
    text = shown(*(TrialStatus(i, "finished", epoch=8, epochs=8, val_accuracy=97.5) for i in IDS))
    for trial_id in IDS:
        assert f"{trial_id}" in text
    assert text.count("finished") == 3  # two rows and the title
    assert "97.5 %" in text
    assert "left" not in text


def test_a_running_trial_tells_stage_speed_and_time_left_and_a_failed_one_its_message() -> None:
    text = shown(
        TrialStatus(IDS[0], "running", "joint", 3, 8, 201.4, 61.0, 88.0),
        TrialStatus(IDS[1], "failed", message="OSError: [disk] full"),
    )
    for part in (*IDS, "joint", "3/8", "201", "0:01:01", f"{IDS[1]}: OSError: [disk] full"):
        assert part in text
    assert clock(None) == "–"


def test_on_a_screen_that_is_too_low_what_is_cut_off_is_what_is_done() -> None:
    trials = [TrialStatus(f"done-{n}", "finished") for n in range(30)]
    text = shown(
        *trials, TrialStatus("bad", "failed", message="no memory"), TrialStatus("on", "running"), may_be_cut=True
    )
    assert [line.split()[0] for line in text.splitlines()[2:] if line.strip("─")][:4] == ["bad:", "trial", "on", "bad"]
    assert text.count("done-") == 30


def test_many_messages_leave_room_for_what_runs_on_a_screen_that_is_too_low() -> None:
    failed = [TrialStatus(f"bad-{n}", "failed", message="no memory") for n in range(30)]
    text = shown(*failed, TrialStatus("on", "running"), may_be_cut=True)
    assert text.index("\non ") < text.index("bad-5: no memory")
    assert text.count(": no memory") == 30


def test_a_study_tells_how_long_its_training_goes_on() -> None:
    running = TrialStatus("a", "running", "joint", 2, 10, 100.0, 16.0)  # 2 s an epoch
    slower = TrialStatus("b", "running", "joint", 5, 10, 50.0, 20.0)  # 4 s
    rest = (TrialStatus("c", "waiting"), TrialStatus("d", "interrupted", "warm", 3, 10), TrialStatus("e", "failed"))
    # Left are 8 + 5 + 10 + 7 epochs of 3 s, two at a time.
    text = shown(running, slower, *rest)
    assert "about 0:00:45 of training left" in " ".join(text.split())
    status = StudyStatus("s", "u", (running, slower, *rest))
    assert as_dict(status)["seconds_left"] == 45
    assert StudyStatus("s", "u", rest).seconds_left is None
