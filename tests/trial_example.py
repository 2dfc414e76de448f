"""A trial of a few seconds: 48 synthetic films of two hospitals, ResNet18 cut after layer2, three epochs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raystudy.images.array import ImageArray
from raystudy.protopnet.settings import ModelSettings, TrainingSettings
from raystudy.storage import Storage
from raystudy.streams import stream
from raystudy.trial import TrialSpec

SIZE = 32
FILES = ("model.safetensors", "predictions.parquet", "prototypes.parquet", "result.json")
TRAINING = TrainingSettings(
    epochs=4, warm_epochs=1, projection_interval=2, last_layer_epochs=3, batch_size=8, evaluation_batch_size=10,
    lr_backbone=1e-3, schedule="constant", lr_last_layer=1e-2,
)  # fmt: skip
MODEL = ModelSettings(backbone="resnet18", weights="none", prototypes_per_class=3, prototype_dim=8, backbone_layers=2)


def spec(training: dict[str, Any] | None = None, **more: Any) -> TrialSpec:
    values: dict[str, Any] = {
        "study": "example", "trial_id": "pneumonia-h1_060-seed0-abcdef", "task": "pneumonia",
        "class_names": ("No pneumonia", "Pneumonia"), "h1_share": 60, "seed": 0, "cohort_seed": 0, "study_seed": 7,
        "model": MODEL, "training": dataclasses.replace(TRAINING, **(training or {})), "image_size": SIZE,
        "cohort_sha256": "0" * 64, "numerics_version": 1,
    }  # fmt: skip
    return TrialSpec(**{**values, **more})


def data() -> tuple[pd.DataFrame, pd.DataFrame, ImageArray]:
    """Return cohort (30 train, 14 val), tests (16 films in two sets, 8 of them in both) and read-only pixels."""
    draw = stream(0, "example films")
    rows: list[dict[str, Any]] = []
    for i in range(60):
        source, label = ("H1", "H2")[i // 30], i % 2
        role = ["train", "val", "test"][0 if i % 30 < 15 else 1 if i % 30 < 22 else 2]
        image_id = f"{source}/{i:03d}.png"
        rows.append({"image_id": image_id, "patient_id": f"{source}:{i}", "source": source, "uri": f"{i}.png"}
                    | {"view": "PA", "label": np.int8(label), "role": role})  # fmt: skip
    frame = pd.DataFrame(rows)
    pixels = draw.integers(0, 120, (60, SIZE, SIZE), dtype=np.uint8)
    for i, row in enumerate(rows):
        pixels[i, 4 + 12 * row["label"] : 16 + 12 * row["label"], 4:16] += 100
    pixels.flags.writeable = False
    images = ImageArray(tuple(reversed(frame["image_id"])), pixels[::-1])
    tests = frame[frame["role"] == "test"]
    h1 = tests[tests["source"] == "H1"].assign(test_set="Test-100H1")
    tests = pd.concat([h1, tests.assign(test_set="Test-50-50")], ignore_index=True)
    return frame[frame["role"] != "test"].reset_index(drop=True), tests, images


def contents(storage: Storage | Path) -> dict[str, bytes]:
    """Return the bytes of the files that must not depend on how a trial came to its end."""
    root = Path(storage.uri) if isinstance(storage, Storage) else storage
    return {name: (root / name).read_bytes() for name in FILES}
