"""From sources, tasks and policies to the cohort of every trial and the test sets of every task.

In flow the parts of an experiment; out flow, per (task, mixture, cohort seed), the trial's rows with role and label,
and, per (task, cohort seed), the three test sets.  A study with a cell that holds too few films is refused here, with
a table of have and need, before anything is trained (paper 2.1; policies: ``settings.CohortSettings``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from raystudy.cohorts.have_need import Cell, refuse_shortage
from raystudy.cohorts.labels import label_rows
from raystudy.cohorts.mixtures import TEST_SETS, cell_sizes, keep_per_patient, largest_cells, matched_orders
from raystudy.cohorts.settings import SPLITS, CohortSettings, Source, TaskSettings
from raystudy.cohorts.sources import read_source
from raystudy.cohorts.split import split_source
from raystudy.cohorts.tables import SourceTable
from raystudy.cohorts.vocabulary import name_lists
from raystudy.errors import StudyError
from raystudy.storage import Storage
from raystudy.streams import stream

COHORT_COLUMNS = ("image_id", "patient_id", "source", "uri", "view", "label", "role")
CELLS = ((0, 1), (1, 1), (0, 0), (1, 0))  # (source, label)

Orders = dict[tuple[int, int], np.ndarray]  # (source, label) -> places of the films in their seeded order


@dataclass(frozen=True)
class _Draw:
    """What was drawn for one task and cohort seed: N per split, orders by split (and mixture, where independent)."""

    sizes: dict[str, int]
    orders: dict[tuple[str, int | None], Orders]


class Cohorts:
    """The cohorts of a study; made by ``build_cohorts``.

    Attributes
    ----------
    tables : the two sources' rows as read, H1 first.
    cells : have and need of every task, cohort seed, split, source and class.
    """

    def __init__(
        self,
        tables: tuple[SourceTable, SourceTable],
        films: pd.DataFrame,
        draws: Mapping[tuple[str, int], _Draw],
        cells: Sequence[Cell],
        mixtures: tuple[int, ...],
        settings: CohortSettings,
    ) -> None:
        self.tables, self.cells, self.mixtures, self.settings = tables, tuple(cells), mixtures, settings
        self._films, self._draws = films, draws
        self._made: dict[tuple[str, int, int], pd.DataFrame] = {}
        self._tests: dict[tuple[str, int], pd.DataFrame] = {}

    @property
    def sources(self) -> tuple[str, str]:
        """The keys of the two sources, H1 first."""
        return self.tables[0].name, self.tables[1].name

    def size(self, task: str, split: str, cohort_seed: int) -> int:
        """Return N, the films per class of a split."""
        return self._draws[task, cohort_seed].sizes[split]

    def cohort(self, task: str, h1_share: int, cohort_seed: int) -> pd.DataFrame:
        """Return a trial's films: ``COHORT_COLUMNS`` with role train or val, train first, by source and image id."""
        key = task, h1_share, cohort_seed
        if key not in self._made:
            parts = [self._mixture(task, h1_share, cohort_seed, split) for split in ("train", "val")]
            self._made[key] = pd.concat(parts, ignore_index=True)
        return self._made[key]

    def tests(self, task: str, cohort_seed: int) -> pd.DataFrame:
        """Return the test films: ``COHORT_COLUMNS`` with role test, and test_set; a film once per set it belongs to."""
        key = task, cohort_seed
        if key not in self._tests:
            parts = [
                self._mixture(task, share, cohort_seed, "test").assign(test_set=name)
                for name, share in TEST_SETS.items()
            ]
            self._tests[key] = pd.concat(parts, ignore_index=True)
        return self._tests[key]

    @cached_property
    def table(self) -> pd.DataFrame:
        """Canonical rows (DESIGN.md) of every film that some cohort or test set uses, each once."""
        frames = [self.cohort(task, x, seed) for task, seed in self._draws for x in self.mixtures]
        frames += [self.tests(task, seed) for task, seed in self._draws]
        used = pd.concat([f["image_id"] for f in frames]).unique()
        rows = self._films[self._films["image_id"].isin(used)]
        return pd.DataFrame(
            {
                "image_id": rows["image_id"],
                "source": rows["source"].astype("str"),
                "patient_id": rows["patient_id"],
                "uri": rows["uri"],
                "view": rows["view"],
                "findings": name_lists(rows["found"]),
                "uncertain": name_lists(rows["uncertain"]),
                "split": rows["split"].where(rows["split"].isin(SPLITS), ""),
            }
        ).reset_index(drop=True)

    @cached_property
    def duplicates(self) -> pd.DataFrame:
        """image_id and uri of the rows that are in no cohort because their image id stands in several rows."""
        rows = self._films.loc[self._films["split"] == "unused", ["image_id", "uri"]]
        return rows[rows["image_id"].duplicated(keep=False)].reset_index(drop=True)

    def _mixture(self, task: str, h1_share: int, cohort_seed: int, split: str) -> pd.DataFrame:
        draw = self._draws[task, cohort_seed]
        key = h1_share if (split, h1_share) in draw.orders else None
        orders = draw.orders[split, key]
        sizes = cell_sizes(h1_share, draw.sizes[split], self.settings.rounding)
        places = np.concatenate([orders[cell][: sizes[cell]] for cell in CELLS])
        labels = np.repeat(np.array([label for _, label in CELLS], np.int8), [sizes[cell] for cell in CELLS])
        arranged = np.argsort(places)
        frame = self._films.iloc[places[arranged]][["image_id", "patient_id", "source", "uri", "view"]]
        frame = frame.astype({"source": "str"}).reset_index(drop=True)
        return frame.assign(label=labels[arranged], role=split)


