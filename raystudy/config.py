"""Everything that an experiment file can say.

An experiment is one YAML file, read by a safe loader and validated strictly: unknown keys, wrong types and values out
of range are refused with the file, the line, the key path and the remedy.  The defaults are the paper's wherever the
paper speaks.  Component settings are the frozen dataclasses that live beside their component; nothing below this edge
sees the whole tree.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raystudy.cohorts.settings import CohortSettings, Source, TaskSettings
from raystudy.errors import StudyError
from raystudy.explanation_settings import ExplainSettings
from raystudy.images.settings import ImageSettings
from raystudy.protopnet.settings import ModelSettings, TrainingSettings

Json = str | int | float | bool | None | list[Any] | dict[str, Any]
Share = Annotated[int, Field(ge=0, le=100)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


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


class Tracking(_Strict):
    """The MLflow mirror. No film and no patient id leaves the study directory unless ``images`` is true."""

    enabled: bool = True
    uri: str = "sqlite:///mlflow.db"
    experiment: str | None = None
    images: bool = False


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


class Search(_Strict):
    """A hyperparameter search on validation accuracy; a test set can never be the objective."""

    space: dict[str, SearchRange] = Field(min_length=1)
    trials: int = Field(ge=1)
    algorithm: Literal["random", "optuna"] = "random"
    scheduler: Literal["asha", "none"] = "none"
    mixtures: tuple[Share, ...] = (50,)


class Experiment(_Strict):
    """A study: two sources, tasks, mixtures and seeds; the defaults are the paper's."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
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

    @field_validator("mixtures", "seeds", "cohort_seeds")
    @classmethod
    def _distinct(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values:
            raise ValueError("give at least one value")
        if len(set(values)) != len(values):
            raise ValueError(f"values must not repeat, got {list(values)}")
        return values

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
                raise ValueError(f"axes.{key} must list at least one value")
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
        raise ValueError(f"{where}: no setting {key!r}{_did_you_mean(leaf, list(known))}")


def set_key(tree: dict[str, Any], key: str, value: Json) -> None:
    """Set a dotted key in a tree of plain dictionaries, making the branches that are missing."""
    *branches, leaf = key.split(".")
    for branch in branches:
        child = tree.get(branch)
        if child is None:
            child = tree[branch] = {}
        if not isinstance(child, dict):
            raise StudyError(f"{branch!r} in {key!r} is a value, not a section", remedy="name a key as section.key")
        tree = child
    tree[leaf] = value


class _Loader(yaml.SafeLoader):
    """Safe YAML with JSON's types: 1e-4 is a number, a date is text, a repeated key is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if isinstance(key_node, yaml.ScalarNode):
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text by the safe loader; `where` names it in errors."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise StudyError(f"not valid YAML: {problem}", where=f"{where}{line}", remedy="mend the line") from None
    except (RecursionError, ValueError) as error:
        raise StudyError(f"not valid YAML: {error}", where=where, remedy="write plain keys and values") from None


def load_experiment(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Experiment:
    """Read and validate an experiment file.

    Parameters
    ----------
    path : the YAML file; relative local paths in it are relative to the current folder.
    overrides : ``key=value`` texts, values as YAML, for example ``training.epochs=3`` or ``seeds=[0,1]``.

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
        key, separator, value = override.partition("=")
        if not separator or not key.strip():
            raise StudyError(f"--set {override!r} is not key=value", remedy="for example --set training.epochs=3")
        set_key(tree, key.strip(), parse_yaml(value, f"--set {key.strip()}"))
        given.add(key.strip())
    try:
        document = json.dumps(tree)
    except (TypeError, ValueError):
        raise StudyError(
            "only text, numbers, true/false, null, lists and mappings are allowed", where=str(path), remedy="quote it"
        ) from None
    try:
        experiment = Experiment.model_validate_json(document)
    except ValidationError as error:
        raise StudyError(_explain(error, text, tree, path, given)) from None
    for key, values in experiment.axes.items():
        for value in values:
            try:
                experiment.with_values({key: value})
            except ValidationError as error:
                problem = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
                where = f"{path}:{_line_of(text, ['axes', key])}"
                raise StudyError(f"axes.{key}: {problem}, got {json.dumps(value)}", where=where) from None
    return experiment


def _explain(error: ValidationError, text: str, tree: dict[str, Any], path: Path, given: set[str]) -> str:
    problems = error.errors(include_url=False)
    lines = [_explain_one(dict(problem), text, tree, path, given) for problem in problems[:8]]
    if len(problems) > len(lines):
        lines.append(f"… and {len(problems) - len(lines)} more")
    return "\n".join(lines)


def _explain_one(problem: dict[str, Any], text: str, tree: dict[str, Any], path: Path, given: set[str]) -> str:
    keys = _keys_in_file(problem["loc"], tree)
    dotted = ".".join(str(k) for k in keys) or "(top level)"
    line = _line_of(text, keys)
    where = f"--set {dotted}" if dotted in given else f"{path}:{line}" if line else str(path)
    kind, message = problem["type"], problem["msg"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(keys[:-1], tree)
        return f"{where}: {dotted}: unknown key{_did_you_mean(str(keys[-1]), known)}"
    if kind in ("missing", "missing_argument"):
        return f"{where}: {dotted}: this key is required\n  remedy: add `{keys[-1]}:`"
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    value = problem.get("input")
    shown = "" if isinstance(value, dict) or kind == "value_error" else f", got {json.dumps(value, default=str)}"
    return f"{where}: {dotted}: {message}{shown}"


def _keys_in_file(location: tuple[Any, ...], tree: Any) -> list[Any]:
    """Drop the names that pydantic adds to a location (union branches, ``function-after`` and the like)."""
    keys: list[Any] = []
    node: Any = tree
    for position, key in enumerate(location):
        inside = (isinstance(node, dict) and key in node) or (isinstance(node, list) and isinstance(key, int))
        if inside:
            keys.append(key)
            node = node[key] if not isinstance(node, list) or key < len(node) else None
        elif position == len(location) - 1 and isinstance(key, str) and re.fullmatch(r"[A-Za-z_]\w*", key):
            keys.append(key)
    return keys


def _line_of(text: str, keys: list[Any]) -> int | None:
    node = yaml.compose(text, Loader=_Loader)
    line = None
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == str(key)]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _known_keys(branch: list[Any], tree: dict[str, Any]) -> list[str]:
    """Names that are allowed below a branch of the experiment file."""
    from raystudy.cohorts import settings as cohort_settings

    if not branch:
        return list(Experiment.model_fields)
    if branch[0] == "sources":
        kind = tree.get("sources", {}).get(branch[1], {}).get("kind") if len(branch) > 1 else None
        for candidate in vars(cohort_settings).values():
            fields = getattr(candidate, "model_fields", {})
            if "kind" in fields and kind in getattr(fields["kind"].annotation, "__args__", ()):
                return list(fields)
        return []
    sections: dict[str, Any] = {
        "tasks": TaskSettings,
        "cohort": CohortSettings,
        "images": ImageSettings,
        "model": ModelSettings,
        "training": TrainingSettings,
        "explain": ExplainSettings,
        "resources": Resources,
        "tracking": Tracking,
        "search": Search,
    }
    section = sections.get(branch[0])
    if section is None:
        return []
    return list(getattr(section, "model_fields", None) or section.__dataclass_fields__)


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"\n  remedy: did you mean `{close[0]}`?"
    return f"\n  remedy: known keys are {', '.join(known)}" if known else "\n  remedy: remove it"
