"""Everything that an experiment file can say.

An experiment is one YAML file, read by a safe loader and validated strictly: unknown keys, wrong types and values out
of range are refused with the file, the line, the key path and the remedy.  The defaults are the paper's wherever the
paper speaks.  Component settings are the frozen dataclasses that live beside their component; nothing below this edge
sees the whole tree.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raystudy.cohorts.settings import CohortSettings, Source, TaskSettings
from raystudy.config_text import ExperimentText, did_you_mean, in_plain_words, parse_yaml, set_key
from raystudy.errors import StudyError
from raystudy.explanation_settings import ExplainSettings
from raystudy.images.settings import ImageSettings
from raystudy.protopnet.settings import ModelSettings, TrainingSettings

Json = str | int | float | bool | None | list[Any] | dict[str, Any]
Share = Annotated[int, Field(ge=0, le=100)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    if not values:
        raise ValueError("give at least one value")
    if len(set(values)) != len(values):
        raise ValueError(f"values must not repeat, got {list(values)}")
    return values


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Resources(_Strict):
    """What one trial occupies; never part of a trial's identity."""

    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)
    gpu_memory_gb: float | None = Field(default=None, gt=0)
    max_concurrent: int | None = Field(default=None, ge=1)
    max_failures: int = Field(default=3, ge=0)
    explain_cpus: float = Field(default=1, gt=0)
    explain_gpus: float = Field(default=0, ge=0)


_SQLITE_FILE = re.compile(r"sqlite(\+pysqlite)?:///(?!file:|.*(:memory:|mode=memory))[^?]*[^?/](\?.*)?")
STORES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")  # what MLflow keeps runs in


class Tracking(_Strict):
    """The MLflow mirror. No film and no patient id leaves the study directory unless ``images`` is true."""

    enabled: bool = True
    uri: str = "sqlite:///mlflow.db"
    experiment: str | None = None
    images: bool = False

    @field_validator("uri")
    @classmethod
    def _an_address(cls, value: str) -> str:
        if value.partition("://")[0].partition("+")[0] not in STORES or "://" not in value:
            raise ValueError("must be sqlite:///FILE, an http(s):// server or the address of a database")
        if urlsplit(value).password or "password" in parse_qs(urlsplit(value).query):
            raise ValueError("must hold no password; set PGPASSWORD or MLFLOW_TRACKING_PASSWORD in the environment")
        if value.startswith("sqlite") and not _SQLITE_FILE.fullmatch(value):
            raise ValueError(
                "must be sqlite:///FILE, a file that is kept: sqlite:///mlflow.db or sqlite:////folder/mlflow.db"
            )
        return value


class SearchRange(_Strict):
    """One searched key: a ``uniform`` or ``loguniform`` interval, or a ``choice``."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    choice: tuple[Json, ...] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> SearchRange:
        given = [k for k in ("uniform", "loguniform", "choice") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of uniform: [low, high], loguniform: [low, high], choice: [values]")
        bounds = self.uniform or self.loguniform
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError("the lower bound must be below the upper bound")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs positive bounds")
        if self.choice is not None and not self.choice:
            raise ValueError("choice must not be empty")
        return self

    def examples(self) -> list[Json]:
        """Return every choice, or both bounds and a value between them that is no whole number."""
        if self.choice is not None:
            return list(self.choice)
        low, high = self.uniform or self.loguniform or (0.0, 1.0)
        return [low, high, low + (high - low) / math.pi]


class Search(_Strict):
    """A hyperparameter search on validation accuracy; a test set can never be the objective."""

    space: dict[str, SearchRange] = Field(min_length=1)
    trials: int = Field(ge=1)
    algorithm: Literal["random", "optuna"] = "random"
    scheduler: Literal["asha", "none"] = "none"
    mixtures: tuple[Share, ...] = (50,)

    _lists = field_validator("mixtures")(_distinct)


class Experiment(_Strict):
    """A study: two sources, tasks, mixtures and seeds; the defaults are the paper's."""

    name: str
    notes: tuple[str, ...] = ()  # printed on the report page
    storage: str = "studies"
    study_seed: Seed = 0
    sources: dict[str, Source] = Field(min_length=2, max_length=2)
    tasks: dict[str, TaskSettings] = Field(min_length=1)
    cohort: CohortSettings = CohortSettings()
    mixtures: tuple[Share, ...] = tuple(range(0, 101, 10))
    seeds: tuple[Seed, ...] = (0,)
    cohort_seeds: tuple[Seed, ...] = (0,)
    images: ImageSettings = ImageSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    explain: ExplainSettings = ExplainSettings()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    axes: dict[str, tuple[Json, ...]] = {}
    search: Search | None = None

    _lists = field_validator("mixtures", "seeds", "cohort_seeds")(_distinct)

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", value):
            rule = "must be 1 to 63 letters, digits, _ and -, beginning with a letter or digit"
            raise ValueError(f"{rule}, got {json.dumps(value)}")
        return value

    @field_validator("sources", "tasks")
    @classmethod
    def _plain_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,30}", name):
                raise ValueError(f"name {name!r} must be letters, digits and _, beginning with a letter")
        return values

    @model_validator(mode="after")
    def _axes_name_settings(self) -> Experiment:
        for key in self.axes:
            check_settings_key(key, "axes")
            if not self.axes[key]:
                raise ValueError(f"axes: {key} must list at least one value")
        for key in self.search.space if self.search else {}:
            check_settings_key(key, "search.space")
            if key in self.axes:
                raise ValueError(f"{key} is both an axis and searched; keep one")
        for task_name, task in self.tasks.items():
            unknown = sorted(set(task.negatives_by_source()) - set(self.sources))
            if unknown:
                raise ValueError(
                    f"tasks.{task_name}.negatives: no such source {unknown[0]!r}; have {list(self.sources)}"
                )
        return self

    def with_values(self, values: dict[str, Json]) -> Experiment:
        """Return this experiment with dotted keys replaced, validated again."""
        tree = self.model_dump(mode="json")
        for key, value in values.items():
            set_key(tree, key, value)
        return Experiment.model_validate_json(json.dumps(tree))


