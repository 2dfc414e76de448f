"""One door to all source readers: settings of a source in, its checked rows out."""

from __future__ import annotations

import pandas as pd

from raystudy.cohorts.manifest import read_manifest
from raystudy.cohorts.phantom import films_storage, phantom_table
from raystudy.cohorts.settings import CohortSettings, ManifestSource, PhantomSource, Source
from raystudy.cohorts.tables import SourceTable, checked_rows
from raystudy.cohorts.vocabulary import bits, canonical_finding
from raystudy.storage import Storage


def read_source(name: str, source: Source, cohort: CohortSettings, storage: Storage) -> SourceTable:
    """Read and check the rows of one source.

    Parameters
    ----------
    name : the source's key in the experiment file.
    storage : the root of the studies; phantoms' originals lie below it.

    Raises
    ------
    StudyError : a table that cannot be read or rows that break a rule.
    """
    if isinstance(source, ManifestSource):
        return read_manifest(name, source)
    if isinstance(source, PhantomSource):
        return _phantom(name, source, storage)
    raise NotImplementedError(source.kind)


def _phantom(name: str, source: PhantomSource, storage: Storage) -> SourceTable:
    table = phantom_table(source.settings, name, storage)
    folder = films_storage(source.settings, name, storage)
    original = table["image_id"].str.removeprefix(f"{name}/")
    raw = pd.DataFrame(
        {
            "path": original,
            "original": original,
            "patient": table["patient_id"].str.removeprefix(f"{name}:"),
            "view": table["view"],
            "split": table["split"],
            "found": _masks(table["findings"]),
            "uncertain": _masks(table["uncertain"]),
            "negated": 0,
        }
    )
    where = f"phantom hospital {name}"
    return SourceTable(name, checked_rows(name, raw, folder, where), (f"{len(raw)} synthetic films",))


def _masks(findings: pd.Series) -> list[int]:
    return [bits(f for f in map(canonical_finding, row) if f is not None) for row in findings]
