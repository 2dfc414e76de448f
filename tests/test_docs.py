"""The documentation tells every key of an experiment file with its true default, and builds."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from raystudy.cohorts import settings as sources
from raystudy.cohorts.phantom_settings import PhantomSettings
from raystudy.config import Experiment, Resources, Search, Tracking
from raystudy.config_text import parse_yaml
from raystudy.explanation_settings import ExplainSettings
from raystudy.images.settings import ImageSettings
from raystudy.protopnet.settings import ModelSettings, TrainingSettings

ROOT = Path(__file__).parents[1]
SECTIONS = {
    "Experiment": Experiment,
    "sources: nih": sources.NihSource,
    "sources: chexpert": sources.ChexpertSource,
    "sources: manifest": sources.ManifestSource,
    "columns of a manifest": sources.ManifestColumns,
    "sources: dicom": sources.DicomSource,
    "columns of a dicom table": sources.DicomColumns,
    "sources: phantom": PhantomSettings,
    "tasks": sources.TaskSettings,
    "cohort": sources.CohortSettings,
    "images": ImageSettings,
    "model": ModelSettings,
    "training": TrainingSettings,
    "explain": ExplainSettings,
    "resources": Resources,
    "tracking": Tracking,
    "search": Search,
}
IN_WORDS = ("required", "see below", "from `positive`", "<code>&#124;</code>")


def told() -> dict[str, dict[str, str]]:
    """Return key -> default of every section of docs/experiment.md."""
    text = (ROOT / "docs/experiment.md").read_text()
    found: dict[str, dict[str, str]] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        found[title] = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", body, re.MULTILINE))
    return found


def defaults(settings: Any) -> dict[str, Any]:
    """Return key -> default; ``...`` where a key is required or its default is a section or computed."""
    if dataclasses.is_dataclass(settings):
        return {f.name: f.default for f in dataclasses.fields(settings)}
    assert issubclass(settings, BaseModel)
    return {
        name: ... if field.is_required() or field.default_factory or _is_section(field.default) else field.default
        for name, field in settings.model_fields.items()
    }


def _is_section(value: object) -> bool:
    return isinstance(value, BaseModel) or dataclasses.is_dataclass(value)


def test_every_section_of_the_reference_is_known() -> None:
    assert list(told()) == list(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_reference_tells_every_key_with_its_true_default(section: str) -> None:
    rows, true = told()[section], defaults(SECTIONS[section])
    assert list(rows) == list(true)
    for key, value in true.items():
        if rows[key] in IN_WORDS:
            assert value is ... or (rows[key] == "<code>&#124;</code>" and value == "|"), key
        else:
            said = parse_yaml(rows[key].strip("`"), key)
            plain = list(value) if isinstance(value, tuple) else value
            assert (said, type(said)) == (plain, type(plain)), key


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    pages = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = {page for entry in pages for page in entry.values()}
    assert named == {p.name for p in (ROOT / "docs").glob("*.md")}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "source_reliance" in (tmp_path / "report/index.html").read_text()
