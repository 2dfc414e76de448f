"""What a worker is told, and the small files by which driver and workers talk: light, without torch.

``stop.json`` of a study is the wish that it ends with checkpoints; ``failed.json`` of a trial or explanation job says
that it failed for good, ``retried.json`` of a trial that it had failed and has begun again, ``stopped.json`` of a trial
that a search ended it early.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import pandas as pd

from raystudy.errors import StudyError
from raystudy.images.array import ImageArray
from raystudy.lock import held_by_another
from raystudy.storage import Storage
from raystudy.study import Study

STOP = "stop.json"
FAILED = "failed.json"
RETRIED = "retried.json"
STOPPED = "stopped.json"  # of a trial: a search ended it early; it is not missing
Status = Literal["finished", "diverged", "interrupted"]
LOCAL_POLL, REMOTE_POLL = 0.25, 2.0  # seconds between two looks for the wish to stop


@dataclass(frozen=True)
class Rows:
    """One Parquet file of the study directory and the checksum of its bytes."""

    path: str
    sha256: str


@dataclass(frozen=True)
class TrialRows:
    """Where a trial's rows lie."""

    cohort: Rows
    tests: Rows


@dataclass(frozen=True)
class Device:
    """A worker's share of a GPU; ``gpus`` 0 computes on the CPU."""

    gpus: float = 0
    memory_gb: float | None = None


@dataclass(frozen=True)
class Assignment:
    """One trial as a worker is told of it."""

    study: Study
    trial_id: str
    rows: TrialRows
    device: Device
    watched: bool = False  # a search may stop it early
    owner: str = ""  # the token of the driver's lock
    place: Storage | None = None  # its directory, where it is not simply the study's

    @property
    def directory(self) -> Storage:
        return self.place or self.study.trial(self.trial_id)


Work = Callable[[Assignment, ImageArray, Callable[[], bool]], Status]


def perform(work: Work, assignment: Assignment, images: ImageArray, should_stop: Callable[[], bool]) -> Status:
    """Run one trial; one that had failed is so no longer, but ``--only failed`` means it until it ends."""
    directory = assignment.directory
    if directory.exists(FAILED):
        directory.write_json(RETRIED, {"time": time.time()})
        directory.delete(FAILED)
    status = work(assignment, images, should_stop)
    if status != "interrupted":
        directory.delete(RETRIED)
    return status


def write_stop(study: Study, by: str) -> None:
    """Ask the running driver and its trials to end with checkpoints."""
    study.storage.write_json(STOP, {"by": by, "time": time.time()})


def clear_stop(study: Study) -> None:
    """Forget an earlier wish to stop."""
    study.storage.delete(STOP)


def stop_wished(study: Study) -> bool:
    return study.storage.exists(STOP)


def read_rows(study: Study, rows: Rows) -> pd.DataFrame:
    """Read a row file back.

    Raises
    ------
    StudyError : it is not what the driver wrote.
    """
    data = study.storage.read_bytes(rows.path)
    if hashlib.sha256(data).hexdigest() != rows.sha256:
        raise StudyError(
            "the cohort file does not match its checksum",
            where=study.storage.address(rows.path),
            remedy="run again: it is then written anew",
        )
    return cast(pd.DataFrame, pd.read_parquet(io.BytesIO(data)))


def stop_watch(
    study: Study,
    also: Callable[[], bool] = lambda: False,
    mark: tuple[Storage, str] | None = None,
    owner: str = "",
) -> Callable[[], bool]:
    """Return ``should_stop``: looks for the wish to stop now and then, and remembers it.

    Parameters
    ----------
    also : another reason, asked every time.
    mark : a file that is a wish, too.
    owner : the token of a driver's lock; the lock of another driver is a wish, too.
    """
    pause = LOCAL_POLL if study.storage.is_local else REMOTE_POLL
    seen, looked = False, -pause

    def should_stop() -> bool:
        nonlocal seen, looked
        if also():
            return True
        now = time.monotonic()
        if not seen and now - looked >= pause:
            looked = now
            try:
                seen = stop_wished(study) or (mark is not None and mark[0].exists(mark[1]))
                seen = seen or (bool(owner) and held_by_another(study.storage, owner))
            except StudyError:  # the storage is away: nobody can wish anything now
                return False
        return seen

    return should_stop


def rows_of(cohort: tuple[str, str], tests: tuple[str, str]) -> TrialRows:
    """Return row files from plain (path, checksum) pairs."""
    return TrialRows(Rows(*cohort), Rows(*tests))


def words(error: BaseException) -> str:
    """Return an error as one line for people."""
    cause: Any = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0][:500] if lines else ''}"
