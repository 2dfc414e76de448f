"""What a study's cohorts amount to, in numbers, before anything is trained.

In flow the built cohorts; out flow counts per task, mixture, split, source and class, the patients that stand in two
splits (none), the precision that the test sets allow, and which policy decided what.  ``attainable`` tells whether a
published accuracy can come from a test set of n films at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, InvalidOperation
from itertools import product

import pandas as pd
from scipy.special import betaincinv

from raystudy.cohorts.build import Cohorts
from raystudy.cohorts.have_need import CLASS_NAMES, Cell
from raystudy.cohorts.labels import NEGATIVE, POSITIVE, label_rows
from raystudy.cohorts.settings import ANY_PATHOLOGY_TASK, CohortSettings, Source, TaskSettings
from raystudy.cohorts.tables import SourceTable
from raystudy.cohorts.vocabulary import BIT, NO_FINDING, SUPPORT_DEVICES

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
COUNT_COLUMNS = ("task", "cohort_seed", "h1_share", "split", "test_set", "source", "class", "images", "patients")


@dataclass(frozen=True)
class TestSet:
    """One test set and the 95 % half-width, in points, of an accuracy of 50 % on it.

    ``half_width`` takes films as independent; ``half_width_clustered`` takes a patient's films as one (Kish's
    effective n = (Σm)²/Σm² of the films m per patient), so that the truth lies between the two.  ``half_width_exact``
    is the binomial one (Clopper and Pearson) of independent films: what a small test set needs.
    """

    __test__ = False  # not a test class, whatever its name begins with

    task: str
    cohort_seed: int
    name: str
    images: int
    patients: int
    half_width: float
    half_width_exact: float
    half_width_clustered: float


@dataclass(frozen=True)
class Policy:
    """One of the decisions about who is in the study: its number, the setting, its value, and what that does."""

    number: int
    setting: str
    value: str
    effect: str


@dataclass(frozen=True)
class CohortPlan:
    """The numbers of a study's cohorts.

    ``counts``: one row per (task, cohort seed, mixture or test set, split, source, class), columns ``COUNT_COLUMNS``,
    also where a cell takes nothing; ``h1_share`` is −1 for test sets.  ``overlap``: patients in more than one split of
    a trial.
    """

    counts: pd.DataFrame
    overlap: int
    tests: tuple[TestSet, ...]
    policies: tuple[Policy, ...]
    cells: tuple[Cell, ...]
    sources: dict[str, tuple[str, ...]]
    images: int
    patients: int


@dataclass(frozen=True)
class Attainable:
    """Whether an accuracy, as printed, is k/n for some k."""

    percent: str
    n: int
    correct: int | None  # k of k/n, where there is one
    below: tuple[int, float]  # the nearest k/n and their percent
    above: tuple[int, float]
    nearest: tuple[int, int]  # (k, n') of the nearest n' at which it is attainable

    @property
    def ok(self) -> bool:
        return self.correct is not None


def plan_cohorts(
    cohorts: Cohorts, tasks: Mapping[str, TaskSettings], sources: Mapping[str, Source], settings: CohortSettings
) -> CohortPlan:
    """Count everything that a study's trials will see."""
    counts: list[pd.DataFrame] = []
    tests: list[TestSet] = []
    overlap = 0
    for task, seed in dict.fromkeys((c.task, c.cohort_seed) for c in cohorts.cells):
        test = cohorts.tests(task, seed)
        tested = set(test["patient_id"])
        counts.append(_counted(test, cohorts.sources).assign(task=task, cohort_seed=seed, h1_share=-1))
        for share in cohorts.mixtures:
            trial = cohorts.cohort(task, share, seed)
            trained, checked = (set(trial.loc[trial["role"] == role, "patient_id"]) for role in ("train", "val"))
            overlap += len(trained & checked) + len(trained & tested) + len(checked & tested)
            counted = _counted(trial.assign(test_set=""), cohorts.sources)
            counts.append(counted.assign(task=task, cohort_seed=seed, h1_share=share))
        for name, films in test.groupby("test_set", sort=False):
            tests.append(_precision(task, seed, str(name), films))
    table = cohorts.table
    return CohortPlan(
        counts=pd.concat(counts, ignore_index=True)[list(COUNT_COLUMNS)],
        overlap=overlap,
        tests=tuple(tests),
        policies=policies(tasks, sources, settings, _devices(cohorts.tables, settings)),
        cells=cohorts.cells,
        sources={t.name: (*t.notes, *_kept_out(t, tasks, settings)) for t in cohorts.tables},
        images=len(table),
        patients=int(table["patient_id"].nunique()),
    )


