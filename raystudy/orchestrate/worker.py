"""What one worker process does: one trial, or one explanation job, by names alone.

Spec and rows come from the study directory, the pixels from the array that the driver shared; the wish to stop is a
file there too.  The plain loop calls the same functions as the Ray tasks, so both give the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from raystudy.errors import StudyError
from raystudy.explanation import Job, explain_trial
from raystudy.explanation_settings import ExplainSettings
from raystudy.images.array import ImageArray
from raystudy.orchestrate.ledger import Rows, TrialRows, read_rows, stop_wished
from raystudy.orchestrate.truth import planted_truth
from raystudy.storage import Storage
from raystudy.study import Study
from raystudy.trial import TrialInterrupted, run_trial
from raystudy.trial_files import read_spec
from raystudy.trial_spec import TrialSpec

Status = Literal["finished", "diverged", "interrupted"]
LOCAL_POLL, REMOTE_POLL = 0.25, 2.0  # seconds between two looks for the wish to stop


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

    @property
    def directory(self) -> Storage:
        return self.study.trial(self.trial_id)


Work = Callable[[Assignment, ImageArray, Callable[[], bool]], Status]


def train(assignment: Assignment, images: ImageArray, should_stop: Callable[[], bool]) -> Status:
    """Run one trial, or go on with it.

    Raises
    ------
    StudyError, ValueError : of ``run_trial``; and a GPU that was promised and is not there.
    """
    spec, cohort, tests = read_inputs(assignment)
    storage = assignment.directory
    device = claim_device(assignment.device)
    try:
        result = run_trial(spec, cohort, tests, images, storage, device=device, should_stop=should_stop)
    except TrialInterrupted:
        return "interrupted"
    finally:
        release_device(device)
    return "diverged" if result["status"] == "diverged" else "finished"


def explain(
    job: Job,
    assignment: Assignment,
    images: ImageArray,
    settings: ExplainSettings,
    should_stop: Callable[[], bool],
) -> Status:
    """Do one explanation job of a finished trial, or the rest of it."""
    spec, cohort, tests = read_inputs(assignment)
    device = claim_device(assignment.device)
    truth = planted_truth(assignment.study, spec.image_size)
    directory = assignment.directory
    try:
        explain_trial(
            job, spec, cohort, tests, images, directory, settings, device=device, should_stop=should_stop, masks=truth
        )
    except TrialInterrupted:
        return "interrupted"
    finally:
        release_device(device)
    return "finished"


def read_inputs(assignment: Assignment) -> tuple[TrialSpec, pd.DataFrame, pd.DataFrame]:
    """Return spec, cohort and tests of a trial from the study directory."""
    study, rows = assignment.study, assignment.rows
    return read_spec(assignment.directory), read_rows(study, rows.cohort), read_rows(study, rows.tests)


def stop_watch(
    study: Study, also: Callable[[], bool] = lambda: False, mark: tuple[Storage, str] | None = None
) -> Callable[[], bool]:
    """Return ``should_stop``: looks for the wish to stop now and then, and remembers it.

    Parameters
    ----------
    also : another reason, asked every time.
    mark : a file that is a wish, too.
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
            except StudyError:  # the storage is away: nobody can wish anything now
                return False
        return seen

    return should_stop


def claim_device(device: Device) -> str:
    """Return the torch device, with the process held to its share of the GPU's memory."""
    if not device.gpus:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise StudyError(
            f"resources.gpus is {device.gpus:g}, but this worker sees no CUDA device",
            remedy="install a CUDA build of torch on the workers, or set resources.gpus to 0",
        )
    total = torch.cuda.get_device_properties(0).total_memory
    share = device.memory_gb * 2**30 / total if device.memory_gb else device.gpus
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), 0)
    return "cuda"


def release_device(device: str) -> None:
    """Give cached GPU memory back to the others on the card."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def rows_of(cohort: tuple[str, str], tests: tuple[str, str]) -> TrialRows:
    """Return row files from plain (path, checksum) pairs."""
    return TrialRows(Rows(*cohort), Rows(*tests))


def words(error: BaseException) -> str:
    """Return an error as one line for people."""
    cause: Any = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0][:500] if lines else ''}"
