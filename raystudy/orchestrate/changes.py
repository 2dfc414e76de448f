"""What is different from the trials that a study directory already has, told before others are started.

One line a changed key with its old and new value and the number of trials; one line for what is new and one for what is
not asked for any more.  A first run has nothing to tell.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import yaml

from raystudy.errors import StudyError
from raystudy.orchestrate.identity import NOT_IDENTITY
from raystudy.orchestrate.ledger import Ledger
from raystudy.orchestrate.plan import PlannedTrial

Spec = dict[str, Any]
ROWS = "cohort_sha256"
_WORDS = {ROWS: "who is in the mixtures or the tests", "numerics_version": "raystudy's numerics"}
_COORDINATES = ("task", "h1_share", "seed", "cohort_seed", "axes")
_NAMES = ("study", "trial_id", "schema", "class_names")
_DATA = ("sources", "tasks", "cohort", "images")  # of the experiment: what decides rows and pixels, not in the spec
VALUES = 8  # shown of one kind


def describe_changes(ledger: Ledger, missing: Iterable[PlannedTrial]) -> list[str]:
    """Return lines that say which trials will run beside those that the directory holds, and why."""
    strangers = ledger.strangers()
    here = [t.spec.to_json() for t in ledger.plan.trials if ledger.files(t)]
    wanted = [t.spec.to_json() for t in missing if not ledger.files(t)]
    if not strangers and not here:
        return []
    with ThreadPoolExecutor(16) as pool:
        olds = [spec for spec in pool.map(lambda t: _spec(ledger, t), strangers) if spec]
    places: dict[str, list[Spec]] = defaultdict(list)
    for old in olds:
        places[_place(old)].append(old)
    pairs = [(_closest(new, places[_place(new)]), new) for new in wanted if _place(new) in places]
    taken = {_place(new) for _, new in pairs}
    added = [new for new in wanted if _place(new) not in taken]
    left = [old for old in olds if _place(old) not in taken]
    n_left = len(strangers) - sum(len(places[place]) for place in taken)
    lines: list[str] = []
    if pairs:
        lines.append(f"{_trials(len(pairs))} run anew and the earlier ones are kept, because these changed:")
        lines += _changed(pairs, _data_changes(ledger))
    if told := _only_in(added, [*here, *olds]):
        lines.append(f"{_trials(len(added))} more: {told}")
    if n_left:
        told = _only_in(left, [*here, *wanted])
        lines.append(f"{_trials(n_left)} not asked for any more, kept{f': {told}' if told else ''}")
    return lines


def _changed(pairs: list[tuple[Spec, Spec]], data: dict[str, tuple[str, str]]) -> list[str]:
    """Return a line for each key that differs, and those of the data where the spec alone does not explain it."""
    found: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
    numbers: dict[str, int] = defaultdict(int)
    for old, new in pairs:
        for key, before, after in _differences(old, new):
            found[key][before, after] = None
            numbers[key] += 1
    lines: list[str] = []
    for key, values in found.items():
        told = _WORDS.get(key) or f"{key}: {_listed([f'{before} → {after}' for before, after in values])}"
        lines.append(f"  {told}  ({_trials(numbers[key])})")
    same = [new for old, new in pairs if not _differences(old, new)]
    if ROWS in found or same:
        lines += [f"  {key}: {before} → {after}" for key, (before, after) in data.items() if key not in found]
    if same and not any(key.startswith("images.") for key in data):  # whose rows are the same, too
        lines += [f"  {told}  ({_trials(n)})" for told, n in Counter(map(_unnamed, same)).items()]
    return lines


def _unnamed(spec: Spec) -> str:
    """Say what identifies a trial beside its spec and the decode settings: the bytes of its weights file."""
    weights = spec["model"]["weights"]
    if weights in ("none", "imagenet"):
        return "something that the earlier files do not tell"
    return f"model.weights: what {weights} holds"


def _data_changes(ledger: Ledger) -> dict[str, tuple[str, str]]:
    """Return what the experiment says of the data now and what the last run's said, by key."""
    try:
        kept = yaml.safe_load(ledger.study.storage.read_bytes("experiment.yaml"))
    except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    if not isinstance(kept, dict):
        return {}
    before, after = (
        _flat({key: tree.get(key) for key in _DATA}) for tree in (kept, ledger.plan.experiment.model_dump(mode="json"))
    )
    unimportant = {f"images.{name}" for name in NOT_IDENTITY["images"]} | {"images.size"}  # size: in the spec
    return {key: (old, new) for key, old, new in _unequal(before, after) if key not in unimportant}


def _spec(ledger: Ledger, trial_id: str) -> Spec | None:
    try:
        return dict(ledger.study.trial(trial_id).read_json("spec.json"))
    except (FileNotFoundError, ValueError, TypeError, StudyError):
        return None


def _place(spec: Spec) -> str:
    return repr([spec.get(name) for name in _COORDINATES])


def _closest(new: Spec, olds: list[Spec]) -> Spec:
    """Return the earlier trial that differs least: a study may have been changed more than once."""
    return min(olds, key=lambda old: len(_differences(old, new)))


def _differences(old: Spec, new: Spec) -> list[tuple[str, str, str]]:
    return [
        found for found in _unequal(_flat(old), _flat(new)) if found[0].split(".")[0] not in (*_NAMES, *_COORDINATES)
    ]


def _unequal(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    keys = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
    return [(k, str(before.get(k, "–")), str(after.get(k, "–"))) for k in keys]


def _only_in(these: list[Spec], those: list[Spec]) -> str:
    """Return the coordinates that occur in these trials and in none of those."""
    told: list[str] = []
    mine, others = _values(these), _values(those)
    for name, values in mine.items():
        alone = [value for value in values if value not in others.get(name, {})]
        if alone:
            told.append(f"{name} {_listed(alone)}")
    return ", ".join(told)


def _values(specs: list[Spec]) -> dict[str, dict[str, None]]:
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for spec in specs:
        coordinates = {k: spec.get(k) for k in _COORDINATES if k != "axes"} | dict(spec.get("axes") or {})
        for name, value in coordinates.items():
            found[name][str(value)] = None
    return found


def _listed(values: list[str]) -> str:
    return ", ".join(values[:VALUES]) + (", …" if len(values) > VALUES else "")


def _trials(n: int) -> str:
    return f"{n} trial{'s' if n != 1 else ''}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