def _counted(films: pd.DataFrame, sources: tuple[str, str]) -> pd.DataFrame:
    groups = films.groupby(["role", "test_set", "source", "label"], sort=False)
    counted = groups.agg(images=("image_id", "size"), patients=("patient_id", "nunique"))
    parts = films[["role", "test_set"]].drop_duplicates().itertuples(index=False, name=None)
    cells = [(*part, *cell) for part, cell in product(parts, product(sources, (POSITIVE, NEGATIVE)))]
    counted = counted.reindex(pd.MultiIndex.from_tuples(cells, names=counted.index.names), fill_value=0).reset_index()
    counted = counted.rename(columns={"role": "split", "label": "class"})
    return counted.assign(**{"class": counted["class"].map(CLASS_NAMES)})


def _kept_out(table: SourceTable, tasks: Mapping[str, TaskSettings], settings: CohortSettings) -> tuple[str, ...]:
    """Tell what is in no cohort: CheXpert's official validation films under h2_test: holdout; ids that repeat."""
    unused = table.rows[table.rows["split"] == "unused"]
    twice = unused["image_id"].duplicated(keep=False)
    notes: list[str] = []
    if not twice.all():
        rows, counts = unused[~twice], list[str]()
        for name, task in tasks.items():
            labels = label_rows(rows, task, table.name, settings)
            counts.append(f"{name} {(labels == POSITIVE).sum()} positive, {(labels == NEGATIVE).sum()} negative")
        notes.append(f"the rows that are not used hold {'; '.join(counts)}")
    if twice.any():
        notes.append(f"{twice.sum()} rows whose image id stands in several rows are left out")
    return tuple(notes)


def _devices(tables: tuple[SourceTable, SourceTable], settings: CohortSettings) -> str:
    """Tell how many of the films without a finding show support devices."""
    shares: list[str] = []
    for table in tables:
        rows = table.rows[table.rows["split"] != "unused"]
        normal = rows["found"] & BIT[NO_FINDING] != 0
        if settings.views == "frontal":
            normal &= rows["view"] != "LATERAL"
        devices = normal & (rows["found"] & BIT[SUPPORT_DEVICES] != 0)
        shares.append(f"{table.name} {devices.sum()} of {normal.sum()}")
    return ", ".join(shares)


def _precision(task: str, seed: int, name: str, films: pd.DataFrame) -> TestSet:
    sizes = films.groupby("patient_id").size().to_numpy()
    n = len(films)
    effective = n**2 / float((sizes**2).sum())
    return TestSet(task, seed, name, n, len(sizes), half_width(n), exact_half_width(n), half_width(effective))


def half_width(n: float, accuracy: float = 50.0) -> float:
    """Return the 95 % half-width in points of an accuracy (0–100) on n films, by the normal approximation."""
    if n <= 0:
        raise ValueError("a test set needs at least one film")
    share = accuracy / 100
    return 100 * Z95 * math.sqrt(share * (1 - share) / n)


def exact_half_width(n: int) -> float:
    """Return half of the 95 % binomial interval in points (Clopper and Pearson 1934) when n // 2 of n are right."""
    k = n // 2
    low = float(betaincinv(k, n - k + 1, 0.025)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 0.975))
    return 100 * (high - low) / 2


def attainable(percent: float | str, n: int) -> Attainable:
    """Tell whether a percentage, with the decimals it is given with, is k/n for some k.

    Examples
    --------
    >>> attainable("63.89", 290).ok, attainable("63.89", 290).nearest
    (False, (184, 288))
    """
    text = str(percent).strip().removesuffix("%").strip()
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{percent!r} is not a percentage") from None
    if not (value.is_finite() and 0 <= value <= 100):
        raise ValueError(f"an accuracy lies in 0..100 %, got {text}")
    if not 1 <= n <= 10_000_000:
        raise ValueError(f"n must lie in 1..10000000, got {n}")
    exponent = min(int(value.as_tuple().exponent), 0)
    if exponent < -3:  # the search below would take too long
        raise ValueError(f"at most 3 decimals, got {text}")
    half = Decimal(5).scaleb(exponent - 1)  # half a unit of the last decimal: what rounds to the printed value
    exact = value * n / 100
    below = int(exact.to_integral_value(ROUND_FLOOR))
    above = min(int(exact.to_integral_value(ROUND_CEILING)), n)
    distance = 0
    while True:
        # With 10^(2 + decimals) films every printed value is attainable, so this ends.
        for other in (n - distance, n + distance):
            correct = _correct(value, other, half) if other >= 1 else None
            if correct is not None:
                mine = correct if distance == 0 else None
                ends = ((below, 100 * below / n), (above, 100 * above / n))
                return Attainable(text, n, mine, *ends, nearest=(correct, other))
        distance += 1


