"""An experiment file as text: reading its YAML safely, and saying where and how it is wrong.

In flow a file's text and pydantic's findings; out flow plain dictionaries, and refusals that name file, line, key path,
what is wrong and what would be right.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import ValidationError

from raystudy.errors import StudyError

MOST_VALUES = 100_000  # of an experiment file, aliases written out
MOST_PROBLEMS = 8  # told at once
NO_TEXT = object()  # in place of the value of a key that is none


class _Loader(yaml.SafeLoader):
    """Safe YAML with JSON's types: 1e-4 is a number, 2024-01-01, 1:20 and 010 are text, a repeated key is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] in ("bool", "null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+.0123456789"),
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if isinstance(key_node, yaml.ScalarNode):
            if key_node.value in seen:
                raise _fault(f"the key {key_node.value!r} stands twice", key_node)
            seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def _fault(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _values(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Return how many values a node is with its aliases written out; refuse one that contains itself."""
    known = sizes.get(id(node), 0)
    if known is None:
        raise _fault("a value contains itself", node)
    if known:
        return known
    sizes[id(node)] = None
    below = node.value if not isinstance(node, yaml.ScalarNode) else []
    total = 1
    for child in below:
        total += sum(_values(c, sizes) for c in (child if isinstance(child, tuple) else (child,)))
    if total > MOST_VALUES:
        raise _fault(f"more than {MOST_VALUES:,} values with its aliases written out", node)
    sizes[id(node)] = total
    return total


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text by the safe loader; ``where`` names it in errors."""
    line = ""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _values(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
    except RecursionError:
        problem = "too many levels"
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:  # a tag on a value it does not fit
        problem = str(error)
    remedy = "mend the line" if line else "write plain keys and values"
    raise StudyError(f"not valid YAML: {problem}", where=f"{where}{line}", remedy=remedy)


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in a tree of plain dictionaries, making the branches that are missing.

    Raises
    ------
    ValueError : a branch is a value, not a section.
    """
    *branches, leaf = _branches(key)
    for branch in branches:
        child = tree.get(branch)
        if child is None:
            child = tree[branch] = {}
        if not isinstance(child, dict):
            raise ValueError(f"{branch!r} in {key!r} is a value, not a section")
        tree = child
    tree[leaf] = value


def _branches(key: str) -> list[str]:
    """Split a dotted key; what stands below ``axes`` and ``search.space`` is a dotted key itself."""
    for head in ("axes.", "search.space."):
        if key.startswith(head):
            return [*head.removesuffix(".").split("."), key.removeprefix(head)]
    return key.split(".")


def did_you_mean(name: str, known: list[str]) -> str:
    """Return the remedy line for an unknown name."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"\n  remedy: did you mean `{close[0]}`?"
    return f"\n  remedy: known keys are {', '.join(known)}" if known else "\n  remedy: remove it"


@dataclass(frozen=True)
class ExperimentText:
    """An experiment file as it was read: its text, its tree with overrides, and the keys that ``--set`` gave."""

    path: Path
    text: str
    tree: dict[str, Any]
    given: frozenset[str]

    def place(self, keys: list[Any]) -> str:
        """Return ``FILE:LINE`` of a key, the file where no line has it, or the ``--set`` that gave it."""
        dotted = [".".join(map(str, keys[:n])) for n in range(len(keys), 0, -1)]
        override = next((d for d in dotted if d in self.given), None)
        if override:
            return f"--set {override}"
        line = self._line(keys)
        override = next((g for g in sorted(self.given) if dotted and g.startswith(f"{dotted[0]}.")), None)
        if line:
            return f"{self.path}:{line}" + (f" with --set {override}" if override else "")
        return f"--set {override}" if override else str(self.path)

    def _line(self, keys: list[Any]) -> int | None:
        node, line = yaml.compose(self.text, Loader=_Loader), None
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

    def require_plain(self) -> None:
        """Refuse values that JSON does not know: sets, bytes, dates by tag, not-a-number, keys that are no text."""
        for keys, value in _leaves(self.tree, []):
            if isinstance(value, str | bool | int | None) or (isinstance(value, float) and math.isfinite(value)):
                continue
            if value is NO_TEXT:
                raise StudyError(
                    f"{'.'.join(map(str, keys[:-1])) or '(top level)'}: the key {keys[-1]!r} is no text",
                    where=self.place(keys),
                    remedy="write the name of a setting, or put the key in quotes",
                )
            raise StudyError(
                f"{'.'.join(map(str, keys))}: {value!r} is no text, number, true/false, null, list or mapping",
                where=self.place(keys),
                remedy="write a finite number, or put text in quotes",
            )

    def explain(self, error: ValidationError, root: type) -> str:
        """Return what is wrong with the file, a paragraph a problem."""
        problems = error.errors(include_url=False)
        problems = [p for p in problems if p["type"] != "default_factory_not_called"]  # follows from another
        lines = [self._explain_one(dict(problem), root) for problem in problems[:MOST_PROBLEMS]]
        if len(problems) > len(lines):
            lines.append(f"… and {len(problems) - len(lines)} more")
        return "\n".join(lines)

    def _explain_one(self, problem: dict[str, Any], root: type) -> str:
        keys = _keys_in_file(problem["loc"], self.tree)
        kind, message = problem["type"], in_plain_words(problem)
        if kind == "value_error" and (about := re.match(r"([\w.]+): ", message)):  # a rule begins with its key
            keys, message = [*keys, *about[1].split(".")], message[about.end() :]
        elif kind == "value_error" and not keys:
            return f"{self.place([])}: {message}"
        start = f"{self.place(keys)}: {'.'.join(map(str, keys)) or '(top level)'}"
        if kind in ("extra_forbidden", "unexpected_keyword_argument"):
            return f"{start}: unknown key{did_you_mean(str(keys[-1]), _known_keys(root, keys[:-1], self.tree))}"
        if kind == "missing" and isinstance(keys[-1], int):  # of a list of a fixed length
            start = start.removesuffix(f".{keys[-1]}")
            return f"{start}: value {keys[-1] + 1} of this list is missing\n  remedy: give every value of the list"
        if kind in ("missing", "missing_argument"):
            return f"{start}: this key is required\n  remedy: add `{keys[-1]}:`"
        if kind == "union_tag_not_found":
            known = [kind for c in _settings_at(root, keys, self.tree) for kind in _kinds(c)]
            return f"{start}: this key is required\n  remedy: add `kind:`, one of {', '.join(known)}"
        value = problem.get("input")
        shown = "" if isinstance(value, dict) or kind == "value_error" else f", got {json.dumps(value, default=str)}"
        listed = kind == "tuple_type" and isinstance(value, str | int | float)
        remedy = f"\n  remedy: write a list: [{value}]" if listed else ""
        return f"{start}: {message}{shown[:200]}{remedy}"


def in_plain_words(problem: dict[str, Any]) -> str:
    """Return pydantic's message in the words of somebody who writes YAML."""
    context = problem.get("ctx", {})
    if problem["type"] in ("too_long", "too_short"):
        most = problem["type"] == "too_long"
        return f"must have at {'most' if most else 'least'} {context['max_length' if most else 'min_length']} entries"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    for theirs, ours in (("an object", "a mapping of keys"), ("a valid array", "a list")):
        message = message.replace(f"must be {theirs}", f"must be {ours}")
    return message


def _leaves(value: Any, keys: list[Any]) -> Iterator[tuple[list[Any], Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str):
                yield [*keys, key], NO_TEXT
            yield from _leaves(child, [*keys, key])
    elif isinstance(value, list):
        for n, child in enumerate(value):
            yield from _leaves(child, [*keys, n])
    else:
        yield keys, value


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


def _known_keys(root: type, branch: list[Any], tree: Any) -> list[str]:
    """Return the names that are allowed below a branch of the file."""
    here = _settings_at(root, branch, tree)
    return list(dict.fromkeys(name for c in here if get_origin(c) is not dict for name in _hints(c)))


def _settings_at(root: type, branch: list[Any], tree: Any) -> list[Any]:
    """Return the settings classes and dictionaries that a branch of the file may be, from the types above it."""
    here: list[Any] = [root]
    for key in branch:
        tree = tree.get(key) if isinstance(tree, dict) else None
        below = [hint for owner in here for hint in _hints_below(owner, key)]
        here = [c for hint in below for c in _settings_in(hint)]
        kind = tree.get("kind") if isinstance(tree, dict) else None
        here = [c for c in here if kind is None or not _kinds(c) or kind in _kinds(c)]
    return here


def _hints(owner: type) -> dict[str, Any]:
    names = getattr(owner, "model_fields", None) or getattr(owner, "__dataclass_fields__", {})
    hints = get_type_hints(owner)
    return {name: hints[name] for name in names}


def _hints_below(owner: Any, key: Any) -> list[Any]:
    if get_origin(owner) is dict:
        return [get_args(owner)[1]]
    hint = _hints(owner).get(str(key))
    return [] if hint is None else [hint]


def _settings_in(hint: Any) -> list[Any]:
    """Return the settings classes and dictionaries that a type may be."""
    if get_origin(hint) is dict:
        return [hint]
    if isinstance(hint, type) and (hasattr(hint, "model_fields") or hasattr(hint, "__dataclass_fields__")):
        return [hint]
    return [c for argument in get_args(hint) for c in _settings_in(argument)]


def _kinds(owner: Any) -> tuple[Any, ...]:
    hint = {} if get_origin(owner) is dict else _hints(owner)
    return get_args(hint["kind"]) if "kind" in hint and get_origin(hint["kind"]) is Literal else ()
