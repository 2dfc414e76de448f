"""What `raystudy status` shows, at the width of a small terminal."""

import io

from rich.console import Console

from raystudy.status_text import clock, table
from raystudy.study import STATES, StudyStatus, TrialStatus

IDS = ("pneumonia-h1_060-seed0-3fa9c1", "abnormality-h1_100-seed12-c7737a")


def shown(*trials: TrialStatus) -> str:
    counts = {s: sum(t.state == s for t in trials) for s in STATES}
    sink = io.StringIO()
    Console(file=sink, width=80).print(table(StudyStatus("s", "u", trials, None, counts)))
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