def _correct(value: Decimal, n: int, half: Decimal) -> int | None:
    """Return k with |100 k/n − value| ≤ half, the nearest one, or None."""
    nearest = int((value * n / 100).to_integral_value())
    fitting = [
        k for k in (nearest - 1, nearest, nearest + 1) if 0 <= k <= n and abs(Decimal(100 * k) - value * n) <= half * n
    ]
    return min(fitting, key=lambda k: abs(100 * k - value * n)) if fitting else None


def policies(
    tasks: Mapping[str, TaskSettings], sources: Mapping[str, Source], settings: CohortSettings, devices: str = ""
) -> tuple[Policy, ...]:
    """Return the fifteen decisions, as this study takes them; ``devices``: No Finding films with devices, counted."""
    kinds = {source.kind for source in sources.values()}
    unused = " (no CheXpert source here)" if "chexpert" not in kinds else ""
    given = "" if "nih" in kinds else " (no NIH source here)"
    negatives = "; ".join(f"{t}: " + ", ".join(f"{s} {k.negatives_for(s)}" for s in sources) for t, k in tasks.items())
    findings = [t for t, k in tasks.items() if k.positive != ANY_PATHOLOGY_TASK]
    sizes = {s: settings.wanted(s) for s in ("train", "val", "test")}
    wanted = ", ".join(f"{s} {n if n is not None else 'smallest cell'}" for s, n in sizes.items())
    per_patient = str(settings.max_per_patient or "any number")
    uncertain = {"drop": "left out of both classes", "ones": "positive", "zeros": "not positive"}[settings.uncertain]
    official = settings.h2_test == "official_valid"
    shared = settings.nesting == "prefix"
    return (
        Policy(1, "h2_test", settings.h2_test, ("valid.csv" if official else "patient-wise from train.csv") + unused),
        Policy(2, "split", settings.split, "of NIH patients; a split that a table brings is kept" + given),
        Policy(3, "uncertain", settings.uncertain, f"films whose positive finding is −1 are {uncertain}"),
        Policy(4, "negatives", negatives, "blank means not mentioned, except for explicit_zero"),
        Policy(
            5, "pathology", "all findings but No Finding and Support Devices", f"tasks: {', '.join(findings) or 'none'}"
        ),
        Policy(
            6, "train, val, test", wanted, "films per class; films with neither finding nor No Finding are left out"
        ),
        Policy(
            7,
            "normal_without_devices",
            _text(settings.normal_without_devices),
            "No Finding films with support devices are "
            + ("left out" if settings.normal_without_devices else "kept")
            + (f": {devices}" if devices else ""),
        ),
        Policy(
            8, "views", settings.views, "lateral films are " + ("left out" if settings.views == "frontal" else "kept")
        ),
        Policy(9, "max_per_patient", per_patient, "films of one patient per class and split; never across splits"),
        Policy(
            10,
            "positive_patients_as_negatives",
            settings.positive_patients_as_negatives,
            "other films of patients with a positive film may be negatives"
            if settings.positive_patients_as_negatives == "allow"
            else "patients with a positive film give no negatives",
        ),
        Policy(11, "rounding", settings.rounding, "floor(x·N/100 + ½)" if settings.rounding == "half_up" else "floor"),
        Policy(12, "nesting", settings.nesting, "mixtures " + ("share films" if shared else "are drawn independently")),
        Policy(
            13,
            "split_fractions",
            " / ".join(f"{f:g}" for f in settings.split_fractions),
            "of the patients, where raystudy splits",
        ),
        Policy(14, "test sets", "Test-100H1, Test-100H2, Test-50-50", "as in the paper's text"),
        Policy(
            15,
            "shrink",
            _text(settings.shrink),
            "each split takes what the smallest cell holds"
            if settings.shrink
            else "a cell with too few films is refused",
        ),
        Policy(
            16,
            "match_view",
            _text(settings.match_view),
            "each class of each source has the same share of every view" if settings.match_view else "views as drawn",
        ),
    )


def _text(value: bool) -> str:
    return "true" if value else "false"
