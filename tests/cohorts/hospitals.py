"""Small hospitals for the tests of this room: random tables in memory, and tables on disk."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import TypeAdapter

from raystudy.cohorts.build import Cohorts, build_cohorts, read_tables
from raystudy.cohorts.settings import CohortSettings, Source, TaskSettings
from raystudy.cohorts.tables import SourceTable
from raystudy.cohorts.vocabulary import bits
from raystudy.storage import open_storage

SHARED = Path(os.environ.get("RAYSTUDY_SHARED", Path(__file__).parents[3] / "shared"))
TASKS = {"pneumonia": TaskSettings(), "abnormality": TaskSettings(positive="any_pathology")}
KINDS = (["pneumonia"], ["effusion"], ["no_finding"], ["pneumonia", "edema"], [], ["no_finding", "support_devices"])


def shared(*parts: str) -> Path:
    """Return a path of the shared real data, or skip the test by name."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the real tables are not at hand: {'/'.join(parts)} (RAYSTUDY_SHARED)")
    return path


def source(**settings: Any) -> Source:
    """Return the validated settings of one source."""
    return TypeAdapter(Source).validate_python(settings)


def hospital(name: str, seed: int, patients: int = 90, most_films: int = 4, split: bool = False) -> SourceTable:
    """Return a hospital whose patients have 1…most_films films with random findings and views."""
    rng = np.random.default_rng(seed)
    splits = rng.choice(["train", "val", "test"], patients, p=[0.6, 0.2, 0.2])
    rows: list[dict[str, object]] = []
    for patient in range(patients):
        for film in range(int(rng.integers(1, most_films + 1))):
            kind = KINDS[int(rng.integers(len(KINDS)))]
            rows.append(
                {
                    "image_id": f"{name}/p{patient:04d}_{film}.png",
                    "patient_id": f"{name}:p{patient:04d}",
                    "uri": f"/films/{name}/p{patient:04d}_{film}.png",
                    "view": ["AP", "PA", "LATERAL", ""][int(rng.integers(4))],
                    "found": bits(kind),
                    "uncertain": bits(["pneumonia"]) if kind == ["effusion"] and rng.random() < 0.3 else 0,
                    "negated": bits(["pneumonia"]) if "pneumonia" not in kind and rng.random() < 0.2 else 0,
                    "split": splits[patient] if split else "",
                }
            )
    return SourceTable(name, pd.DataFrame(rows))


def draw(
    tables: tuple[SourceTable, SourceTable],
    tasks: dict[str, TaskSettings] | None = None,
    mixtures: tuple[int, ...] = (0, 50, 100),
    cohort_seeds: tuple[int, ...] = (0,),
    study_seed: int = 0,
    unusable: tuple[str, ...] = (),
    **settings: Any,
) -> Cohorts:
    """Build the cohorts of tables that are in memory already."""
    phantom = source(kind="phantom")
    return build_cohorts(
        sources={t.name: phantom for t in tables},
        tasks=tasks or TASKS,
        cohort=CohortSettings(**settings),
        mixtures=mixtures,
        cohort_seeds=cohort_seeds,
        study_seed=study_seed,
        storage=open_storage("nowhere"),
        unusable=unusable,
        tables=tables,
    )


def films_of(name: str, patients: int = 30) -> pd.DataFrame:
    """Return a clean manifest as a hospital would send it: 2 films a patient; thirds of pneumonia, effusion, normal."""
    findings = ["Pneumonia", "Effusion|Edema", "No Finding"]
    return pd.DataFrame(
        [
            {
                "file": f"{name}/p{p:03d}_{k}.png",
                "patient": f"p{p:03d}",
                "view": "PA" if k else "AP",
                "findings": findings[(p + k) % 3],
                "pneumonia": str(int((p + k) % 3 == 0)),
                "split": ["train", "train", "val", "test", "test"][p % 5],
                "note": "as sent",
            }
            for p in range(patients)
            for k in range(2)
        ]
    )


def real_sources() -> dict[str, Source]:
    """Return the settings of the real NIH and CheXpert tables."""
    root = str(shared("data", "metadata"))
    return {
        "H1": source(kind="nih", root=root, table="nih_Data_Entry_2017_v2020.csv.gz"),
        "H2": source(kind="chexpert", root=root, train="chexpert_train.csv.gz", valid="chexpert_valid.csv.gz"),
    }


@cache
def real_tables() -> tuple[SourceTable, SourceTable]:
    """Return the real tables, read once."""
    return read_tables(real_sources(), CohortSettings(), open_storage("nowhere"))


COLUMNS = {"image": "file", "patient": "patient", "view": "view", "findings": "findings", "split": "split"}


def manifest(root: Path | str, table: str, **changes: Any) -> Source:
    """Return the settings of a manifest written from ``films_of``."""
    return source(**{"kind": "manifest", "root": str(root), "table": table, "columns": COLUMNS, **changes})


def build(sources: dict[str, Source], tasks: dict[str, TaskSettings] | None = None, **settings: Any) -> Cohorts:
    """Build the cohorts of sources on disk."""
    return build_cohorts(
        sources=sources,
        tasks=tasks or TASKS,
        cohort=CohortSettings(**settings),
        mixtures=(0, 30, 50, 100),
        cohort_seeds=(0,),
        study_seed=0,
        storage=open_storage("nowhere"),
    )
