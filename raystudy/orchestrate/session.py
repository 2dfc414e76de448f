"""A connection to Ray for the length of a study: a local Ray, or a running cluster by its address.

A local Ray ends with its driver, also when that is killed.  Explanation tasks take slots of a small resource of their
own, ``explain``, so that trials that hold every CPU do not starve them (nor they the trials: the driver bounds how many
it keeps in flight).  Ray 2.60 authenticates by token: a local Ray makes its own; a cluster wants the cluster's token.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray._private import services

import raystudy
from raystudy.errors import StudyError
from raystudy.interruption import ctrl_c_kept
from raystudy.orchestrate.access import (
    TOKEN_REMEDY,
    check_head,
    check_ray_version,
    installed_ray,
    is_own,
    refuse_open_head,
    token,
    use_token,
)

EXPLAIN = "explain"  # the resource that explanation tasks take
REACH_SECONDS = 5.0
WORKERS_A_CPU = 6  # idle ones stay: a new process of an explanation would import torch again
NO_SECRETS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ALLOW_HTTP")


@dataclass(frozen=True)
class Session:
    """What the connected Ray offers.

    Parameters
    ----------
    local : started by this driver.
    explain_slots : explanation tasks that may run at a time; 0 where the cluster has no ``explain`` resource.
    """

    local: bool
    cpus: float
    gpus: float
    explain_slots: int
    dashboard: str | None


@contextmanager
def connect(
    address: str | None = None, *, cpus: int | None = None, gpus: int | None = None, dashboard: bool = True
) -> Iterator[Session]:
    """Start Ray here, or connect to a running cluster; a Ray that is already connected is used and left alone.

    Parameters
    ----------
    address : as for ``head_of``.
    cpus, gpus : logical resources of a local Ray; by default what this process may use.

    Raises
    ------
    StudyError : nobody answers at the address, the token is missing or wrong, another Ray than the pinned one, or one
        that others reach and that asks nobody for a token.
    """
    check_ray_version(installed_ray(), "this machine")
    if ray.is_initialized():
        yield _describe((address or os.environ.get("RAY_ADDRESS") or "local") == "local", None)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = head_of(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address is None:
        n_cpus = cpus or len(os.sched_getaffinity(0))
        options |= {"address": "local", "num_cpus": n_cpus, "num_gpus": gpus, "include_dashboard": dashboard}
        options |= {"resources": {EXPLAIN: float(max(1, n_cpus))}}
        options |= {"_system_config": {"num_workers_soft_limit": WORKERS_A_CPU * n_cpus}}
    else:
        check_address(address)
        options |= {"address": address, "runtime_env": _runtime_env()}
    try:
        with ctrl_c_kept(at_once=True):  # Ray forks as it starts, and what a hook of a fork raises is discarded
            page = _init(address, options)
        if not _uses_tls() and (address is not None or os.environ.get("RAY_AUTH_MODE") == "disabled"):
            refuse_open_head(ray.get_runtime_context().gcs_address)  # where it says it is
        with _sigterm_as_ctrl_c():
            yield _describe(address is None, page)
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C; Ray's own handler would abort the process in the middle of what it does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _init(address: str | None, options: dict[str, Any]) -> str | None:
    """Connect and return the dashboard's address."""
    where = f"Ray at {address}" if address else "Ray on this machine"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Ray's advance notice on accelerator variables
            return ray.init(**options).dashboard_url
    except ray.exceptions.AuthenticationError as error:
        raise StudyError(
            f"the token is missing or wrong: {_first_line(error)}",
            where=where,
            remedy=TOKEN_REMEDY,
        ) from error
    except (ConnectionError, TimeoutError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise StudyError(
            f"cannot connect: {_first_line(error)}" if address else f"Ray does not start: {_first_line(error)}",
            where=where,
            remedy=(
                "check the address (the head's HOST:6379), that the cluster runs, RAY_AUTH_MODE=token and the token"
                if address
                else "check memory and disk, and session_latest/logs in Ray's temporary folder (RAY_TMPDIR)"
            ),
        ) from error


def head_of(address: str | None) -> str | None:
    """Return the head's HOST:PORT that an address stands for; None where a Ray of our own is started.

    Parameters
    ----------
    address : a head's ``HOST:PORT``; ``auto`` finds a Ray that runs on this machine; ``local``, or None where
        RAY_ADDRESS names none (inside a Ray job it does), starts one.

    Raises
    ------
    StudyError : ``auto``, and no Ray runs here, or several do.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address != "auto":
        return None if address == "local" else address
    try:
        return services.canonicalize_bootstrap_address_or_die(address)
    except (ConnectionError, ValueError) as error:
        raise StudyError(
            f"no Ray is found on this machine: {_first_line(error)}",
            where="--address auto",
            remedy="start one (`ray start --head`), or name the head: --address HOST:6379",
        ) from None


def is_elsewhere(head: str) -> bool:
    """Whether a head is on another machine, which does not see this one's files.

    Raises
    ------
    StudyError : no address of a head.
    """
    return not is_own(_host_and_port(head)[0])


def check_address(address: str) -> bool | None:
    """Refuse a head that cannot or should not be used, before Ray tries for a long time.

    Token authentication is turned on where there is a token.

    Parameters
    ----------
    address : HOST:PORT of a head.

    Returns
    -------
    Whether the head asks for a token; None where only Ray can tell.

    Raises
    ------
    StudyError : no address, nobody answers, no or a wrong token, another Ray, or a cluster that asks nobody for a
        token on an address that others can reach.
    """
    host, port = _host_and_port(address)
    where = f"Ray at {address}"
    try:
        socket.create_connection((host, port), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise StudyError(
            f"nobody answers: {error.strerror or error}",
            where=where,
            remedy="start the cluster (`ray up cluster.yaml`), or mend --address (the head's HOST:6379)",
        ) from error
    if not _uses_tls():
        return check_head(address)
    if token() is not None:
        use_token(where)
    return None


def _host_and_port(address: str) -> tuple[str, int]:
    """Return the parts of a head's address."""
    if address.startswith(("http://", "https://")):
        raise StudyError(
            "this is a dashboard's address",
            where=address,
            remedy="`raystudy submit … --address http://HEAD:8265`, or `raystudy run … --address HEAD:6379`",
        )
    if "://" in address:
        raise StudyError(
            "Ray Client is not supported", where=address, remedy="--address HEAD:6379, or `raystudy submit`"
        )
    host, _, port = address.rpartition(":")
    if not _is_host(host) or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise StudyError(f"{address!r} is no address", where="--address", remedy="HOST:PORT, for example 10.0.0.5:6379")
    return host.strip("[]"), int(port)


def _is_host(host: str) -> bool:
    """Whether a host can be looked up: no part of its name is empty or longer than 63 characters."""
    try:
        return bool(host.encode("idna"))  # as Python's sockets do
    except UnicodeError:
        return False


def _uses_tls() -> bool:
    """Whether Ray encrypts: then it knows the certificates, which let nobody else in either."""
    return os.environ.get("RAY_USE_TLS", "0").lower() not in ("0", "false")


def _runtime_env() -> dict[str, Any]:
    """Ship this very raystudy to the workers, and where S3 is; credentials are the nodes' own business."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {}  # a submitted job brought its code along
    places = {name: os.environ[name] for name in NO_SECRETS if name in os.environ}
    return {"py_modules": [str(Path(raystudy.__file__).parent)], "env_vars": {**places, "RAY_USAGE_STATS_ENABLED": "0"}}


def _describe(local: bool, page: str | None) -> Session:
    have = ray.cluster_resources()
    dashboard = f"http://{page}" if page else None
    return Session(local, have.get("CPU", 0.0), have.get("GPU", 0.0), int(have.get(EXPLAIN, 0)), dashboard)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
