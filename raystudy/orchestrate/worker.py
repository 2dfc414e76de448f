"""What one worker process does: one trial, or one explanation job, by names alone.

Spec and rows come from the study directory, the pixels from the array that the driver shared; the wish to stop is a
file there too.  The plain loop calls the same functions as the Ray tasks, so both give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from raystudy.errors import StudyError
from raystudy.explanation import explain_trial
from raystudy.explanation_jobs import Job, job_directory
from raystudy.explanation_settings import ExplainSettings
from raystudy.images.array import ImageArray
from raystudy.orchestrate.assignment import FAILED, Assignment, Device, Status, read_rows
from raystudy.orchestrate.truth import planted_truth
from raystudy.trial import TrialInterrupted, run_trial
from raystudy.trial_files import read_spec
from raystudy.trial_spec import TrialSpec


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
    """Do one explanation job of a finished trial, or the rest of it; it counts as failed until it is done."""
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
    directory.delete(f"{job_directory(job, settings)}/{FAILED}")
    return "finished"


def read_inputs(assignment: Assignment) -> tuple[TrialSpec, pd.DataFrame, pd.DataFrame]:
    """Return spec, cohort and tests of a trial from the study directory."""
    study, rows = assignment.study, assignment.rows
    return read_spec(assignment.directory), read_rows(study, rows.cohort), read_rows(study, rows.tests)


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
