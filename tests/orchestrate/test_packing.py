import json
from collections import Counter
from pathlib import Path

from tests.orchestrate import works
from tests.orchestrate.test_driver import run_tiny

QUARTER = ["resources.gpus=0.25", "resources.cpus=0.1", "seeds=[0, 1, 2, 3]"]


def test_four_trials_share_a_gpu_at_a_quarter_and_never_five(films: Path, place: Path) -> None:
    outcome = run_tiny(films, place, QUARTER, works.in_fours)
    assert (outcome.trained, outcome.failures) == (12, {})
    notes = [json.loads(p.read_text()) for p in place.glob("tiny/trials/*/note.json")]
    assert Counter(note["whole"] for note in notes) == {4: 4, 8: 4, 12: 4}  # three parties, each whole
    assert {note["most"] for note in notes} == {4}  # and never a fifth beside them
    assert not any(note["writeable"] for note in notes)  # the shared pixels are nobody's to change
