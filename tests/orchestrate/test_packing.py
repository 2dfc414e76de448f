import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import ray

from raystudy.errors import StudyError
from raystudy.orchestrate.slot import Placement
from tests.orchestrate import tiny, works

QUARTER = ["resources.gpus=0.25", "resources.cpus=0.1", "resources.explain_gpus=0.1", "seeds=[0, 1, 2, 3]"]


def test_four_trials_share_a_gpu_at_a_quarter_and_never_five_and_an_explanation_runs_beside(
    films: Path, place: Path
) -> None:
    ran: list[float] = []

    def now() -> float:
        return time.time()

    def explain() -> None:
        while not list(place.glob("tiny/hall/came-*")):
            time.sleep(0.02)
        ran.append(ray.get(ray.remote(num_cpus=0, num_gpus=0.1)(now).remote()))

    beside = threading.Thread(target=explain)
    beside.start()
    outcome = tiny.run(films, place, QUARTER, works.in_fours)
    beside.join()
    assert (outcome.trained, outcome.failures) == (12, {})
    files = sorted(place.glob("tiny/trials/*/note.json"), key=lambda p: p.stat().st_mtime)
    notes = [json.loads(p.read_text()) for p in files]
    assert Counter(note["whole"] for note in notes) == {4: 4, 8: 4, 12: 4}  # three parties, each whole
    assert {note["most"] for note in notes} == {4}  # and never a fifth beside them
    assert not any(note["writeable"] for note in notes)  # the shared pixels are nobody's to change
    assert ran[0] < files[7].stat().st_mtime  # it did not wait until nobody was left to come in


@pytest.mark.parametrize(
    ("gpus", "beside", "request_"),
    [
        (0.25, 0.1, 0.225),  # 4 x 0.225 + 0.1
        (1, 0.1, 0.9),
        (0.3, 0.1, 0.3),  # there is room
        (0.25, 0, 0.25),
        (0.25, 0.25, 0.25),  # five would fit
        (1 / 7, 0.1, 0.1285),
        (2, 0.1, 2),
        (0, 0.1, 0),
    ],
)
def test_trials_leave_room_for_an_explanation_where_that_lets_no_further_trial_in(
    gpus: float, beside: float, request_: float
) -> None:
    assert Placement(gpus=gpus, gpus_beside=beside).gpu_request == pytest.approx(request_)


@pytest.mark.parametrize("key", ["resources.explain_gpus", "resources.explain_cpus"])
def test_explanations_that_could_never_run_here_are_refused_before_anything_is_trained(
    key: str, films: Path, place: Path
) -> None:
    asked = f"{key}=3"  # there are two CPUs and a GPU
    with pytest.raises(StudyError, match="an explanation asks for 3") as refusal:
        tiny.run(films, place, ["mixtures=[50]", asked])
    assert f"--set {key}=" in str(refusal.value.remedy)
    assert not list(place.glob("tiny/trials/*/result.json"))
    assert not (place / "tiny" / "lock.json").exists()
    assert tiny.run(films, place, ["mixtures=[50]", asked], works.null).trained == 1  # nothing is explained
