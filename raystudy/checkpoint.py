"""A trial's checkpoints: tensors as safetensors, counters as JSON, never half-visible (DESIGN.md rule 3).

A checkpoint is one object of tensors whose name holds its checksum, and after it one small pointer that names it::

    checkpoint/state-000012-3fa9c1….safetensors
    checkpoint/000012.json        {"sha256": of the rest, "checkpoint": {object, bytes, sha256, fingerprint, state}}

The order of the two writes needs neither rename nor append, so a local folder and S3 behave alike.  The two newest are
kept: a damaged one is named and the one before it is used.  Reading a damaged checkpoint never raises; a store that
does not answer does.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from raystudy.storage import Storage

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What was kept: named tensors (on the CPU) and a JSON-ready state."""

    serial: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


@dataclass
class CheckpointClock:
    """Decides when the next checkpoint is due, by time alone.

    Writing may cost at most ``share`` of the time, and the pause is at least 20 times the last write.  Before the first
    write its duration is estimated from its size at 100 MB/s.  The clock is monotonic: setting the wall clock moves
    nothing.
    """

    share: float
    n_bytes: int
    shortest: float = 5.0  # seconds between two checkpoints of a small model
    _last_write: float = field(init=False)
    _last_end: float = field(init=False)

    def __post_init__(self) -> None:
        self._last_write = 0.01 + self.n_bytes / 100e6
        self._last_end = time.monotonic()

    @property
    def interval(self) -> float:
        """Seconds from the end of a write to the start of the next."""
        return max(self.shortest, 20 * self._last_write, self._last_write * (1 / self.share - 1))

    def due(self) -> bool:
        return time.monotonic() - self._last_end >= self.interval

    def wrote(self, seconds: float) -> None:
        self._last_write, self._last_end = seconds, time.monotonic()


class Checkpoints:
    """The checkpoints of one trial.

    Parameters
    ----------
    storage : the trial's ``checkpoint/`` directory.
    fingerprint : identifies spec and data; a checkpoint of another fingerprint is not read.
    """

    def __init__(self, storage: Storage, fingerprint: str) -> None:
        self._storage = storage
        self._fingerprint = fingerprint
        self._damaged: set[int] = set()

    def write(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> int:
        """Write the next checkpoint, then remove all but the newest two whole ones; return its size in bytes."""
        serial = max(self._serials(), default=0) + 1
        data = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"state-{serial:06d}-{sha256[:12]}.safetensors"
        body = {
            "object": name,
            "bytes": len(data),
            "sha256": sha256,
            "fingerprint": self._fingerprint,
            "state": state,
        }
        pointer = {"sha256": _digest(body), "checkpoint": body}
        self._storage.write_bytes(name, data)
        self._storage.write_bytes(_pointer(serial), json.dumps(pointer, allow_nan=False).encode())
        self._remove_all_before(serial)
        return len(data)

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest whole checkpoint, or None, and what was wrong with each newer one."""
        problems: list[str] = []
        for serial in sorted(self._serials(), reverse=True):
            try:
                return self._read(serial), problems
            except _DamagedError as damage:
                problems.append(f"{_pointer(serial)}: {damage}")
                self._damaged.add(serial)
        return None, problems

    def clear(self) -> None:
        """Remove everything, pointers first."""
        for name in sorted(self._storage.list()):  # digits sort before "state-"
            self._storage.delete(name)
        self._storage.delete_tree()

    def _serials(self) -> list[int]:
        stems = (name.removesuffix(".json") for name in self._storage.list() if name.endswith(".json"))
        return [int(stem) for stem in stems if stem.isdigit()]

    def _read(self, serial: int) -> Checkpoint:
        try:
            pointer = json.loads(self._storage.read_bytes(_pointer(serial)))
            body, digest = pointer["checkpoint"], pointer["sha256"]
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise _DamagedError("the pointer is torn or missing") from error
        if digest != _digest(body):
            raise _DamagedError("the pointer does not match its checksum")
        if body["fingerprint"] != self._fingerprint:
            raise _DamagedError("it belongs to another spec or other data")
        try:
            data = self._storage.read_bytes(body["object"])
        except FileNotFoundError as error:
            raise _DamagedError(f"{body['object']} is missing") from error
        if len(data) != body["bytes"] or hashlib.sha256(data).hexdigest() != body["sha256"]:
            raise _DamagedError(f"{body['object']} does not match its checksum")
        try:
            return Checkpoint(serial, safetensors.torch.load(data), body["state"])
        except SafetensorError as error:
            raise _DamagedError(f"{body['object']} is no safetensors file") from error

    def _remove_all_before(self, serial: int) -> None:
        keep = set(sorted(set(self._serials()) - self._damaged)[-KEPT:]) | {serial}
        prefixes = tuple(stem for s in keep for stem in (_pointer(s), f"state-{s:06d}-"))
        for name in sorted(self._storage.list()):
            if not name.startswith(prefixes):
                self._storage.delete(name)


class _DamagedError(Exception):
    """One checkpoint cannot be used; the message says why."""


def _pointer(serial: int) -> str:
    return f"{serial:06d}.json"


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
