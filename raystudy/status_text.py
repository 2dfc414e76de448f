"""A study's status as a table for people and as plain data for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.text import Span, Text

from raystudy.study import STATES, StudyStatus, TrialStatus

COLUMNS = ("trial", "state", "stage", "epoch", "images/s", "left", "validation", "explained")
COLOURS = {
    "finished": "green",
    "running": "cyan",
    "failed": "red",
    "diverged": "magenta",
    "interrupted": "yellow",
    "stopped": "blue",
}
MESSAGES_ON_TOP = 5
LIVELIEST = ("running", "failed", "interrupted", "diverged", "stopped", "waiting", "finished")


def as_dict(status: StudyStatus) -> dict[str, Any]:
    """Return the status as JSON-ready data."""
    return {**asdict(status), "seconds_left": status.seconds_left}


def clock(seconds: float | None) -> str:
    """Return seconds as h:mm:ss, or a dash."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def table(status: StudyStatus, *, may_be_cut: bool = False) -> Group:
    """Return one row a trial and the counts by state as the title; columns that say nothing are left out.

    Below it stand the messages of trials that have one.  Plain lines: thousands of rows are there at once.

    Parameters
    ----------
    may_be_cut : on a screen that may be too low some messages come first, then what goes on and what went wrong.
    """
    counts = ", ".join(f"{status.counts[s]} {s}" for s in STATES if status.counts[s])
    driver = f"driver {status.driver.get('owner', '?')}" if status.driver else "no driver"
    trials = status.trials
    if may_be_cut:
        trials = tuple(sorted(trials, key=lambda trial: LIVELIEST.index(trial.state)))
    rows = [COLUMNS, *(_row(trial) for trial in trials)]
    filled = [i for i in range(len(COLUMNS)) if i < 2 or any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in filled}
    head, *lines = ("  ".join(row[i].ljust(widths[i]) for i in filled) for row in rows)
    out = [Text(head, "bold", no_wrap=True), Text("─" * len(head), "dim", no_wrap=True)]
    at = widths[0] + 2  # where the state stands
    for trial, line in zip(trials, lines, strict=True):
        spans = [Span(at, at + len(trial.state), COLOURS[trial.state])] if trial.state in COLOURS else []
        out.append(Text(line.rstrip(), no_wrap=True, spans=spans))
    left = f"; about {clock(status.seconds_left)} of training left" if status.seconds_left is not None else ""
    title = Text(f"{status.study}: {len(status.trials)} trials ({counts}); {driver}{left}", "italic")
    messages = [Text(f"{t.trial_id}: {t.message}") for t in status.trials if t.message]
    first = MESSAGES_ON_TOP if may_be_cut else 0
    return Group(title, Text(), *messages[:first], *out, *messages[first:])


def _row(trial: TrialStatus) -> tuple[str, ...]:
    return (
        trial.trial_id,
        trial.state,
        trial.stage if trial.state != "finished" else "",
        f"{trial.epoch}/{trial.epochs}" if trial.epochs else "",
        f"{trial.images_per_second:.0f}" if trial.images_per_second else "",
        clock(trial.seconds_left) if trial.state == "running" else "",
        f"{trial.val_accuracy:.1f} %" if trial.val_accuracy is not None else "",
        str(len(trial.explained)) if trial.explained else "",
    )
