"""Which explanation jobs there are, which settings each depends on, where its files are and whether it is done.

In: settings and a trial's directory.  Out: names and answers; whoever only asks loads no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

from raystudy.errors import DamagedFileError
from raystudy.explanation_settings import ExplainSettings
from raystudy.results import DONE, damaged_files
from raystudy.storage import Storage

Job = Literal["faithfulness", "prototypes"]

JOBS: tuple[Job, ...] = ("prototypes", "faithfulness")
_COMMON = ("rule", "l2_power", "l2_eps", "precision")
_OF_JOB: dict[str, tuple[str, ...]] = {
    "faithfulness": (*_COMMON, "adai_images", "adai_draws", "mask_share", "ranking", "noise", "upsampling"),
    "prototypes": (*_COMMON, "prp_scale", "top_k", "superposition"),
}


def job_settings(job: Job, settings: ExplainSettings) -> dict[str, Any]:
    """Return the settings that a job's files depend on."""
    if job not in _OF_JOB:
        raise ValueError(f"job must be one of {', '.join(JOBS)}, not {job!r}")
    values = dataclasses.asdict(settings)
    return {name: values[name] for name in _OF_JOB[job]}


def job_directory(job: Job, settings: ExplainSettings) -> str:
    """Return the job's directory below the trial's: ``explain/<job>-<8 hex of its settings>``."""
    default = dataclasses.asdict(ExplainSettings())
    told = {k: v for k, v in job_settings(job, settings).items() if v != default[k]}  # a new key keeps old directories
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return f"explain/{job}-{digest[:8]}"


def explained(job: Job, storage: Storage, settings: ExplainSettings) -> bool:
    """Whether a job of a trial's directory is done and its files are what was written."""
    place = storage.child(*job_directory(job, settings).split("/"))
    try:
        return place.exists(DONE) and not damaged_files(place, DONE)
    except DamagedFileError:
        return False
