"""A study's status as a table for people and as plain data for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from raystudy.study import STATES, StudyStatus

COLOURS = {"finished": "green", "running": "cyan", "failed": "red", "diverged": "magenta", "interrupted": "yellow"}


def as_dict(status: StudyStatus) -> dict[str, Any]:
    """Return the status as JSON-ready data."""
    return asdict(status)


def clock(seconds: float | None) -> str:
    """Return seconds as h:mm:ss, or a dash."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def table(status: StudyStatus) -> Table:
    """Return one row a trial and the counts by state as the title."""
    counts = ", ".join(f"{status.counts[s]} {s}" for s in STATES if status.counts[s])
    driver = f"driver {status.driver.get('owner', '?')}" if status.driver else "no driver"
    out = Table(title=f"{status.study}: {len(status.trials)} trials ({counts}); {driver}", title_justify="left")
    for name in ("trial", "state", "stage", "epoch", "images/s", "left", "validation", "explained", "message"):
        out.add_column(name, overflow="fold")
    for trial in status.trials:
        colour = COLOURS.get(trial.state, "white")
        out.add_row(
            trial.trial_id,
            f"[{colour}]{trial.state}[/{colour}]",
            trial.stage,
            f"{trial.epoch}/{trial.epochs}" if trial.epochs else "",
            f"{trial.images_per_second:.0f}" if trial.images_per_second else "",
            clock(trial.seconds_left) if trial.state == "running" else "",
            f"{trial.val_accuracy:.1f} %" if trial.val_accuracy is not None else "",
            str(len(trial.explained)) if trial.explained else "",
            trial.message,
        )
    return out
