"""Long explanation jobs in pieces: every piece is a file, so a killed job repeats at most one of them.

In: how many items there are and a function that computes a range of them to bytes.  Out: the pieces in order.  Pieces
are named by their range and belong to one identity (trial, settings); pieces of another identity are thrown away, and
a damaged one is computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from raystudy.storage import Storage
from raystudy.trial import TrialInterrupted

FOLDER, IDENTITY = "chunks", "job.json"


@dataclass(frozen=True)
class Watch:
    """What a job's caller wants to hear and say: ``progress(done, total)`` and ``should_stop()``, between items."""

    progress: Callable[[int, int], None]
    should_stop: Callable[[], bool]

    def check(self) -> None:
        """Raise TrialInterrupted when asked to stop; finished pieces stay."""
        if self.should_stop():
            raise TrialInterrupted("the explanation was asked to stop; finished pieces are kept")


class Pieces:
    """The pieces of one job below its directory."""

    def __init__(self, directory: Storage, identity: Mapping[str, object], total: int, watch: Watch) -> None:
        self._directory, self._watch, self._total, self._done = directory, watch, total, 0
        try:
            known = directory.read_json(IDENTITY)
        except (FileNotFoundError, ValueError):
            known = None
        if known != identity:
            directory.delete_tree(FOLDER)
            directory.write_json(IDENTITY, dict(identity))
        self._files = set(directory.list(FOLDER))

    def run(self, name: str, count: int, size: int, compute: Callable[[range], bytes]) -> list[bytes]:
        """Return the pieces of ``count`` items, ``size`` items each; only the missing ones are computed."""
        pieces: list[bytes] = []
        for start in range(0, count, size):
            part = range(start, min(start + size, count))
            path = f"{FOLDER}/{name}-{part.start:06d}-{part.stop:06d}"
            data = _opened(self._directory.read_bytes(path)) if path in self._files else None
            if data is None:
                self._watch.check()
                data = compute(part)
                self._directory.write_bytes(path, hashlib.sha256(data).digest() + data)
            pieces.append(data)
            self._done += len(part)
            self._watch.progress(self._done, self._total)
        return pieces

    def item(self) -> None:
        """Say that a piece goes on to its next item: the place to stop."""
        self._watch.check()

    def clear(self) -> None:
        """Delete the pieces, once what was made of them is written."""
        self._directory.delete_tree(FOLDER)


def _opened(piece: bytes) -> bytes | None:
    """Return what a piece holds behind its checksum, or None when it is damaged."""
    data = piece[32:]
    return data if hashlib.sha256(data).digest() == piece[:32] else None


@contextmanager
def exact_numerics(threads: int, device: torch.device) -> Generator[None]:
    """Compute in float32 without graph, autocast or TF32, on so many CPU threads; all restored on the way out."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_num_threads(before)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution
