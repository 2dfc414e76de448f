"""The pixels of the trials that are about to run: prepared, loaded once, shared with all workers by reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from raystudy.errors import StudyError
from raystudy.images.array import ImageArray
from raystudy.images.prepare import Prepared, prepare_images
from raystudy.images.settings import ImageSettings
from raystudy.images.store import load_pixels
from raystudy.orchestrate.plan import PlannedTrial
from raystudy.orchestrate.progress import Display
from raystudy.storage import Storage


@dataclass
class Films:
    """Prepared films by decode settings."""

    prepared: dict[ImageSettings, Prepared] = field(default_factory=dict)
    arrays: dict[str, ImageArray] = field(default_factory=dict)

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
        return sum(len(p.quarantine) for p in self.prepared.values())


def prepare_films(trials: Sequence[PlannedTrial], image_table: pd.DataFrame, storage: Storage, shown: Display) -> Films:
    """Decode what the image store lacks and load the films of these trials.

    Raises
    ------
    StudyError : films that cannot be read, named.
    """
    films = Films()
    for settings in dict.fromkeys(t.images for t in trials):
        prepared = prepare_images(
            image_table,
            settings,
            storage,
            lambda done, n, speed: shown.count("images", done, n, f"{speed:.0f} a second"),
        )
        _check_quarantine(prepared, settings, storage)
        films.prepared[settings] = prepared
        used = [t for t in trials if t.images == settings]
        ids = sorted({i for t in used for frame in (t.cohort, t.tests) for i in frame["image_id"]})
        films.arrays[prepared.key] = load_pixels(storage, prepared.key, ids)
    return films


def _check_quarantine(prepared: Prepared, settings: ImageSettings, storage: Storage) -> None:
    bad = prepared.quarantine
    if bad.empty or settings.unreadable == "drop":
        return
    first = [f"{row.image_id} ({row.reason})" for row in bad.head(5).itertuples()]
    more = f", … and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise StudyError(
        f"{len(bad)} images cannot be used: {', '.join(first)}{more}",
        where=storage.address(f"_images/{prepared.key}/quarantine.parquet"),
        remedy="mend or remove them, or leave them out with --set images.unreadable=drop",
    )
