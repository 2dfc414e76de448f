"""One driver per study, or one repair of its mirror: ``lock.json`` names its owner and carries a heartbeat.

A lock whose owner died on this host is taken over (known by pid and start time); one from elsewhere only when the user
says ``--take-over`` and its heartbeat stands still.  Heartbeats are compared for change, never with this host's clock.
Of several drivers that take over the same dead lock exactly one wins: each must first create, exclusively, a claim that
names the dead lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raystudy.errors import StudyError
from raystudy.storage import Storage

LOCK = "lock.json"
DRIVER, REPAIR = "driver", "repair"  # what a study is held for
HELD = {DRIVER: "another driver works on this study", REPAIR: "the MLflow mirror of this study is being repaired"}
BEAT_SECONDS = 10.0


class StudyLock:
    """The lock of one study directory.

    Parameters
    ----------
    storage : the study directory.
    take_over : the user says that a driver elsewhere is dead.
    beat_seconds : pause between two heartbeats.
    work : what it is held for, `DRIVER` or `REPAIR`.
    """

    def __init__(
        self, storage: Storage, *, take_over: bool = False, beat_seconds: float = BEAT_SECONDS, work: str = DRIVER
    ) -> None:
        self._storage = storage
        self._take_over = take_over
        self._beat_seconds = beat_seconds
        self._record = {**_identity(), "work": work}
        self._ended = threading.Event()
        self.lost_event = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def token(self) -> str:
        """What tells this lock from that of any other driver."""
        return str(self._record["token"])

    @property
    def lost(self) -> bool:
        """Another driver took the study over: this one must end."""
        return self.lost_event.is_set()

    def look(self) -> None:
        """See now whether the lock is lost, without waiting for the next heartbeat."""
        if not self._owned():
            self.lost_event.set()

    def acquire(self) -> None:
        """Take the lock, or refuse and name its owner.

        Raises
        ------
        StudyError : another driver works on the study.
        """
        while not self._storage.create_exclusive(LOCK, self._bytes()):
            holder = lock_holder(self._storage)
            if holder is None:
                continue  # released in between
            self._refuse_living(holder)
            self._claim(holder)
            break
        self._thread = threading.Thread(target=self._beat, name="raystudy-heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """End the heartbeat and give the lock up, if it is still this driver's."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._owned():
            self._storage.delete(LOCK)

    def _claim(self, dead: dict[str, Any]) -> None:
        """Replace a dead driver's lock; the claims of drivers that died while they did so are dead locks too."""
        token = str(dead.get("token", "damaged"))
        claims = [f"lock-{token}.json"]
        while not self._storage.create_exclusive(claims[-1], self._bytes()):
            rival = lock_holder(self._storage, claims[-1])
            if rival is None:
                continue  # given up in between
            self._refuse_living(rival, claims[-1])
            name = f"lock-{rival['token']}" if "token" in rival else f"{claims[-1].removesuffix('.json')}-damaged"
            claims.append(f"{name}.json")
        try:
            now = lock_holder(self._storage)
            if now is not None and str(now.get("token", "damaged")) != token:
                self._refuse(now)
            self._storage.write_bytes(LOCK, self._bytes())
        finally:
            for claim in claims:
                self._storage.delete(claim)

    def _refuse_living(self, holder: dict[str, Any], name: str = LOCK) -> None:
        gone = gone_from_here(holder)
        if gone is None:
            if not self._take_over:
                self._refuse(holder, "; if it is dead: the same command with --take-over")
            gone = self._stands_still(holder, name)
        if not gone:
            self._refuse(holder)

    def _stands_still(self, holder: dict[str, Any], name: str) -> bool:
        time.sleep(3 * self._beat_seconds)
        now = lock_holder(self._storage, name)
        return now is None or now.get("heartbeat") == holder.get("heartbeat")

    def _refuse(self, holder: dict[str, Any], more: str = "") -> None:
        work = holder.get("work", DRIVER)
        raise StudyError(
            f"{HELD.get(work, HELD[DRIVER])}: {holder.get('owner', 'unknown')}",
            where=self._storage.uri,
            remedy=f"wait for it{', or end it with `raystudy stop EXPERIMENT`' if work == DRIVER else ''}{more}",
        )

    def _owned(self) -> bool:
        return (lock_holder(self._storage) or {}).get("token") == self.token

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            try:
                self.look()
                if self.lost:
                    return
                self._storage.write_bytes(LOCK, self._bytes())
            except StudyError:
                continue  # the storage is away; the next beat tries again

    def _bytes(self) -> bytes:
        return json.dumps({**self._record, "heartbeat": time.time()}).encode()


def lock_holder(storage: Storage, name: str = LOCK) -> dict[str, Any] | None:
    """Return the record of a lock or claim, or None where there is none; a damaged one has no owner."""
    try:
        return dict(storage.read_json(name))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return {"owner": f"a damaged {name}"}


def held_by_another(storage: Storage, token: str) -> bool:
    """Whether another driver than the one with this token holds the study; a lock that is gone is nobody's."""
    holder = lock_holder(storage) or {}
    return holder.get("token", token) != token


@contextlib.contextmanager
def locked(
    storage: Storage, *, take_over: bool = False, beat_seconds: float = BEAT_SECONDS, work: str = DRIVER
) -> Iterator[StudyLock]:
    """Hold the study's lock for the length of a block."""
    lock = StudyLock(storage, take_over=take_over, beat_seconds=beat_seconds, work=work)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def _identity() -> dict[str, Any]:
    host, pid = socket.gethostname(), os.getpid()
    return {
        "owner": f"process {pid} on {host}",
        "host": host,
        "pid": pid,
        "started": _start_time(pid),
        "token": os.urandom(8).hex(),
        **_machine(),
    }


def _machine() -> dict[str, str]:
    """What makes two pids comparable: the same boot of the same machine, in the same pid namespace."""
    return {
        "machine": _read(lambda: Path("/etc/machine-id").read_text().strip()),
        "boot": _read(lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip()),
        "pid_namespace": _read(lambda: os.readlink("/proc/self/ns/pid")),
    }


def _read(read: Callable[[], str]) -> str:
    try:
        return read()
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; empty once it has ended, None if /proc shows none."""
    fields = _read(lambda: Path(f"/proc/{pid}/stat").read_text(errors="replace")).rpartition(")")[2].split()
    if len(fields) <= 19:
        return None
    return fields[19] if fields[0] not in ("Z", "X") else ""


def _exists(pid: int) -> bool:
    """Whether there is such a process, also one of another user that /proc does not show (hidepid)."""
    try:
        if pid > 0:
            os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid > 0


def gone_from_here(holder: dict[str, Any]) -> bool | None:
    """Whether a lock's owner is dead, as far as this host can tell: None for one elsewhere, or that /proc hides."""
    here = _machine()
    if holder.get("host") != socket.gethostname() or not here["boot"]:
        return None
    if holder.get("boot") != here["boot"]:
        return True if here["machine"] and holder.get("machine") == here["machine"] else None  # it was rebooted
    if holder.get("pid_namespace") != here["pid_namespace"]:
        return None
    if not isinstance(pid := holder.get("pid"), int):
        return None
    started = _start_time(pid)
    if started is None and _exists(pid):
        return None
    return not started or started != holder.get("started")
