"""What a person sees while a study runs: bars on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

LINE_SECONDS = 15.0  # between two plain lines of one kind


class Display(Protocol):
    """Where the driver says what happens."""

    def say(self, text: str) -> None:
        """Print one line that stays."""
        ...

    def count(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Move the bar of ``what``."""
        ...

    def running(self, lines: dict[str, str]) -> None:
        """Replace what is shown of the running trials, by name."""
        ...


class Lines:
    """Plain lines for logs and pipes."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, int, int]] = {}

    def say(self, text: str) -> None:
        print(text, flush=True)

    def count(self, what: str, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        when, *before = self._last.get(what, (-LINE_SECONDS, -1, -1))
        if before != [done, total] and (done >= total or now - when >= LINE_SECONDS):
            self._last[what] = (now, done, total)
            print(f"{what}: {done}/{total}{f'  {detail}' if detail else ''}", flush=True)

    def running(self, lines: dict[str, str]) -> None:
        pass


class Bars:
    """Bars and one line per running trial on a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}
        self._trials: dict[str, TaskID] = {}

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def count(self, what: str, done: int, total: int, detail: str = "") -> None:
        if what not in self._bars:
            self._bars[what] = self._progress.add_task(what, total=total, detail="")
        self._progress.update(self._bars[what], completed=done, total=total, detail=detail)

    def running(self, lines: dict[str, str]) -> None:
        for name in set(self._trials) - set(lines):
            self._progress.remove_task(self._trials.pop(name))
        for name, detail in lines.items():
            if name not in self._trials:
                self._trials[name] = self._progress.add_task(f"  {name}", total=1, detail=detail)
            done, _, total = detail.partition(" ")[0].partition("/")
            if done.isdigit() and total.isdigit():
                self._progress.update(self._trials[name], completed=int(done), total=max(1, int(total)))
            self._progress.update(self._trials[name], detail=detail.partition(" ")[2])


class Silent:
    """Nothing at all, for callers that only want the outcome."""

    def say(self, text: str) -> None:
        pass

    def count(self, what: str, done: int, total: int, detail: str = "") -> None:
        pass

    def running(self, lines: dict[str, str]) -> None:
        pass


@contextmanager
def display() -> Iterator[Display]:
    """Give bars when standard output is a terminal, plain lines otherwise."""
    console = Console()
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        yield Lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        yield Bars(progress)
