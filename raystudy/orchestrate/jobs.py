"""Studies as Ray jobs: submitted with nothing but the code and the resolved experiment, and stopped by a wish.

The job is `raystudy run` on the head; it survives the client's end.  Stopping writes the wish into the study directory,
where the driver and every trial look: each writes a checkpoint and ends.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from aiohttp import ClientError
from ray.job_submission import JobStatus, JobSubmissionClient

import raystudy
from raystudy.config import Experiment
from raystudy.errors import NewerStudyError, StudyError
from raystudy.lock import REPAIR, gone_from_here, lock_holder
from raystudy.orchestrate.access import check_ray_version, installed_ray
from raystudy.orchestrate.assignment import write_stop
from raystudy.orchestrate.dashboard import check_dashboard
from raystudy.orchestrate.local_paths import refuse_local_paths
from raystudy.orchestrate.session import NO_SECRETS
from raystudy.study import Study

INTERRUPTED = 130  # the exit code after Ctrl-C
LARGEST_PACKAGE = 2_000_000  # bytes of code and experiment; Ray sends them zipped, a third of it


def submit(
    experiment: Experiment, address: str, *, follow: bool = True, only_failed: bool = False, take_over: bool = False
) -> int:
    """Submit a study to a cluster and follow its log; return the exit code of `raystudy run` there, or 130 on Ctrl-C.

    Raises
    ------
    StudyError : address, token or version; local paths that a remote cluster would not see; a study of a newer
        raystudy; a connection that was lost while the log was followed.
    """
    check_ray_version(installed_ray(), "this machine")
    here = check_dashboard(address).here
    if not here:
        refuse_local_paths(experiment, address)
        _say_where_runs_go(experiment)
    _refuse_newer(experiment)
    with tempfile.TemporaryDirectory() as scratch:
        package = _package(experiment, Path(scratch))
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=_entrypoint(here, only_failed=only_failed, take_over=take_over),
            submission_id=f"raystudy-{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}",
            runtime_env={
                "working_dir": str(package / "work"),
                "py_modules": [str(package / "raystudy")],
                "env_vars": {name: os.environ[name] for name in NO_SECRETS if name in os.environ},
            },
            metadata={"study": experiment.name},
            entrypoint_num_cpus=0,
        )
    verbs = "  status: raystudy status EXPERIMENT      stop: raystudy stop EXPERIMENT"
    hints = f"{verbs}\n  log: ray job logs {job} --follow --address {address}"
    print(f"submitted {job}; it goes on when this terminal ends\n{hints}")
    if not follow:
        return 0
    try:
        asyncio.run(_follow(client, job))
        details = client.get_job_info(job)
    except KeyboardInterrupt:
        print(f"no longer followed; {job} goes on and holds the study\n{hints}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise  # nobody reads the log here any more, as in `raystudy submit … | head`
    except (RuntimeError, ClientError, OSError) as error:  # of Ray's client, of the socket below it, of requests
        raise _lost(address, job, _first_line(error), hints) from None
    if not details.status.is_terminal():
        raise _lost(address, job, "its log ended before the job", hints)
    print(f"{job}: {details.status.value}")
    return 0 if details.status == JobStatus.SUCCEEDED else details.driver_exit_code or 1


def _lost(address: str, job: str, reason: str, hints: str) -> StudyError:
    return StudyError(
        f"the connection is lost ({reason}); {job} goes on and holds the study, unless its head is down",
        where=address,
        remedy=f"look when the cluster answers again\n{hints}",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _entrypoint(here: bool, *, only_failed: bool, take_over: bool) -> str:
    """Return the job's command; on this machine relative paths mean what they mean in this folder."""
    options = (" --only failed" if only_failed else "") + (" --take-over" if take_over else "")
    if not here:
        return f"python -m raystudy.cli run experiment.yaml{options}"
    return f'cd {shlex.quote(os.getcwd())} && python -m raystudy.cli run "$OLDPWD/experiment.yaml"{options}'


def _refuse_newer(experiment: Experiment) -> None:
    """Refuse a study of a newer raystudy; storage that only the cluster reaches is the job's to judge."""
    try:
        Study.at(experiment.storage, experiment.name).refuse_newer()
    except NewerStudyError:
        raise
    except StudyError as error:
        print(f"note: the study is not seen from here: {error.what}")


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


def _say_where_runs_go(experiment: Experiment) -> None:
    if urlsplit(experiment.tracking.uri).scheme.startswith("sqlite") and experiment.tracking.enabled:
        print("note: tracking.uri is a sqlite file; it will lie on the cluster's head, in the job's folder")
        print("  the MLflow server of cluster.yaml: --set tracking.uri=http://127.0.0.1:5000")


def stop(experiment: Experiment) -> None:
    """Ask a running study to stop; say so when nobody runs it."""
    study = Study.at(experiment.storage, experiment.name)
    study.refuse_newer()
    holder = lock_holder(study.storage)
    if holder is None:  # else a driver may still find out which films it can plan with
        study.require()
    # Of an owner elsewhere no clock of this machine can tell.
    if holder is None or holder.get("work") == REPAIR or gone_from_here(holder):
        raise StudyError("nobody runs this study", where=study.storage.uri, remedy="nothing to stop")
    write_stop(study, by=f"{os.environ.get('USER', 'user')}@{os.uname().nodename}")
    if study.driver() is None:
        print(f"its driver, {holder.get('owner', 'unknown')}, has not been heard of for a while by this clock")
    print("asked the study to stop; its trials write checkpoints and end. Go on with `raystudy run`.")
