"""`raystudy` command lines, each in a process of its own, forked from one that has everything imported already.

python -m tests.orchestrate.verbs    for each line that it reads, a list of Command in JSON, it prints a list of Answer
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Command:
    """What is typed, and where.

    Parameters
    ----------
    ray : the version that the installed Ray says it is; None leaves it alone.
    """

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict[str, str])
    ray: str | None = None


@dataclass(frozen=True)
class Answer:
    """How a command ended, and its output."""

    code: int
    said: str


Ask = Callable[[list[Command]], list[Answer]]


def refused(answer: Answer, *words: str) -> bool:
    """Whether a command ended as a refusal that says these words and a remedy, and nothing of its inside."""
    wanted = (*words, "remedy: ")
    return answer.code == 2 and all(w in answer.said for w in wanted) and "Traceback" not in answer.said


@contextmanager
def typist() -> Iterator[Ask]:
    """Start one process for several lists of commands; those of a list run at once."""
    command = [sys.executable, "-m", "tests.orchestrate.verbs"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        into, out = process.stdin, process.stdout

        def ask(commands: list[Command]) -> list[Answer]:
            into.write(json.dumps([asdict(c) for c in commands]) + "\n")
            into.flush()
            return [Answer(**answer) for answer in json.loads(out.readline())]

        yield ask


def run(commands: list[Command]) -> list[Answer]:
    """Run all commands at once, forked from this process."""
    import raystudy.mirror
    import raystudy.orchestrate.doctor
    import raystudy.orchestrate.driver
    import raystudy.orchestrate.jobs
    import raystudy.report.page
    import raystudy.report.single
    import raystudy.torchvision_shim  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        files = [Path(folder) / str(i) for i in range(len(commands))]
        children = [fork.Process(target=_type, args=pair) for pair in zip(commands, files, strict=True)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        return [Answer(c.exitcode or 0, f.read_text()) for c, f in zip(children, files, strict=True)]


def _type(command: Command, file: Path) -> None:
    import ray

    from raystudy.cli import main

    out = os.open(file, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(command.environment)
    if command.ray:
        ray.__version__ = command.ray
    sys.argv = ["raystudy", *command.arguments]
    main()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps([asdict(answer) for answer in run([Command(**c) for c in json.loads(line)])]), flush=True)
