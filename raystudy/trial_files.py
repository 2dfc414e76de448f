"""The files that a trial leaves: model, prototypes, predictions and, last, result.json (DESIGN.md, study directory).

result.json carries the SHA-256 of the three others and of itself (``raystudy.results`` reads them back).
All bytes follow from the values alone: no times, hosts, devices, paths or versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from raystudy.errors import DamagedFileError, StudyError
from raystudy.results import MODEL, PREDICTIONS, PROTOTYPES, RESULT, RESULT_SCHEMA, SPEC, sealed, write_sealed
from raystudy.storage import Storage, json_bytes
from raystudy.trial_spec import TrialSpec

if TYPE_CHECKING:
    from torch import Tensor

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
    """Write spec.json, or check that the directory belongs to this very trial; a damaged file is written anew.

    Raises
    ------
    StudyError : the directory holds another trial, or one of a newer raystudy.
    """
    wanted = json_bytes(spec.to_json())
    try:
        found = storage.read_bytes(SPEC)
        if found == wanted:
            return
        kept = _parsed_spec(storage, found)
    except (FileNotFoundError, DamagedFileError):
        kept = spec
    if kept.fingerprint() != spec.fingerprint():
        remedy = "delete the directory, or run the experiment that it belongs to"
        raise StudyError("the directory holds another trial", where=storage.address(SPEC), remedy=remedy)
    storage.write_bytes(SPEC, wanted)


def read_spec(storage: Storage) -> TrialSpec:
    """Return the spec of a trial's directory."""
    return _parsed_spec(storage, storage.read_bytes(SPEC))


def _parsed_spec(storage: Storage, data: bytes) -> TrialSpec:
    try:
        return TrialSpec.from_json(data)
    except StudyError as error:
        raise type(error)(error.what, where=storage.address(SPEC), remedy=error.remedy) from error


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
    import safetensors.torch  # torch: who writes or reads the other files alone does not wait for it

    storage.write_bytes(MODEL, safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in state.items()}))


def write_result(storage: Storage, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write result.json, which makes the trial a finished one, and return it as it will be read."""
    names = [n for n in (MODEL, PROTOTYPES, PREDICTIONS) if storage.exists(n)] if result["status"] == "finished" else []
    write_sealed(storage, RESULT, {"schema": RESULT_SCHEMA, **result}, names)
    return storage.read_json(RESULT)


def read_model(storage: Storage) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors, checked against result.json where that exists."""
    import safetensors.torch

    return safetensors.torch.load(sealed(storage).read_bytes(MODEL))