def build_cohorts(
    *,
    sources: Mapping[str, Source],
    tasks: Mapping[str, TaskSettings],
    cohort: CohortSettings,
    mixtures: Sequence[int],
    cohort_seeds: Sequence[int],
    study_seed: int,
    storage: Storage,
    unusable: Collection[str] = (),
    tables: tuple[SourceTable, SourceTable] | None = None,
) -> Cohorts:
    """Read the sources and draw every cohort.

    Parameters
    ----------
    sources : exactly two; the first is H1.
    unusable : image ids that turned out unreadable; they are left out and what remains is checked again.
    tables : the sources as read before, where they need not be read again.

    Raises
    ------
    StudyError : a source that cannot be read, or a cell with too few films (have/need).
    """
    tables = tables or read_tables(sources, cohort, storage)
    films = _films(tables)
    usable = ~films["image_id"].isin(set(unusable)).to_numpy() if unusable else np.ones(len(films), bool)
    labels = {
        task: np.concatenate([label_rows(t.rows, settings, t.name, cohort) for t in tables])
        for task, settings in tasks.items()
    }
    draws: dict[tuple[str, int], _Draw] = {}
    cells: list[Cell] = []
    for seed in cohort_seeds:
        split = np.concatenate([split_source(t, cohort.split_fractions, study_seed, seed).to_numpy() for t in tables])
        for task in tasks:
            pools = _Pools(films, split, labels[task], usable, cohort, (study_seed, task, seed))
            draws[task, seed], found = _draw(pools, tuple(mixtures), (tables[0].name, tables[1].name))
            cells += found
    refuse_shortage(cells, cohort, tasks)
    return Cohorts(tables, films, draws, cells, tuple(mixtures), cohort)


def read_tables(
    sources: Mapping[str, Source], cohort: CohortSettings, storage: Storage, drop_duplicates: bool = False
) -> tuple[SourceTable, SourceTable]:
    """Read both sources, H1 first; no film may belong to both.

    ``drop_duplicates``: rows whose image id stands in several rows are kept out of every cohort, not refused.
    """
    if len(sources) != 2:
        raise StudyError(
            f"a study has exactly two sources, got {len(sources)}", where="sources", remedy="name H1 and H2"
        )
    first, second = (read_source(name, source, cohort, storage, drop_duplicates) for name, source in sources.items())
    shared = second.rows["uri"].isin(first.rows["uri"])
    if shared.any():
        raise StudyError(
            f"{int(shared.sum())} films belong to both sources, for example {second.rows.loc[shared, 'uri'].iloc[0]}",
            where="sources",
            remedy="keep the hospitals apart: another root, or a `where` filter",
        )
    return first, second


