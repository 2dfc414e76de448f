"""Studies as Ray jobs: submitted with nothing but the code and the resolved experiment, and stopped by a wish.

The job is `raystudy run` on the head; it survives the client's end.  Stopping writes the wish into the study directory,
where the driver and every trial look: each writes a checkpoint and ends.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

import raystudy
from raystudy.config import Experiment
from raystudy.errors import StudyError
from raystudy.orchestrate.access import check_ray_version, installed_ray
from raystudy.orchestrate.assignment import write_stop
from raystudy.orchestrate.dashboard import check_dashboard, cluster_is_here
from raystudy.orchestrate.lock import gone_from_here, lock_holder
from raystudy.orchestrate.session import NO_SECRETS
from raystudy.study import Study

LARGEST_PACKAGE = 1_000_000  # bytes of code and experiment that a submission may send


def submit(experiment: Experiment, address: str, *, follow: bool = True) -> int:
    """Submit a study to a cluster and follow its log; return the exit code.

    Raises
    ------
    StudyError : address, token or version; local paths that a remote cluster would not see.
    """
    check_ray_version(installed_ray(), "this machine")
    check_dashboard(address)
    here = cluster_is_here(address)
    if not here:
        _refuse_local_paths(experiment, address)
    with tempfile.TemporaryDirectory() as scratch:
        package = _package(experiment, Path(scratch))
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=_entrypoint(here),
            submission_id=f"raystudy-{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}",
            runtime_env={
                "working_dir": str(package / "work"),
                "py_modules": [str(package / "raystudy")],
                "env_vars": {name: os.environ[name] for name in NO_SECRETS if name in os.environ},
            },
            metadata={"study": experiment.name},
            entrypoint_num_cpus=0,
        )
    print(f"submitted {job}; it goes on when this terminal ends")
    print("  status: raystudy status EXPERIMENT      stop: raystudy stop EXPERIMENT")
    print(f"  log: ray job logs {job} --follow")
    if not follow:
        return 0
    asyncio.run(_follow(client, job))
    status = client.get_job_status(job)
    print(f"{job}: {status.value}")
    return 0 if status == JobStatus.SUCCEEDED else 1


def _entrypoint(here: bool) -> str:
    """Return the job's command; on this machine relative paths mean what they mean in this folder."""
    if not here:
        return "python -m raystudy.cli run experiment.yaml"
    return f'cd {shlex.quote(os.getcwd())} && python -m raystudy.cli run "$OLDPWD/experiment.yaml"'


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def _package(experiment: Experiment, scratch: Path) -> Path:
    """Lay out what a job needs: the package without caches, and the resolved experiment."""
    source = Path(raystudy.__file__).parent
    shutil.copytree(source, scratch / "raystudy", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (scratch / "work").mkdir()
    text = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (scratch / "work" / "experiment.yaml").write_text(text, encoding="utf-8")
    size = sum(f.stat().st_size for f in scratch.rglob("*") if f.is_file())
    if size > LARGEST_PACKAGE:
        raise StudyError(
            f"the package has {size:,} bytes, more than {LARGEST_PACKAGE:,}",
            where=str(source),
            remedy="install raystudy without other files in its folder",
        )
    return scratch


def _refuse_local_paths(experiment: Experiment, address: str) -> None:
    """Refuse paths that exist on this machine only."""
    tree = experiment.model_dump(mode="json")
    places: dict[str, Any] = {"storage": tree["storage"]}
    for name, source in tree["sources"].items():
        places |= {f"sources.{name}.{key}": source[key] for key in ("root",) if source.get(key)}
    if experiment.model.weights not in ("none", "imagenet"):
        places["model.weights"] = experiment.model.weights
    local = {key: value for key, value in places.items() if "://" not in str(value)}
    if local:
        key, value = next(iter(local.items()))
        raise StudyError(
            f"{key} is the local path {value!r}, which the cluster's machines do not see",
            where=address,
            remedy=f"put it on object storage and name it: --set {key}=s3://bucket/path",
        )
    if urlsplit(experiment.tracking.uri).scheme.startswith("sqlite") and experiment.tracking.enabled:
        print("note: tracking.uri is a sqlite file; it will lie on the cluster's head, in the job's folder")
        print("  the MLflow server of cluster.yaml: --set tracking.uri=http://127.0.0.1:5000")


def stop(experiment: Experiment) -> None:
    """Ask a running study to stop; say so when nobody runs it."""
    study = Study.at(experiment.storage, experiment.name).require()
    holder = lock_holder(study.storage)
    if holder is None or gone_from_here(holder):  # of an owner elsewhere no clock of this machine can tell
        raise StudyError("nobody runs this study", where=study.storage.uri, remedy="nothing to stop")
    write_stop(study, by=f"{os.environ.get('USER', 'user')}@{os.uname().nodename}")
    if study.driver() is None:
        print(f"its driver, {holder.get('owner', 'unknown')}, has not been heard of for a while by this clock")
    print("asked the study to stop; its trials write checkpoints and end. Go on with `raystudy run`.")