def check_settings_key(key: str, where: str) -> None:
    """Refuse a dotted key that does not name a setting of a trial."""
    head, _, leaf = key.partition(".")
    fields = {
        "model": ModelSettings,
        "training": TrainingSettings,
        "images": ImageSettings,
        "cohort": CohortSettings,
        "explain": ExplainSettings,
    }
    if head not in fields or not leaf:
        raise ValueError(
            f"{where}: {key!r} must begin with one of {', '.join(fields)} and name one setting, e.g. model.backbone"
        )
    known = getattr(fields[head], "model_fields", None) or fields[head].__dataclass_fields__
    if leaf not in known:
        raise ValueError(f"{where}: no setting {key!r}{did_you_mean(key, [f'{head}.{name}' for name in known])}")


def load_experiment(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Experiment:
    """Read and validate an experiment file.

    Parameters
    ----------
    path : the YAML file; relative local paths in it are relative to the current folder.
    overrides : ``key=value`` texts, values as YAML, for example ``training.epochs=12`` or ``seeds=[0,1]``.

    Raises
    ------
    StudyError : with file and line, key path, what is wrong and what would be right.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise StudyError(
            f"cannot read the experiment file: {reason}",
            where=str(path),
            remedy="name an experiment file, for example experiments/demo.yaml",
        ) from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise StudyError("an experiment file is a mapping of keys", where=str(path), remedy="begin with `name: …`")
    given: set[str] = set()
    for override in overrides:
        key, separator, value = (part.strip() for part in override.partition("="))
        if not separator or not all(key.split(".")):
            raise StudyError(f"--set {override!r} is not key=value", remedy="for example --set training.epochs=12")
        where = f"--set {key}"
        try:
            set_key(tree, key, parse_yaml(value, where))
        except ValueError as error:
            raise StudyError(str(error), where=where, remedy="name a key as section.key") from None
        given.add(key)
    source = ExperimentText(path, text, tree, frozenset(given))
    source.require_plain()
    try:
        experiment = Experiment.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise StudyError(source.explain(error, Experiment)) from None
    for key, values in experiment.axes.items():
        met: list[Experiment] = []
        for value in values:
            met.append(_try_value(experiment, source, ["axes", key], value))
            if met[-1] in met[:-1]:
                raise StudyError(
                    f"axes.{key}: values must not repeat, got {json.dumps(value)} again",
                    where=source.place(["axes", key]),
                )
    for key, searched in experiment.search.space.items() if experiment.search else ():
        for value in searched.examples():
            _try_value(experiment, source, ["search", "space", key], value)
    return experiment


def _try_value(experiment: Experiment, source: ExperimentText, keys: list[str], value: Json) -> Experiment:
    """Return the experiment with one value of an axis or of a search; refuse a value that its setting cannot have."""
    try:
        return experiment.with_values({keys[-1]: value})
    except ValidationError as error:
        first = dict(error.errors(include_url=False)[0])
        problem = in_plain_words(first).removeprefix(f"{keys[-1].rpartition('.')[2]}: ")  # the key path says it
        shown = "" if first["type"] == "value_error" and ", got " in problem else f", got {json.dumps(value)}"
        raise StudyError(f"{'.'.join(keys)}: {problem}{shown}", where=source.place(keys)) from None
