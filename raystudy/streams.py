"""Named counter-based random streams (DESIGN.md rule 4).

Every draw of a study comes from a Philox stream that is keyed by the study seed and a readable purpose, for example
``stream(study_seed, "order", task, h1_share, seed, epoch)``.  A stream does not depend on worker, order or history, so
ablation arms are paired and a resumed trial continues with the same numbers.  The global generators of NumPy and torch
are neither read nor moved.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np


def _digest(study_seed: int, key: tuple[str | int, ...]) -> bytes:
    text = json.dumps([int(study_seed), *(k if isinstance(k, str) else int(k) for k in key)], separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def stream(study_seed: int, *key: str | int) -> np.random.Generator:
    """Return the generator of one purpose.

    Parameters
    ----------
    study_seed : the experiment's ``study_seed``.
    key : the purpose and its coordinates; ``1`` and ``"1"`` are different keys.
    """
    digest = _digest(study_seed, key)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def stream_seed(study_seed: int, *key: str | int) -> int:
    """Return a 63-bit seed of the same family, for ``torch.Generator().manual_seed``."""
    return int.from_bytes(_digest(study_seed, key)[16:24], "little") >> 1
