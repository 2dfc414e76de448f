"""`raystudy doctor`: one line a check, each with what is wrong and the remedy."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from urllib.parse import urlsplit

import torch
from rich.console import Console
from rich.markup import escape

from raystudy.config import Experiment
from raystudy.errors import StudyError
from raystudy.orchestrate.access import check_ray_version, installed_ray, is_loopback
from raystudy.orchestrate.dashboard import check_dashboard
from raystudy.orchestrate.session import check_address, head_of
from raystudy.storage import open_storage
from raystudy.study import Study

OLDEST_PYTHON = (3, 11)
PATIENCE_SECONDS = 5.0  # with a storage that is away


def examine(experiment: Experiment | None, address: str | None) -> int:
    """Run every check, print all findings; return 0, or 2 when something is wrong.

    Parameters
    ----------
    address : a dashboard's address, or as for ``head_of``; by default RAY_ADDRESS, as for every verb.
    """
    cluster = address or os.environ.get("RAY_ADDRESS")
    checks: list[tuple[str, Callable[[], str]]] = [("Python", _python), ("torch", _torch), ("Ray", _ray)]
    if experiment is not None:
        checks += [
            ("storage", lambda: _storage(experiment)),
            ("study directory", lambda: _study(experiment)),
            ("MLflow", lambda: _mlflow(experiment, cluster)),
        ]
    else:
        checks.append(("MLflow", _mlflow_library))
    if cluster:
        checks.append(("cluster", lambda: _cluster(cluster)))
    console, wrong = Console(highlight=False), 0
    for name, check in checks:
        try:
            console.print(f"[green]ok[/green]    {name}: {escape(check())}", markup=True, soft_wrap=True)
        except StudyError as error:
            wrong += 1
            console.print(f"[red]wrong[/red] {name}: ", end="", markup=True)
            console.print(str(error), markup=False, soft_wrap=True)
    return 2 if wrong else 0


def _python() -> str:
    if sys.version_info < OLDEST_PYTHON:
        raise StudyError(f"Python {platform.python_version()} is too old", remedy="use Python 3.11 or newer")
    return platform.python_version()


def _torch() -> str:
    from raystudy.torchvision_shim import torchvision

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return f"{torch.__version__} with torchvision {torchvision.__version__}, {device}"


def _ray() -> str:
    check_ray_version(installed_ray(), "this machine")
    return installed_ray()


def _storage(experiment: Experiment) -> str:
    storage = open_storage(experiment.storage, retry_seconds=PATIENCE_SECONDS)
    storage.check_writable()
    return f"{storage.uri} can be written and read"


def _study(experiment: Experiment) -> str:
    storage = open_storage(experiment.storage, retry_seconds=PATIENCE_SECONDS)
    study = Study(storage.child(experiment.name))
    try:
        study.plan()
    except FileNotFoundError:
        return "none yet"
    counts = study.status().counts
    return ", ".join(f"{n} {state}" for state, n in counts.items() if n) or "no trials"


def _mlflow(experiment: Experiment, cluster: str | None) -> str:
    if not experiment.tracking.enabled:
        return "switched off"
    from raystudy.tracking_server import check_server

    uri = experiment.tracking.uri
    submitted = (cluster or "").startswith(("http://", "https://"))  # the driver runs on the head then, else here
    of_the_head = submitted and is_loopback(urlsplit(uri).hostname)
    check_server(uri, must_answer=not of_the_head)
    return f"{uri} on the cluster's head" if of_the_head else uri


def _mlflow_library() -> str:
    from raystudy.tracking_server import check_library

    return check_library()


def _cluster(address: str) -> str:
    if "://" in address:
        found = check_dashboard(address)
        asks = "token accepted" if found.asks else "asks for no token; all of it is this machine"
        return f"Ray {found.ray} at {address}, {asks}"
    head = head_of(address)
    if head is None:
        return "none is asked for: `raystudy run` starts Ray on this machine"
    asks = check_address(head)
    words = {None: "", True: ", token accepted", False: ", asks for no token; only this machine reaches it"}
    return f"Ray at {head}{words[asks]}"
