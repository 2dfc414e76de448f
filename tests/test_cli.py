"""The command line as a user meets it: a process, an exit code, one message, and what is left on the disk."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from raystudy.cli import app
from tests.orchestrate import tiny
from tests.tiny_study import TinyStudy

RAYSTUDY = str(Path(sys.executable).parent / "raystudy")
DEMO = Path(__file__).parents[1] / "experiments/demo.yaml"
VERBS = ("plan", "prepare", "run", "status", "report", "explain", "submit", "stop", "doctor")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}
GUARD_SECONDS = 240  # nothing here lasts so long; a test that hangs fails


def raystudy(*arguments: object, timeout: int = GUARD_SECONDS) -> tuple[int, str]:
    """Run the command; return its exit code and everything it printed."""
    done = subprocess.run(
        [RAYSTUDY, *map(str, arguments)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a session of its own; a test that fails leaves nothing of it."""
    process = subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + GUARD_SECONDS
    while not true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def refused(*arguments: object) -> str:
    """Run a command that must be refused; return its one message."""
    code, output = raystudy(*arguments)
    assert code == 2, output
    assert "Traceback" not in output
    assert output.lower().count("error") >= 1
    return output


def cpu_seconds() -> float:
    """Return the CPU time of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment on real films that nobody has run."""
    root = tmp_path_factory.mktemp("cli")
    return tiny.experiment_file(root, root / "studies")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_shows_an_example(verb: str) -> None:
    shown = CliRunner().invoke(app, [verb, "--help"])
    assert shown.exit_code == 0
    assert re.search(rf"Examples?:\s+raystudy {verb}", re.sub(r"[`\s│]+", " ", shown.output))


def test_what_is_no_verb_and_what_lacks_its_argument_is_refused() -> None:
    assert "No such command 'fly'" in refused("fly")
    assert "Missing argument" in refused("run")


