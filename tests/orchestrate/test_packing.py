import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.orchestrate import tiny

SCRIPT = """
import json, sys
from pathlib import Path
from raystudy.orchestrate.driver import run_study
from raystudy.orchestrate.plan import plan_study
from raystudy.orchestrate.session import connect
from raystudy.storage import open_storage
from tests.orchestrate import tiny, works

overrides = ["resources.gpus=0.25", "resources.cpus=0.1", "seeds=[0, 1, 2, 3]", "tracking.enabled=false"]
experiment = tiny.experiment(Path(sys.argv[1]), Path(sys.argv[2]), overrides)
root = open_storage(experiment.storage)
with connect(cpus=8, gpus=1, dashboard=False):
    outcome = run_study(plan_study(experiment, root), root, work=works.note)
print(json.dumps(outcome.trained))
"""


pytestmark = pytest.mark.faults  # counts overlaps in time: the long form, on a quiet machine


def test_four_trials_share_a_gpu_at_a_quarter_and_never_five(tmp_path: Path) -> None:
    tiny.make_films(tmp_path / "films")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "films"), str(tmp_path / "studies")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "12"
    times = [json.loads(p.read_text()) for p in (tmp_path / "studies").glob("tiny/trials/*/times.json")]
    together = [sum(t["start"] <= at["start"] < t["end"] for t in times) for at in times]
    assert max(together) == 4
    assert not any(t["writeable"] for t in times)  # the shared pixels are nobody's to change
