"""What one trial is: everything that decides its result, as plain values (DESIGN.md rule 2); kept as ``spec.json``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raystudy.errors import DamagedFileError, StudyError
from raystudy.protopnet.settings import ModelSettings, TrainingSettings

SPEC_SCHEMA = 1  # raised when an older raystudy could no longer read spec.json
_S = TypeVar("_S", ModelSettings, TrainingSettings)
_NOT_IDENTITY = frozenset({"checkpoint_share"})  # decides when checkpoints are written, never what is learned
_SHOWN_ONLY = frozenset({"class_names"})


@dataclass(frozen=True)
class TrialSpec:
    """One trial of a study.

    ``seed`` decides initialisation and order, ``cohort_seed`` who is drawn, ``study_seed`` the family of all streams.
    ``class_names`` are (negative, positive).  ``axes`` holds the extra axes of an ablation, for example
    ``{"model.backbone": "resnet18"}``.  ``cohort_sha256`` identifies the rows that the trial is given.
    """

    study: str
    trial_id: str
    task: str
    class_names: tuple[str, str]
    h1_share: int
    seed: int
    cohort_seed: int
    study_seed: int
    model: ModelSettings
    training: TrainingSettings
    image_size: int
    cohort_sha256: str
    numerics_version: int
    axes: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if not 0 <= self.h1_share <= 100:
            raise ValueError(f"h1_share must lie in 0..100, not {self.h1_share}")
        if len(self.class_names) != 2:
            raise ValueError("class_names must be (negative, positive)")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; ``from_json`` gives the same spec back."""
        return {"schema": SPEC_SCHEMA, **dataclasses.asdict(self), "class_names": list(self.class_names)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str | bytes) -> TrialSpec:
        """Read a spec, parsed or as text.  Keys that an older raystudy did not write take their defaults.

        Raises
        ------
        DamagedFileError : no spec at all.
        StudyError : written by a newer raystudy.
        """
        try:
            values = dict(json.loads(data) if isinstance(data, str | bytes) else data)
            if int(values.pop("schema")) > SPEC_SCHEMA:
                raise _newer_error()
            values["model"] = _settings(ModelSettings, values["model"])
            values["training"] = _settings(TrainingSettings, values["training"])
            values["class_names"] = tuple(values["class_names"])
            known = {f.name for f in dataclasses.fields(cls)}
            if set(values) - known:
                raise _newer_error()
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(
                f"spec.json is damaged: {error}", remedy="delete this file and run again: it is then written anew"
            ) from error

    def fingerprint(self) -> str:
        """Return a SHA-256 of all that moves the result; settings at their default do not count (rule 2)."""
        values = {k: v for k, v in self.to_json().items() if k not in _SHOWN_ONLY}
        for name, defaults in (("model", ModelSettings()), ("training", TrainingSettings())):
            default = dataclasses.asdict(defaults)
            values[name] = {k: v for k, v in values[name].items() if v != default[k] and k not in _NOT_IDENTITY}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _settings(kind: type[_S], values: Mapping[str, Any]) -> _S:
    if set(values) - {f.name for f in dataclasses.fields(kind)}:
        raise _newer_error()
    return kind(**values)


def _newer_error() -> StudyError:
    return StudyError(
        "this trial was written by a newer raystudy",
        remedy="install the newer raystudy; if you have none, delete this file: it is damaged",
    )
