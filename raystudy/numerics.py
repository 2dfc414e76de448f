"""The numerical surroundings of a computation, set for its duration and put back afterwards (DESIGN.md rules 4, 5)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def numerics(threads: int, device: torch.device, *, deterministic: bool = False) -> Iterator[None]:
    """Compute with so many CPU threads, in true float32, with algorithms that no timing chooses.

    Parameters
    ----------
    threads : of this process; part of the spec, because sums over threads round differently.
    device : on a GPU TF32 and the measuring choice of convolutions are switched off as well.
    deterministic : on a GPU also refuse algorithms whose bits differ between two runs.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    try:
        with _gpu_flags(deterministic) if device.type == "cuda" else nullcontext():
            torch.use_deterministic_algorithms(deterministic and device.type == "cuda")
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


@contextmanager
def _gpu_flags(deterministic: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=deterministic, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = tf32