FILES = {
    "unknown key": ("mixtres: [0]", "mixtres: unknown key", "did you mean `mixtures`?"),
    "wrong type": ("seeds: many", "seeds: must be a list", 'got "many"'),
    "share outside 0..100": ("mixtures: [0, 120]", "mixtures.1: must be less than or equal to 100", "120"),
    "no such source": (
        "tasks: {pneumonia: {positive: pneumonia, negatives: {H3: no_finding}}}", "no such source 'H3'", "H1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_with_its_line_and_nothing_is_written(
    name: str, experiment: Path, tmp_path: Path
) -> None:
    line, what, remedy = FILES[name]
    tree = yaml.safe_load(experiment.read_text()) | {"storage": str(tmp_path / "studies")}
    tree.pop(line.split(":")[0], None)
    file = tmp_path / "bad.yaml"
    file.write_text(f"{line}\n{yaml.safe_dump(tree)}")
    message = refused("run", file)
    for part in ("bad.yaml:1", what, remedy):
        assert part in message
    assert not (tmp_path / "studies").exists()


def test_a_cell_with_too_few_images_is_refused_with_a_table_of_have_and_need(experiment: Path) -> None:
    message = refused("run", experiment, "--set", "cohort.train=500")
    assert "500" in message
    assert "too few" in message
    assert "cohort.shrink" in message
    assert not list((experiment.parent / "studies").glob("**/*.*"))


def test_a_storage_that_cannot_be_written_is_refused(experiment: Path) -> None:
    message = refused("run", experiment, "--storage", "/proc/nowhere")
    assert "/proc/nowhere" in message
    assert "--storage" in message


def test_missing_and_unreadable_films_are_refused_by_name(tmp_path: Path) -> None:
    file = tiny.experiment_file(tmp_path, tmp_path / "studies")
    films = sorted((tmp_path / "films").glob("north-*.png"))
    for film in films[::2]:
        film.unlink()
    for film in films[1::2]:
        film.write_bytes(b"no film at all")
    message = refused("run", file)
    assert "north-" in message
    assert "remedy" in message
    assert not list((tmp_path / "studies").glob("**/result.json"))


def test_ctrl_c_ends_with_130_and_checkpoints_for_the_same_command(tmp_path: Path) -> None:
    file = tiny.experiment_file(tmp_path, tmp_path / "studies", mixtures=[50], explain={"enabled": False})
    more = ("--set", "training.epochs=400", "--set", "training.projection_interval=400")

    def trains() -> bool:
        return any('"epoch"' in e.read_text() for e in tmp_path.glob("studies/tiny/trials/*/events"))

    with started(RAYSTUDY, "run", str(file), *more) as process:
        wait_until(trains, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output = process.communicate(timeout=GUARD_SECONDS)[0]
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "same command" in output
    assert not list(tmp_path.glob("**/result.json"))
    assert not list(tmp_path.glob("**/lock.json"))
    (trial,) = tmp_path.glob("studies/tiny/trials/*")
    assert list((trial / "checkpoint").iterdir())
    assert '"interrupted"' in (trial / "events").read_text()


INTERRUPTED_LOADING = """
import os, runpy, signal, sys

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
sys.meta_path.insert(0, CtrlC())
sys.argv = ["raystudy", "status", "nowhere.yaml"]
runpy.run_module("raystudy", run_name="__main__")
"""


def test_ctrl_c_while_the_command_is_loading_is_a_message_too() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_LOADING], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted; run the same command again to go on\n")


def test_a_run_of_a_finished_study_says_so_within_seconds(tiny_study: TinyStudy, tmp_path: Path) -> None:
    shutil.copytree(Path(tiny_study.study.storage.uri).parent, tmp_path, dirs_exist_ok=True)  # with its films
    before = tiny.result_bytes(tmp_path)
    began = cpu_seconds()
    code, output = raystudy("run", tiny_study.file, "--storage", tmp_path)
    assert code == 0, output
    assert cpu_seconds() - began < 20  # most of it is imports; a busy machine may take longer by the clock
    assert "all 3 trials are done" in output
    assert tiny.result_bytes(tmp_path) == before
    code, output = raystudy("status", tiny_study.file, "--storage", tmp_path, "--json")
    assert code == 0
    assert '"finished": 3' in output


def has_a_worker(pid: int) -> bool:
    """Whether a process has started one that draws phantom films."""
    children = [n for task in Path(f"/proc/{pid}/task").glob("*/children") for n in task.read_text().split()]
    return any(b"spawn_main" in file.read_bytes() for n in children if (file := Path(f"/proc/{n}/cmdline")).exists())


@pytest.mark.parametrize(
    ("number", "send", "films"),
    [(signal.SIGINT, os.killpg, 0), (signal.SIGINT, os.killpg, 100), (signal.SIGTERM, os.kill, 100)],
    ids=["Ctrl-C as workers start", "Ctrl-C", "SIGTERM"],
)
def test_a_signal_while_films_are_written_ends_with_130_and_leaves_whole_films(
    number: signal.Signals, send: Callable[[int, int], None], films: int, tmp_path: Path
) -> None:
    """A terminal sends Ctrl-C to the command and to all that it started; a supervisor tells the command alone."""
    tree = yaml.safe_load(DEMO.read_text()) | {"storage": str(tmp_path)}
    file = tmp_path / "phantoms.yaml"
    file.write_text(yaml.safe_dump(tree))

    def writes() -> bool:
        return has_a_worker(process.pid) and len(list(tmp_path.glob("_phantoms/*/*.png"))) >= films

    # background jobs of a shell ignore the signal
    with started("env", "--default-signal=INT", RAYSTUDY, "prepare", str(file)) as process:
        wait_until(writes, process)
        if not films:
            time.sleep(0.3)  # the workers import for about a second, and a traceback takes a Python that has begun
        send(process.pid, number)
        output = process.communicate(timeout=GUARD_SECONDS)[0]
    assert process.returncode == 130, output
    for fault in ("Traceback", "Fatal Python error"):
        assert fault not in output
    assert "same command" in output
    for film in tmp_path.glob("_phantoms/*/*.png"):
        Image.open(film).verify()
