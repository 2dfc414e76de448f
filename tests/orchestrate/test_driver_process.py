"""`raystudy run` as a process: what it loads, and that it may be killed (interrupted: tests/test_cli.py)."""

import json
import subprocess
import sys
from pathlib import Path

from tests.faults.processes import driver, wait_until
from tests.orchestrate import tiny


def count(study: Path, *events: str) -> int:
    texts = [p.read_text() for p in study.glob("trials/*/events")]
    return sum(text.count(f'"event":"{event}"') for text in texts for event in events)


def test_a_killed_driver_leaves_a_study_that_ends_with_the_same_bytes(
    films: Path, plain: dict[str, bytes], place: Path
) -> None:
    file, study = tiny.experiment_file(films, place, mixtures=[50]), place / "tiny"
    with driver(file, place) as killed:
        assert wait_until(lambda: count(study, "epoch") > 0, killed)
        killed.kill()
        assert json.loads((study / "lock.json").read_text())["pid"] == killed.process.pid
        with driver(file, place) as last:  # while the dead one's workers may still write
            code, out = last.end()
            assert code == 0, out
    found = tiny.result_bytes(place)
    assert tiny.kinds(found)["result.json"] == 1
    assert found == {name: plain[name] for name in found}
    assert not (study / "lock.json").exists()
    assert (study / "report" / "index.html").exists()

    with driver(file, place, "--address", "127.0.0.1:9") as finds_all_done:  # nobody is there, and no Ray starts
        code, out = finds_all_done.end()
        assert code == 0, out
        assert "the trial is done" in out


def test_a_driver_starts_without_torch() -> None:
    slow = "{'torch', 'scipy.stats', 'mlflow'}"
    code = f"import sys, raystudy.orchestrate.driver; sys.exit({slow} & {{*sys.modules}} or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
