"""What is different from the trials that a study directory already has, before others are started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raystudy.errors import StudyError
from raystudy.orchestrate.ledger import Ledger
from raystudy.orchestrate.plan import PlannedTrial

_WORDS = {"cohort_sha256": "who is in the mixture or the tests", "numerics_version": "raystudy's numerics"}
_COORDINATES = ("task", "h1_share", "seed", "cohort_seed", "axes")
_NAMES = ("study", "trial_id", "schema", "class_names")
SHOWN = 12


def describe_changes(ledger: Ledger, missing: Iterable[PlannedTrial]) -> list[str]:
    """Return lines that say why trials will run although the directory holds trials of the same coordinates.

    Trials that the plan no longer asks for are kept; only their number is said.
    """
    strangers = ledger.strangers()
    wanted = {_coordinates(t.spec.to_json()): t.spec.to_json() for t in missing}
    if not strangers:
        return []
    with ThreadPoolExecutor(16) as pool:
        olds = [spec for spec in pool.map(lambda t: _spec(ledger, t), strangers) if spec]
    changes: Counter[tuple[str, str, str]] = Counter()
    for old in olds:
        new = wanted.get(_coordinates(old))
        if new is not None:
            changes.update(_differences(old, new))
    lines = [f"{len(strangers)} trials in the study directory are not asked for by this experiment; they are kept"]
    if changes:
        lines.append("other trials will run in the place of some of them, because these changed:")
    for (key, old_value, new_value), n in changes.most_common(SHOWN):
        what = _WORDS.get(key)
        told = f"  {what}" if what else f"  {key}: {old_value} -> {new_value}"
        lines.append(f"{told}  ({n} trials)")
    if len(changes) > SHOWN:
        lines.append(f"  … and {len(changes) - SHOWN} more")
    return lines


def _spec(ledger: Ledger, trial_id: str) -> dict[str, Any] | None:
    try:
        return dict(ledger.study.trial(trial_id).read_json("spec.json"))
    except (FileNotFoundError, ValueError, TypeError, StudyError):
        return None


def _coordinates(spec: dict[str, Any]) -> str:
    return repr([spec.get(name) for name in _COORDINATES])


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str, str]]:
    before, after = _flat(old), _flat(new)
    keys = [k for k in sorted(before.keys() | after.keys()) if k.split(".")[0] not in (*_NAMES, *_COORDINATES)]
    return [(k, str(before.get(k, "–")), str(after.get(k, "–"))) for k in keys if before.get(k) != after.get(k)]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
