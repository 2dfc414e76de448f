"""The files that a trial leaves: model, prototypes, predictions and, last, result.json (DESIGN.md, study directory).

result.json carries the SHA-256 of the three others and of itself, so that a flipped bit is named and never believed.
All bytes follow from the values alone: no times, hosts, devices, paths or versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import safetensors.torch
from numpy.typing import NDArray
from torch import Tensor

from raystudy.errors import StudyError
from raystudy.storage import Storage
from raystudy.trial_spec import TrialSpec

RESULT_SCHEMA = 1
SPEC, RESULT = "spec.json", "result.json"
MODEL, PROTOTYPES, PREDICTIONS = "model.safetensors", "prototypes.parquet", "predictions.parquet"

PREDICTION_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("patient_id", pa.string()),
        ("source", pa.string()),
        ("label", pa.int8()),
        ("test_set", pa.string()),
        ("logit_0", pa.float32()),
        ("logit_1", pa.float32()),
        ("predicted", pa.int8()),
    ]
)
PROTOTYPE_SCHEMA = pa.schema(
    [
        ("prototype", pa.int32()),
        ("class", pa.int8()),
        ("image_id", pa.string()),
        ("patient_id", pa.string()),
        ("source", pa.string()),
        ("row", pa.int32()),
        ("col", pa.int32()),
        ("distance", pa.float32()),
        ("duplicate_of", pa.int32()),
    ]
)


def keep_spec(storage: Storage, spec: TrialSpec) -> None:
    """Write spec.json, or check that the directory belongs to this very trial."""
    try:
        kept = TrialSpec.from_json(storage.read_bytes(SPEC))
    except FileNotFoundError:
        storage.write_json(SPEC, spec.to_json())
        return
    if kept.fingerprint() != spec.fingerprint():
        remedy = "delete the directory, or run the experiment that it belongs to"
        raise StudyError("the directory holds another trial", where=storage.address(SPEC), remedy=remedy)


def read_spec(storage: Storage) -> TrialSpec:
    """Return the spec of a trial's directory."""
    return TrialSpec.from_json(storage.read_bytes(SPEC))


def prediction_table(tests: pd.DataFrame, image_ids: list[str], logits: NDArray[np.float32]) -> pa.Table:
    """Return one row per (image, test set), by test set and image id.

    Parameters
    ----------
    tests : the rows, an image once per test set that it belongs to.
    image_ids, logits : N distinct films and their (N, 2) logits.  Equal logits predict class 0.
    """
    of_image = pd.DataFrame(
        {
            "image_id": image_ids,
            "logit_0": logits[:, 0],
            "logit_1": logits[:, 1],
            "predicted": logits.argmax(axis=1).astype(np.int8),
        }
    )
    rows = tests.merge(of_image, on="image_id", validate="many_to_one").sort_values(["test_set", "image_id"])
    return pa.Table.from_pandas(rows, schema=PREDICTION_SCHEMA, preserve_index=False).replace_schema_metadata(None)


def prototype_table(record: Mapping[str, Any], per_class: int, rows: pd.DataFrame) -> pa.Table:
    """Return one row per prototype: the training patch it was projected onto.

    ``duplicate_of`` names the first prototype with the same patch; for that first one it is the prototype itself.

    Parameters
    ----------
    record : image_ids, rows, cols, distances, duplicate_of of the P prototypes.
    per_class : prototypes of each class; class 0's come first.
    rows : the training films.
    """
    frame = pd.DataFrame(
        {
            "image_id": record["image_ids"],
            "row": record["rows"],
            "col": record["cols"],
            "distance": np.asarray(record["distances"], np.float32),
            "duplicate_of": record["duplicate_of"],
        }
    )
    frame["prototype"] = np.arange(len(frame))
    frame["class"] = frame["prototype"] // per_class
    frame = frame.merge(rows[["image_id", "patient_id", "source"]], on="image_id", how="left", validate="many_to_one")
    return pa.Table.from_pandas(frame, schema=PROTOTYPE_SCHEMA, preserve_index=False).replace_schema_metadata(None)


def accuracy_by_test_set(predictions: pa.Table) -> dict[str, dict[str, float | int]]:
    """Return n, correct and accuracy (0-100) of each test set."""
    frame = predictions.to_pandas()
    found: dict[str, dict[str, float | int]] = {}
    for name, rows in frame.groupby("test_set", sort=True):
        n, correct = len(rows), int((rows["label"] == rows["predicted"]).sum())
        found[str(name)] = {"n": n, "correct": correct, "accuracy": 100 * correct / n}
    return found


def write_model(storage: Storage, state: Mapping[str, Tensor]) -> None:
    """Write model.safetensors: parameters and batch norm statistics under the network's names."""
    storage.write_bytes(MODEL, safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in state.items()}))


def write_result(storage: Storage, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write result.json, which makes the trial a finished one, and return it as it will be read."""
    names = [n for n in (MODEL, PROTOTYPES, PREDICTIONS) if storage.exists(n)] if result["status"] == "finished" else []
    files = {name: hashlib.sha256(storage.read_bytes(name)).hexdigest() for name in names}
    body = {"schema": RESULT_SCHEMA, **result, "sha256": files}
    storage.write_json(RESULT, {**body, "checksum": _checksum(body)})
    return storage.read_json(RESULT)


def read_result(storage: Storage) -> dict[str, Any] | None:
    """Return result.json of a trial's directory, or None when the trial is not finished.

    Raises
    ------
    StudyError : the file is damaged, or from a newer raystudy.
    """
    try:
        data = storage.read_bytes(RESULT)
    except FileNotFoundError:
        return None
    where = storage.address(RESULT)
    try:
        result = json.loads(data)
        checksum = result.pop("checksum")
        if int(result["schema"]) > RESULT_SCHEMA:
            raise StudyError(
                "this result was written by a newer raystudy", where=where, remedy="install the newer raystudy"
            )
        if checksum != _checksum(result):
            raise ValueError("it does not match its checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "delete this file and run again: the trial is then trained anew"
        raise StudyError(f"the result is damaged: {error}", where=where, remedy=remedy) from error
    return {**result, "checksum": checksum}


def read_model(storage: Storage) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors, checked against result.json where that exists."""
    data = storage.read_bytes(MODEL)
    result = read_result(storage)
    if result is not None and hashlib.sha256(data).hexdigest() != result["sha256"].get(MODEL):
        remedy = "delete result.json of this trial and run again: the trial is then trained anew"
        raise StudyError("the model does not match its result", where=storage.address(MODEL), remedy=remedy)
    return safetensors.torch.load(data)


def damaged_files(storage: Storage) -> list[str]:
    """Return the files of a finished trial that are missing or do not match result.json."""
    result = read_result(storage)
    damaged: list[str] = []
    for name, sha256 in (result or {"sha256": {}})["sha256"].items():
        try:
            whole = hashlib.sha256(storage.read_bytes(name)).hexdigest() == sha256
        except FileNotFoundError:
            whole = False
        if not whole:
            damaged.append(name)
    return damaged


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()
