"""A trial is its spec: the readable id with a short hash (DESIGN.md rule 2).

Hashed are the training-relevant keys that differ from their defaults (so that a key added later with the old behaviour
as its default leaves old ids alone), this mixture's rows, the decode settings, and `NUMERICS_VERSION`.  Resources,
tracking, explanation and report settings are not hashed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pandas as pd

# Raise it when a change moves results: trials of older versions are then other trials.
NUMERICS_VERSION = 3

LONGEST_ID = 255  # in bytes; a folder's name has at most that
CUT_ID = 200  # in bytes; what is left of one that would be longer

NOT_IDENTITY = {"training": {"checkpoint_share"}, "images": {"unreadable", "pixel_cap", "node_memory_share"}}


def changed_settings(settings: Any, left_out: set[str] | None = None) -> dict[str, Any]:
    """Return the fields of a settings dataclass that differ from their defaults."""
    return {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(settings)
        if f.name not in (left_out or set()) and getattr(settings, f.name) != f.default
    }


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON-ready value in one canonical spelling."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def rows_digest(frame: pd.DataFrame, columns: tuple[str, ...]) -> str:
    """Return the SHA-256 of the given columns' rows, in the frame's order."""
    state = hashlib.sha256("\t".join(columns).encode())
    for row in frame[list(columns)].astype(str).itertuples(index=False, name=None):
        state.update(("\n" + "\t".join(row)).encode())
    return state.hexdigest()


def trial_id(
    task: str, h1_share: int, seed: int, cohort_seed: int, axes: dict[str, Any], identity: dict[str, Any]
) -> str:
    """Return for example ``pneumonia-h1_060-seed0-3fa9c1``; axes that are too long for a folder's name are cut."""
    beginning, shown = f"{task}-h1_{h1_share:03d}", "".join(f"-{_short(k, v)}" for k, v in sorted(axes.items()))
    end = (f"-cohort{cohort_seed}" if cohort_seed else "") + f"-seed{seed}-{digest(identity)[:6]}"
    if len(f"{beginning}{shown}{end}".encode()) > LONGEST_ID:
        own = f"_{digest(axes)[:8]}"  # two weights files of one content have one identity
        room = CUT_ID - len(f"{beginning}{own}{end}")
        shown = shown.encode()[:room].decode(errors="ignore") + own
    return f"{beginning}{shown}{end}"


def _short(key: str, value: Any) -> str:
    leaf = key.rsplit(".", 1)[-1]
    text = f"{leaf}_{value}" if isinstance(value, str | int | float | bool) else f"{leaf}_{digest(value)[:4]}"
    return "".join(c if c.isalnum() or c in "_." else "_" for c in text)
