"""A real driver, and every process that it starts, known by a word in their environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "RAYSTUDY_TEST_DRIVER"
GUARD_SECONDS = 240.0  # nothing here lasts so long; a test that hangs fails


@dataclass
class Driver:
    """`raystudy run` as a process of its own."""

    process: subprocess.Popen[str]
    mark: str

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self, seconds: float = GUARD_SECONDS) -> tuple[int, str]:
        """Wait for the end; return exit code and output."""
        out, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, out

    def family(self) -> dict[int, str]:
        """Return the command line of every process that this driver started, by pid."""
        return {pid: line for pid, line in _marked(self.mark) if pid != self.process.pid}

    def one(self, word: str) -> int | None:
        """Wait for a process of the family that runs a program ``word``; None when the driver ends before."""
        until = time.monotonic() + GUARD_SECONDS
        while True:
            found = [pid for pid, line in self.family().items() if line.split(" ")[0].endswith(word)]
            if found:
                return found[0]
            if not self.alive:
                return None
            assert time.monotonic() < until, f"no {word}"
            time.sleep(0.01)

    def wait_until_gone(self) -> None:
        """Wait until nothing that this driver started is left."""
        until = time.monotonic() + GUARD_SECONDS
        while left := self.family():
            assert time.monotonic() < until, f"left behind: {left}"
            time.sleep(0.05)


@contextmanager
def driver(file: Path, storage: Path | str, *more: str, **environment: str) -> Iterator[Driver]:
    """Start `raystudy run`; whatever is left of it at the end of the block is killed."""
    mark = os.urandom(8).hex()
    process = subprocess.Popen(
        [sys.executable, "-m", "raystudy.cli", "run", str(file), "--storage", str(storage), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", MARK: mark, **environment},
        start_new_session=True,
    )
    started = Driver(process, mark)
    try:
        yield started
    finally:
        process.kill()
        if process.stdout and not process.stdout.closed:
            process.communicate()
        for pid in started.family():
            _kill(pid)


def wait_until(true: Callable[[], bool], driver: Driver) -> bool:
    """Wait for something, or for the driver's end; return whether it happened."""
    until = time.monotonic() + GUARD_SECONDS
    while not true():
        if not driver.alive:
            return true()
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.005)
    return True


def _marked(mark: str) -> Iterator[tuple[int, str]]:
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if line:  # a zombie has none
                    yield int(folder.name), line
        except OSError:
            continue  # it has just ended


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
