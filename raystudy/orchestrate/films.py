"""The pixels of the trials that are about to run: prepared, loaded once, shared with all workers by reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd

from raystudy.config import Experiment
from raystudy.errors import StudyError
from raystudy.images.array import ImageArray
from raystudy.images.prepare import Prepared, prepare_images
from raystudy.images.settings import ImageSettings
from raystudy.images.stream import open_pixels
from raystudy.orchestrate.phantoms import write_phantom_originals
from raystudy.orchestrate.plan import PlannedTrial, StudyPlan, plan_study
from raystudy.orchestrate.progress import Display
from raystudy.storage import Storage


@dataclass
class Films:
    """Prepared films by decode settings; ``left_out``: how many the plan does without, as they cannot be read."""

    prepared: dict[ImageSettings, Prepared] = field(default_factory=dict)
    arrays: dict[str, ImageArray] = field(default_factory=dict)
    left_out: int = 0

    def key(self, trial: PlannedTrial) -> str:
        """Return the name of the array that holds a trial's films."""
        return self.prepared[trial.images].key

    def array(self, trial: PlannedTrial) -> ImageArray:
        return self.arrays[self.key(trial)]

    def shared(self) -> dict[str, Any]:
        """Put every array into Ray's object store, owned by this process; workers read it without a copy."""
        import ray

        references = {key: ray.put(array) for key, array in self.arrays.items()}
        self.arrays.clear()
        return references

    @property
    def quarantined(self) -> int:
        return self.left_out + sum(len(p.quarantine) for p in self.prepared.values())


def prepare_films(trials: Sequence[PlannedTrial], image_table: pd.DataFrame, storage: Storage, shown: Display) -> Films:
    """Decode what the image store lacks and load the films of these trials.

    Raises
    ------
    StudyError : films that cannot be read, named.
    """
    films = Films()
    for settings in dict.fromkeys(t.images for t in trials):
        prepared = _prepare(image_table, settings, storage, shown)
        _check_quarantine(prepared, settings, storage)
        films.prepared[settings] = prepared
        used = [t for t in trials if t.images == settings]
        ids = sorted({i for t in used for frame in (t.cohort, t.tests) for i in frame["image_id"]})
        films.arrays[prepared.key] = open_pixels(storage, prepared.key, ids, settings.node_memory_share)
    return films


def plan_readable(experiment: Experiment, storage: Storage, shown: Display) -> StudyPlan:
    """Plan a study of the films that can be read; what is drawn in the place of others is looked at, too.

    Raises
    ------
    StudyError : too few readable films (have/need).
    """
    unusable: set[str] = set()
    while True:
        plan = plan_study(experiment, storage, unusable)
        twice = plan.duplicates[~plan.duplicates["image_id"].isin(unusable)]  # told and quarantined once
        write_phantom_originals(experiment, plan.image_table, storage, shown)
        found: set[str] = set()
        for settings in dict.fromkeys(t.images for t in plan.trials):
            prepared = _prepare(pd.concat([plan.image_table, twice]), settings, storage, shown)
            if len(prepared.quarantine):
                found |= set(prepared.quarantine["image_id"])
                where = storage.address(f"_images/{prepared.key}/quarantine.parquet")
                shown.say(f"{_named(prepared.quarantine, 'cannot be used and are left out')}; listed in {where}")
        if not found:
            return plan
        unusable |= found


def _prepare(table: pd.DataFrame, settings: ImageSettings, storage: Storage, shown: Display) -> Prepared:
    return prepare_images(table, settings, storage, partial(_show, shown))


def _show(shown: Display, done: int, total: int, images_per_second: float) -> None:
    shown.count("images", done, total, f"{images_per_second:.0f} a second")


def _check_quarantine(prepared: Prepared, settings: ImageSettings, storage: Storage) -> None:
    bad = prepared.quarantine
    if bad.empty or settings.unreadable == "drop":
        return
    raise StudyError(
        _named(bad, "cannot be used"),
        where=storage.address(f"_images/{prepared.key}/quarantine.parquet"),
        remedy="mend or remove them, or leave them out with --set images.unreadable=drop",
    )


def _named(bad: pd.DataFrame, what: str) -> str:
    """Return how many films a quarantine holds and the first of them with their reasons."""
    first = [f"{row.image_id} ({row.reason})" for row in bad.head(5).itertuples()]
    more = f", … and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"{len(bad)} images {what}: {', '.join(first)}{more}"
