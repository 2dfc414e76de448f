"""Who may enter a Ray cluster: its token, ours, and whether both sides speak the same Ray.

A head is asked at its own port (gRPC, HOST:6379) before Ray connects, which would take long to fail and say little.  A
cluster that asks nobody for a token is refused wherever others could reach it: whoever connects can run code there.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

from raystudy.errors import StudyError

OLDEST_RAY, FIRST_UNKNOWN_RAY = (2, 60), (2, 61)  # the cluster and this machine must speak the same Ray
ANSWER_SECONDS = 10
TOKEN_REMEDY = "on the head run `ray get-auth-token`, and put it into RAY_AUTH_TOKEN or ~/.ray/auth_token here"


def token() -> str | None:
    """Return the token that Ray would use here: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

    Raises
    ------
    StudyError : it cannot be read, or no header could carry it; the token itself is not told.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if os.environ.get("RAY_AUTH_TOKEN"):
        where, found = "RAY_AUTH_TOKEN", os.environ["RAY_AUTH_TOKEN"].strip()
    else:
        where = str(path)
        try:
            if not path.is_file():
                return None
            found = path.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise StudyError(f"the token cannot be read: {error.strerror}", where=where, remedy=TOKEN_REMEDY) from error
    if not re.fullmatch(r"[!-~]+", found):
        rule = "one line of ASCII letters, digits and signs, without blanks"
        raise StudyError(f"the token is malformed: it must be {rule}", where=where, remedy=TOKEN_REMEDY)
    return found


def use_token(where: str) -> None:
    """Let Ray send our token to a cluster that asks for one."""
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        raise StudyError(
            f"RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']} here, and this cluster asks for a token",
            where=where,
            remedy="unset RAY_AUTH_MODE",
        )
    Config.initialize("")  # Ray read its environment when it was imported


def is_loopback(host: str | None) -> bool:
    """Whether a host name or address is this machine's alone."""
    host = (host or "").strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_own(host: str) -> bool:
    """Whether a host name or address is one of this machine's, loopback or not."""
    host = host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def installed_ray() -> str:
    """Return the version of Ray here."""
    return str(ray.__version__)


def check_ray_version(version: str, where: str) -> None:
    """Refuse a Ray that is not the pinned one."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if not OLDEST_RAY <= numbers < FIRST_UNKNOWN_RAY:
        raise StudyError(
            f"Ray {version} does not fit: raystudy needs {OLDEST_RAY[0]}.{OLDEST_RAY[1]}",
            where=where,
            remedy=f"install ray=={OLDEST_RAY[0]}.{OLDEST_RAY[1]}.* on every node (constraints.txt)",
        )


def missing_token(where: str) -> StudyError:
    return StudyError("there is no token for this cluster here", where=where, remedy=TOKEN_REMEDY)


def wrong_token(where: str) -> StudyError:
    return StudyError("the token is wrong", where=where, remedy=TOKEN_REMEDY)


def refuse_open(host: str | None, where: str) -> None:
    """Refuse a cluster that asks nobody for a token, unless only this machine reaches it."""
    if not is_loopback(host):
        raise StudyError(
            "this cluster asks nobody for a token: anyone who reaches it can run code there",
            where=where,
            remedy="start every node with RAY_AUTH_MODE=token (see cluster.yaml), or on loopback alone",
        )


def check_head(address: str) -> bool:
    """Ask a head for its Ray version, without our token and with it, which Ray sends from then on.

    Parameters
    ----------
    address : HOST:PORT of its GCS.

    Returns
    -------
    Whether it asks for a token.

    Raises
    ------
    StudyError : no Ray answers, no or a wrong token, another Ray, or a cluster without authentication that others can
        reach.
    """
    where = f"Ray at {address}"
    with grpc.insecure_channel(address) as channel:
        version = _version(channel, None, where)
        asks = version is None
        if version is not None:
            _refuse_reachable(channel, address)
        else:
            own = token()
            if own is None:
                raise missing_token(where)
            version = _version(channel, own, where)
            if version is None:
                raise wrong_token(where)
            use_token(where)
    check_ray_version(version, where)
    return asks


def refuse_open_head(address: str) -> None:
    """Refuse a head, HOST:PORT, that lets in everybody, unless only this machine reaches it."""
    with grpc.insecure_channel(address) as channel:
        if _version(channel, None, f"Ray at {address}") is not None:
            _refuse_reachable(channel, address)


def _refuse_reachable(channel: grpc.Channel, address: str) -> None:
    """Refuse an open head that others reach: at this address, or where its machines say they are."""
    asked: Any = gcs_service_pb2.GetAllNodeInfoRequest()  # pyright: ignore[reportAttributeAccessIssue]
    where = f"Ray at {address}"
    try:
        nodes: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetAllNodeInfo(asked, timeout=ANSWER_SECONDS)
    except grpc.RpcError as error:
        raise _no_head(where, f"it does not tell its machines: {error}") from None
    alive = gcs_pb2.GcsNodeInfo.ALIVE  # pyright: ignore[reportAttributeAccessIssue]
    machines = [node.node_manager_address for node in nodes.node_info_list if node.state == alive]
    for host in (address.rpartition(":")[0], *machines):
        refuse_open(host, where)


def _version(channel: grpc.Channel, own: str | None, where: str) -> str | None:
    """Return the Ray version that a head was started with; None when it does not let us in."""
    asked: Any = gcs_service_pb2.InternalKVGetRequest(  # pyright: ignore[reportAttributeAccessIssue]
        key=b"CLUSTER_METADATA", namespace=b"cluster"
    )
    metadata = (("authorization", f"Bearer {own}"),) if own else ()
    try:
        answer = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel).InternalKVGet(
            asked, timeout=ANSWER_SECONDS, metadata=metadata
        )
        return str(json.loads(answer.value)["ray_version"])
    except grpc.RpcError as error:
        code = getattr(error, "code", lambda: None)()
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return None
        raise _no_head(where, f"{code.name.lower() if code else error}") from None
    except (ValueError, KeyError, TypeError):
        raise _no_head(where, "it names no version") from None


def _no_head(where: str, reason: str) -> StudyError:
    return StudyError(
        f"this is no Ray head: {reason}", where=where, remedy="the head's HOST:6379 (`ray status` names it there)"
    )
