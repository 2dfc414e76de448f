"""A cluster's dashboard: its address, token and Ray are checked before a study is sent there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException
from urllib3.exceptions import LocationParseError

from raystudy.errors import StudyError
from raystudy.orchestrate.access import (
    check_ray_version,
    is_own,
    missing_token,
    refuse_open,
    token,
    use_token,
    wrong_token,
)


@dataclass(frozen=True)
class Dashboard:
    """A cluster as its dashboard tells: its Ray, whether it asks for a token, whether all of it is this machine."""

    ray: str
    asks: bool
    here: bool


def check_dashboard(address: str) -> Dashboard:
    """Check a dashboard's address, token and version.

    Raises
    ------
    StudyError : no dashboard address, nobody answers, no or a wrong token, another Ray, or a cluster that asks
        nobody for a token and that others can reach: by this address, or because it has machines elsewhere and this is
        the end of a tunnel.
    """
    host = _host(address)
    url = f"{address.rstrip('/')}/api/version"
    answer = _get(url, address, {})
    asks = _refuses_us(answer)
    if asks:  # nobody else is told the token
        own = token()
        if own is None:
            raise missing_token(address)
        answer = _get(url, address, {"Authorization": f"Bearer {own}"})
        if _refuses_us(answer):
            raise wrong_token(address)
    try:
        version = str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise StudyError(
            f"this is no Ray dashboard (HTTP {answer.status_code})", where=address, remedy="http://HEAD:8265"
        ) from None
    check_ray_version(version, address)
    if asks:
        use_token(address)
    else:
        refuse_open(host, address)
    found = Dashboard(version, asks, _is_here(address))
    if not found.asks and not found.here:
        refuse_open(None, address)
    return found


def _refuses_us(answer: requests.Response) -> bool:
    """Whether a server wants a token (Ray says 401 without one) or another one (403)."""
    return answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden)


def _host(address: str) -> str:
    """Return the host of a dashboard's address."""
    try:
        parts = urlsplit(address)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.hostname
    except ValueError:  # brackets or a port that are none
        pass
    raise _no_address(address)


def _no_address(address: str) -> StudyError:
    return StudyError(
        f"{address!r} is no dashboard address", where="--address", remedy="for example http://10.0.0.5:8265"
    )


def _is_here(address: str) -> bool:
    """Whether every machine of a cluster is this one; its dashboard at loopback may be the end of a tunnel."""
    try:
        nodes: list[Any] = list_nodes(address=address, filters=[("state", "=", "ALIVE")])
    except (RayStateApiException, requests.RequestException, RuntimeError, ValueError) as error:
        raise StudyError(
            f"this dashboard does not tell its machines: {str(error).splitlines()[0][:200]}",
            where=address,
            remedy="http://HEAD:8265 of a running cluster",
        ) from None
    return all(is_own(node.node_ip) for node in nodes)


def _get(url: str, address: str, headers: dict[str, str]) -> requests.Response:
    try:
        return requests.get(url, headers=headers, timeout=10)
    except (requests.exceptions.InvalidURL, LocationParseError):  # the latter is no RequestException
        raise _no_address(address) from None
    except requests.RequestException as error:
        reason = str(error).splitlines()[0][:200]
        raise StudyError(
            f"nobody answers: {reason}",
            where=address,
            remedy="start the cluster (`ray up cluster.yaml`) and reach it by `ray dashboard cluster.yaml`",
        ) from None
