"""Explaining a finished trial: the jobs "faithfulness" (AD/AI) and "prototypes" (maps, class maps, top-k).

In: the trial's directory, its rows and the shared pixels.  Out: files in ``explain/<job>-<hash of its settings>/``,
``done.json`` last.  Like a trial it knows no scheduler, may be stopped between any two images and goes on where it was;
its bytes follow from trial and settings alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pandas as pd
import pyarrow as pa
import torch

from raystudy.explanation_chunks import FOLDER, Pieces, Watch, exact_numerics
from raystudy.explanation_faithfulness import (
    Masks,
    PairMaker,
    balanced_order,
    faithfulness_test_set,
    mask_share_table,
    pairs_table,
)
from raystudy.explanation_jobs import Job, explained, job_directory, job_settings
from raystudy.explanation_prototypes import PrototypeJob, Sources, make_explainer
from raystudy.explanation_settings import ExplainSettings
from raystudy.images.array import ImageArray
from raystudy.relevance import unique_prototypes
from raystudy.results import DONE, PROTOTYPES, read_result, sealed, write_sealed
from raystudy.storage import Storage
from raystudy.trial import load_model
from raystudy.trial_spec import TrialSpec

SCHEMA = 1
IMAGES_PER_CHUNK = 16


def explain_trial(
    job: Job,
    spec: TrialSpec,
    cohort: pd.DataFrame,
    tests: pd.DataFrame,
    images: ImageArray,
    storage: Storage,
    settings: ExplainSettings,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    masks: Masks | None = None,
    chunk: int = IMAGES_PER_CHUNK,
) -> None:
    """Do one job of a finished trial, or the rest of it; a done one is left alone unless its files are damaged.

    Parameters
    ----------
    cohort, tests, images : as given to `run_trial`; the order of rows does not matter.
    storage : the trial's own directory.
    progress : called with (items done, items) after every piece.
    should_stop : asked between images.
    masks : ground truth, ``{image id: {kind: (S, S) bool}}`` (phantoms); the share of positive relevance inside each
        mask is then written to `mask_share.parquet`.
    chunk : images of a piece of AD/AI; no number depends on it.

    Raises
    ------
    TrialInterrupted : ``should_stop`` said so; finished pieces are kept.
    ValueError : the trial is not finished, or rows, pixels and settings do not fit together.
    """
    place = storage.child(*job_directory(job, settings).split("/"))
    if explained(job, storage, settings):
        return
    place.delete(DONE)  # of damaged files
    result = read_result(storage)
    if result is None or result["status"] != "finished":
        raise ValueError(f"only a finished trial can be explained: {spec.trial_id}")
    if images.size != spec.image_size:
        raise ValueError(f"the trial has images of {spec.image_size} px, the image array holds {images.size} px")
    chosen = job_settings(job, settings)
    identity = {"schema": SCHEMA, "job": job, "settings": chosen, "trial": result["checksum"]}
    identity |= {"masks": masks is not None}
    device = torch.device(device)
    watch = Watch(progress, should_stop)
    with exact_numerics(spec.training.threads, device):
        model = load_model(storage, device)
        sources = _sources(storage)
        unique = unique_prototypes(sources.image_ids, sources.rows, sources.cols, model.prototypes, sources.classes)
        explainer = make_explainer(model, settings)
        if job == "faithfulness":
            maker = PairMaker(model, explainer, unique, settings, spec.study_seed, device)
            done = _faithfulness(maker, spec, tests, images, place, identity, watch, masks, chunk)
        else:
            ids = sorted(str(i) for i in cohort.loc[cohort["role"] == "train", "image_id"])
            frozen = spec.training.last_layer_bn == "frozen"
            work = PrototypeJob(
                model, explainer, unique, sources, ids, images, settings, spec.study_seed, device, frozen
            )
            done = _prototypes(work, place, identity, watch, masks)
    files = [name for name in place.list() if name.split("/")[0] not in (DONE, FOLDER, "failed.json")]
    write_sealed(place, DONE, {**identity, **done, "trial_id": spec.trial_id}, files)
    place.delete_tree(FOLDER)


def _faithfulness(
    maker: PairMaker,
    spec: TrialSpec,
    tests: pd.DataFrame,
    images: ImageArray,
    place: Storage,
    identity: dict[str, Any],
    watch: Watch,
    masks: Masks | None,
    chunk: int,
) -> dict[str, Any]:
    test_set = faithfulness_test_set(spec.h1_share)
    available = tests[tests["test_set"] == test_set]
    if not len(available):
        raise ValueError(f"AD/AI at {spec.h1_share} % needs the test set {test_set}, which has no images")
    table = balanced_order(available, maker.study_seed, spec.task)
    table = table if maker.settings.adai_images is None else table.head(maker.settings.adai_images)
    lines = table.to_dict("records")
    films = images.take(table["image_id"])
    pieces = Pieces(place, identity, len(lines), watch)

    def compute(part: range) -> bytes:
        rows: list[dict[str, object]] = []
        for i in part:
            pieces.item()
            rows += maker.rows({str(k): v for k, v in lines[i].items()}, films[i], masks)
        return json.dumps(rows).encode()

    parts = pieces.run("pairs", len(lines), chunk, compute)
    rows = [row for part in parts for row in json.loads(part)]
    pairs = pairs_table(rows)
    place.write_table("pairs.parquet", pairs)
    if masks is not None:
        place.write_table("mask_share.parquet", mask_share_table(rows, masks))
    per_draw = [r for r in rows if r["draw"] == 0 and r["method"] == "prp"]
    return {
        "test_set": test_set,
        "n_images": len(lines),
        "n_images_available": len(available),
        "n_pairs": sum(int(r["multiplicity"]) for r in per_draw),
        "n_unique_pairs": len(per_draw),
        "n_prototypes": len(maker.unique),
    }


def _prototypes(
    work: PrototypeJob, place: Storage, identity: dict[str, Any], watch: Watch, masks: Masks | None
) -> dict[str, Any]:
    files, counts = work.files(Pieces(place, identity, work.items, watch), masks)
    for name, content in files.items():
        if isinstance(content, bytes):
            place.write_bytes(name, content)
        elif isinstance(content, pa.Table):
            place.write_table(name, content)
        else:
            place.write_json(name, content)
    return {**counts, "superposition": work.settings.superposition, "prp_scale": work.settings.prp_scale}


def _sources(storage: Storage) -> Sources:
    table = sealed(storage).read_table(PROTOTYPES).sort_by("prototype")
    columns = {name: table.column(name).to_pylist() for name in ("image_id", "row", "col", "class")}
    return Sources(columns["image_id"], columns["row"], columns["col"], columns["class"])
