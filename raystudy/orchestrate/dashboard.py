"""The cluster's dashboard address and its token: checked before anything is sent there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import ray
import requests

from raystudy.errors import StudyError
from raystudy.orchestrate.session import has_token

OLDEST_RAY, FIRST_UNKNOWN_RAY = (2, 60), (2, 61)  # the cluster and this machine must speak the same Ray
TOKEN_REMEDY = "on the head run `ray get-auth-token`, and put it into RAY_AUTH_TOKEN or ~/.ray/auth_token here"


def token() -> str | None:
    """Return the token that Ray would use here, or None."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None


def is_loopback(host: str | None) -> bool:
    return (host or "") in ("localhost", "::1") or (host or "").startswith("127.")


def check_ray_version(version: str, where: str) -> None:
    """Refuse a Ray that is not the pinned one."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if not OLDEST_RAY <= numbers < FIRST_UNKNOWN_RAY:
        raise StudyError(
            f"Ray {version} does not fit: raystudy needs {OLDEST_RAY[0]}.{OLDEST_RAY[1]}",
            where=where,
            remedy=f"install ray=={OLDEST_RAY[0]}.{OLDEST_RAY[1]}.* on every node (constraints.txt)",
        )


def check_dashboard(address: str) -> str:
    """Check a dashboard's address, token and version; return the Ray version that runs there.

    Raises
    ------
    StudyError : no dashboard address, nobody answers, no or a wrong token, another Ray, or a cluster that asks
        nobody for a token on an address that others can reach.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StudyError(
            f"{address!r} is no dashboard address", where="--address", remedy="for example http://10.0.0.5:8265"
        )
    url = f"{address.rstrip('/')}/api/version"
    bare = _get(url, address, {})
    if bare.status_code == requests.codes.ok:
        if not is_loopback(parts.hostname):
            raise StudyError(
                "this cluster asks nobody for a token: anyone who reaches it can run code there",
                where=address,
                remedy="start every node with RAY_AUTH_MODE=token (see cluster.yaml), or reach it by `ray dashboard`",
            )
        answer = bare
    else:
        own = token()
        if own is None:
            raise StudyError("there is no token for this cluster here", where=address, remedy=TOKEN_REMEDY)
        answer = _get(url, address, {"Authorization": f"Bearer {own}"})
        if answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden):
            raise StudyError("the token is wrong", where=address, remedy=TOKEN_REMEDY)
    try:
        version = str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise StudyError(
            f"this is no Ray dashboard (HTTP {answer.status_code})", where=address, remedy="http://HEAD:8265"
        ) from None
    check_ray_version(version, address)
    if has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    return version


def _get(url: str, address: str, headers: dict[str, str]) -> requests.Response:
    try:
        return requests.get(url, headers=headers, timeout=10)
    except requests.RequestException as error:
        reason = str(error).splitlines()[0][:200]
        raise StudyError(
            f"nobody answers: {reason}",
            where=address,
            remedy="start the cluster (`ray up cluster.yaml`) and reach it by `ray dashboard cluster.yaml`",
        ) from None


def installed_ray() -> str:
    """Return the version of Ray here."""
    return str(ray.__version__)