def _films(tables: tuple[SourceTable, SourceTable]) -> pd.DataFrame:
    films = pd.concat([t.rows for t in tables], ignore_index=True)
    names = [t.name for t in tables]
    films["source"] = pd.Categorical(np.repeat(names, [len(t.rows) for t in tables]), categories=names)
    return films


@dataclass(frozen=True)
class _Pools:
    """The films that a cell may draw from, for one task and cohort seed."""

    films: pd.DataFrame
    split: np.ndarray
    labels: np.ndarray
    usable: np.ndarray
    settings: CohortSettings
    key: tuple[int, str, int]  # study seed, task, cohort seed

    @cached_property
    def patients(self) -> np.ndarray:
        return pd.factorize(self.films["patient_id"])[0]

    @cached_property
    def views(self) -> np.ndarray:
        return self.films["view"].to_numpy(object)

    def orders(self, split: str, h1_share: int | None) -> Orders:
        """Return the seeded order of every cell; of one mixture where these are drawn independently."""
        study_seed, task, cohort_seed = self.key
        mixture = () if h1_share is None else ("h1", h1_share)
        source = self.films["source"].cat.codes.to_numpy()
        made: Orders = {}
        for cell in CELLS:
            places = np.flatnonzero((self.split == split) & (source == cell[0]) & (self.labels == cell[1]))
            rng = stream(study_seed, "cohort", task, cohort_seed, split, cell[0], cell[1], *mixture)
            order = rng.permutation(places)
            order = order[self.usable[order]]
            if self.settings.max_per_patient is not None:
                order = keep_per_patient(order, self.patients, self.settings.max_per_patient)
            made[cell] = order
        if self.settings.match_view:
            matched = matched_orders([made[cell] for cell in CELLS], self.views)
            made = dict(zip(CELLS, matched, strict=True))
        return made


def _draw(pools: _Pools, mixtures: tuple[int, ...], names: tuple[str, str]) -> tuple[_Draw, list[Cell]]:
    settings, (_, task, cohort_seed) = pools.settings, pools.key
    sizes: dict[str, int] = {}
    kept: dict[tuple[str, int | None], Orders] = {}
    cells: list[Cell] = []
    for split in SPLITS:
        independent = settings.nesting == "independent" and split != "test"
        shares = tuple(TEST_SETS.values()) if split == "test" else mixtures
        orders = {x: pools.orders(split, x) for x in (mixtures if independent else (None,))}
        have = {cell: min(len(o[cell]) for o in orders.values()) for cell in CELLS}
        wanted, smallest = settings.wanted(split), min(have.values())
        n = smallest if wanted is None else min(wanted, smallest) if settings.shrink else wanted
        need = largest_cells(shares, n, settings.rounding)
        if n == 0:  # nothing can be drawn: every class of every source needs at least one film
            need = dict.fromkeys(CELLS, 1)
        if n and not all(
            sum(size for (_, label), size in cell_sizes(x, n, settings.rounding).items() if label) for x in shares
        ):
            raise StudyError(
                f"task {task}, {split}: {n} films per class leave a mixture without any",
                where="cohort.rounding",
                remedy=f"rounding: half_up, or more films per class in {split}",
            )
        sizes[split] = n
        for x, drawn in orders.items():
            kept[split, x] = {cell: order[:n] for cell, order in drawn.items()}
        for source, label in CELLS:
            places = kept[split, next(iter(orders))][source, label]
            patients = len(np.unique(pools.patients[places]))
            cells.append(
                Cell(task, cohort_seed, split, names[source], label, have[source, label], need[source, label], patients)
            )
    return _Draw(sizes, kept), cells
