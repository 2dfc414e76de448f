"""What an experiment file may say about who is in the study: sources, tasks, and the cohort's policies.

Each policy is a named setting whose default reproduces the paper as far as the data allow; where the paper and the real
tables disagree, the setting's description says what was found.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from raystudy.cohorts.phantom_settings import PhantomSettings
from raystudy.cohorts.vocabulary import PATHOLOGIES, VOCABULARY, canonical_finding

Negatives = Literal[
    "other_pathology",
    "any_nonpneumonia",
    "other_or_no_finding",
    "explicit_zero",
    "explicit_zero_other_pathology",
    "no_finding",
]
ANY_PATHOLOGY_TASK = "any_pathology"
SPLITS = ("train", "val", "test")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class NihSource(_Strict):
    """NIH ChestX-ray14 with its own tables, in the Kaggle tree or with all films in one folder.

    ``table``: below ``root``; by default ``Data_Entry_2017_v2020.csv`` or ``Data_Entry_2017.csv``, also with ``.gz``.
    ``images``: the folder that holds the films, by default ``root``; films are found by their base name.  Where no film
    is there yet, the Kaggle tree's paths are planned with.  ``official_lists``: the test split is ``test_list.txt`` and
    train and val are drawn from ``train_val_list.txt``.
    """

    kind: Literal["nih"]
    root: str
    table: str | None = None
    images: str | None = None
    layout: Literal["auto", "kaggle", "flat"] = "auto"
    official_lists: bool = False


class ChexpertSource(_Strict):
    """CheXpert, small or full-size: ``train.csv`` and ``valid.csv``, whose paths begin above their own folder.

    ``root``: the data set's folder or the one above it.  ``images``: the data set's folder,
    where the tables lie elsewhere.
    """

    kind: Literal["chexpert"]
    root: str
    train: str | None = None
    valid: str | None = None
    images: str | None = None


class ManifestColumns(_Strict):
    """Which column holds what; ``patient`` may not be left out, since it is the unit of splitting."""

    image: str
    patient: str
    image_id: str | None = None
    view: str | None = None
    findings: str | None = None
    uncertain: str | None = None
    split: str | None = None


class ManifestSource(_Strict):
    """Any hospital's table (CSV or Parquet), read by a column map.

    ``finding_columns``: column of 1, 0, −1 (uncertain) or blank -> finding.  ``findings``: spellings that the
    vocabulary does not know -> finding, or null for "not a finding".  ``where``: keeps the rows whose column has one of
    the values, so that one file can hold several hospitals.  ``view``: the view of all rows where no column tells it.
    """

    kind: Literal["manifest"]
    root: str
    table: str
    columns: ManifestColumns
    finding_columns: dict[str, str] = {}
    findings: dict[str, str | None] = {}
    separator: Annotated[str, Field(min_length=1)] = "|"
    where: dict[str, str | int | bool | tuple[str | int | bool, ...]] = {}
    view: str = ""

    @field_validator("finding_columns", "findings")
    @classmethod
    def _known(cls, values: dict[str, str | None]) -> dict[str, str | None]:
        return {spelling: None if finding is None else _finding(finding) for spelling, finding in values.items()}

    @model_validator(mode="after")
    def _has_findings(self) -> ManifestSource:
        if self.columns.findings is None and not self.finding_columns:
            raise ValueError(
                "name the findings: columns.findings (joined labels) or finding_columns (one 0/1 column each)"
            )
        return self


class DicomColumns(_Strict):
    """Columns of a table beside DICOM files; patient and view come from the headers unless a column gives them."""

    file: str = "file"
    patient: str | None = None
    view: str | None = None
    findings: str | None = None
    uncertain: str | None = None
    split: str | None = None


class DicomSource(_Strict):
    """DICOM files: a folder or a table. Only allow-listed header fields are read.

    ``table``: a table below ``root`` with file (below root) and findings.  Without it, every file below ``root`` is
    taken and its finding is the name of the topmost folder it lies in, for example ``pneumonia/`` and ``normal/``.
    """

    kind: Literal["dicom"]
    root: str
    table: str | None = None
    columns: DicomColumns = DicomColumns()
    finding_columns: dict[str, str] = {}
    findings: dict[str, str | None] = {}
    separator: Annotated[str, Field(min_length=1)] = "|"

    @field_validator("finding_columns", "findings")
    @classmethod
    def _known(cls, values: dict[str, str | None]) -> dict[str, str | None]:
        return {spelling: None if finding is None else _finding(finding) for spelling, finding in values.items()}

    @model_validator(mode="after")
    def _has_findings(self) -> DicomSource:
        if self.table is not None and self.columns.findings is None and not self.finding_columns:
            raise ValueError(
                "name the findings: columns.findings (joined labels) or finding_columns (one 0/1 column each)"
            )
        return self


class PhantomSource(_Strict):
    """A built-in synthetic hospital."""

    kind: Literal["phantom"]
    settings: PhantomSettings = PhantomSettings()


Source = Annotated[
    NihSource | ChexpertSource | ManifestSource | DicomSource | PhantomSource, Field(discriminator="kind")
]


class TaskSettings(_Strict):
    """What is told from what.

    ``positive``: a finding, or ``any_pathology``.  ``negatives``: a policy for all sources or one per source.

    * ``other_pathology``: another pathology is marked, the positive finding and No Finding are not ("remaining 13
      classes"; blank = not mentioned; Support Devices is no pathology).
    * ``other_or_no_finding``: that, or No Finding.  ``any_nonpneumonia``: every row without the positive finding.
    * ``explicit_zero``: rows whose table says 0 for the positive finding; ``explicit_zero_other_pathology``: of these,
      the ones with another pathology.
    * ``no_finding``: No Finding is marked; the only one for ``any_pathology``.
    """

    positive: str = "pneumonia"
    negatives: Negatives | dict[str, Negatives] | None = None
    class_names: tuple[str, str] = Field(default_factory=lambda given: _class_names(given.get("positive", "")))

    @field_validator("positive")
    @classmethod
    def _positive_known(cls, value: str) -> str:
        if value == ANY_PATHOLOGY_TASK:
            return value
        finding = _finding(value)
        if finding not in PATHOLOGIES:
            raise ValueError(f"{value!r} is no pathology; name one, or {ANY_PATHOLOGY_TASK}")
        return finding

    @model_validator(mode="after")
    def _negatives_fit(self) -> TaskSettings:
        given = self.negatives.values() if isinstance(self.negatives, dict) else [self.negatives]
        if self.positive == ANY_PATHOLOGY_TASK and any(policy not in (None, "no_finding") for policy in given):
            raise ValueError(
                "negatives of any_pathology are the films without a finding: leave it out or say no_finding"
            )
        if len(set(self.class_names)) != 2:
            raise ValueError("class_names must be two different names, the negative class first")
        return self

    def negatives_by_source(self) -> dict[str, Negatives]:
        """Return the policies that are given per source; empty when one policy holds for all."""
        return dict(self.negatives) if isinstance(self.negatives, dict) else {}

    def negatives_for(self, source: str) -> Negatives:
        """Return the policy of one source."""
        if isinstance(self.negatives, str):
            return self.negatives
        default: Negatives = "no_finding" if self.positive == ANY_PATHOLOGY_TASK else "other_pathology"
        return (self.negatives or {}).get(source, default)


class CohortSettings(_Strict):
    """How many, and by which policies (numbers as in the list of discrepancies between the paper and the tables).

    ``train``, ``val``, ``test``: images per class; null = what the smallest cell of sources and classes holds.

    1. ``h2_test``: CheXpert's test films: ``holdout`` = patient-wise from train.csv; ``official_valid`` = valid.csv
       (it has 8 pneumonia films).
    2. ``split``: ``paper_counts`` = the NIH split with 1099/187/145 pneumonia films; ``random`` = drawn by cohort seed.
       Other sources, and tables that bring their own split, are not touched by it.
    3. ``uncertain``: films whose positive finding is −1: ``drop`` from both classes, ``ones`` or ``zeros``.
    4., 5. negatives: see the task.  6. abnormality: films with neither a pathology nor No Finding are left out.
    7. ``normal_without_devices``: No Finding films with support devices are left out.
    8. ``views``.  9. ``max_per_patient``: images of a patient per class and split.
    10. ``positive_patients_as_negatives``: whether a patient with a positive film may also give negative ones.
    11. ``rounding`` of x % of N: ``half_up`` keeps the total 2N, ``floor_each_cell`` does not.
    12. ``nesting``: ``prefix`` = neighbouring mixtures share films; ``independent`` = drawn anew for each mixture.
    13. ``split_fractions``: patients for train, val, test where raystudy splits.
    14. The test sets are Test-100H1, Test-100H2 and Test-50-50, as in the paper's text.
    15. ``shrink``: instead of refusing, take per split what the smallest cell holds, for both sources.

    ``match_view``: each class of each source has the same share of every view.
    """

    train: Annotated[int, Field(ge=1)] | None = None
    val: Annotated[int, Field(ge=1)] | None = None
    test: Annotated[int, Field(ge=1)] | None = None
    h2_test: Literal["holdout", "official_valid"] = "holdout"
    split: Literal["paper_counts", "random"] = "paper_counts"
    uncertain: Literal["drop", "ones", "zeros"] = "drop"
    normal_without_devices: bool = False
    views: Literal["frontal", "all"] = "frontal"
    max_per_patient: Annotated[int, Field(ge=1)] | None = None
    positive_patients_as_negatives: Literal["allow", "exclude"] = "allow"
    rounding: Literal["half_up", "floor_each_cell"] = "half_up"
    nesting: Literal["prefix", "independent"] = "prefix"
    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    shrink: bool = False
    match_view: bool = False

    @field_validator("split_fractions")
    @classmethod
    def _fractions(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) <= 0 or abs(sum(value) - 1) > 1e-9:
            raise ValueError(f"split_fractions must be three positive numbers with the sum 1, got {list(value)}")
        return value

    def wanted(self, split: str) -> int | None:
        """Return the images per class of a split, or None."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]


def _finding(spelling: str) -> str:
    finding = canonical_finding(spelling)
    if finding is None:
        raise ValueError(f"{spelling!r} is not in the vocabulary of findings: {', '.join(VOCABULARY)}")
    return finding


def _class_names(positive: str) -> tuple[str, str]:
    return ("normal", "abnormal") if positive == ANY_PATHOLOGY_TASK else (f"no {positive}", positive)
