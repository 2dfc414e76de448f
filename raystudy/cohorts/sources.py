"""One door to all source readers: settings of a source in, its checked rows out."""

from __future__ import annotations

import pandas as pd

from raystudy.cohorts.chexpert import read_chexpert
from raystudy.cohorts.dicom import read_dicom
from raystudy.cohorts.manifest import read_manifest
from raystudy.cohorts.nih import read_nih
from raystudy.cohorts.phantom import films_storage, phantom_table
from raystudy.cohorts.settings import ChexpertSource, CohortSettings, ManifestSource, NihSource, PhantomSource, Source
from raystudy.cohorts.tables import SourceTable, checked_rows
from raystudy.cohorts.vocabulary import bits, canonical_finding
from raystudy.storage import Storage


def read_source(
    name: str, source: Source, cohort: CohortSettings, storage: Storage, drop_duplicates: bool = False
) -> SourceTable:
    """Read and check the rows of one source.

    Parameters
    ----------
    name : the source's key in the experiment file.
    storage : the root of the studies; phantoms' originals lie below it.
    drop_duplicates : rows whose image id stands in several rows are kept out of every cohort, not refused.

    Raises
    ------
    StudyError : a table that cannot be read or rows that break a rule.
    """
    if isinstance(source, ManifestSource):
        return read_manifest(name, source, drop_duplicates)
    if isinstance(source, PhantomSource):
        return _phantom(name, source, storage)
    if isinstance(source, NihSource):
        return read_nih(name, source, cohort, drop_duplicates)
    if isinstance(source, ChexpertSource):
        return read_chexpert(name, source, cohort, drop_duplicates)
    return read_dicom(name, source, drop_duplicates)


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
