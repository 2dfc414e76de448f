"""A study of a few seconds: two manifest hospitals of 32 px films on disk, small networks, short schedules."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from PIL import Image

from raystudy.config import Experiment, load_experiment
from raystudy.orchestrate.assignment import Work
from raystudy.orchestrate.driver import Outcome, run_study
from raystudy.orchestrate.plan import StudyPlan, plan_study
from raystudy.storage import Storage, open_storage
from raystudy.streams import stream

PER_CELL = 40  # films of a source and class
RESULTS = ("model.safetensors", "predictions.parquet", "prototypes.parquet", "result.json")


def make_films(root: Path) -> Path:
    """Write the films and their table; the disease is a bright square, the hospital a tone."""
    draw, rows = stream(5, "tiny films"), []
    for h, source in enumerate(("north", "south")):
        for i in range(2 * PER_CELL):
            label, name = i % 2, f"{source}-{i:03d}.png"
            pixels = draw.integers(0, 80, (32, 32)) + 40 * h
            pixels[4 : 14 + 10 * label, 4 : 14 + 10 * label] += 100
            (root / "films").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype("uint8")).save(root / "films" / name)
            finding = "Pneumonia" if label else "Effusion"
            split = ("train", "train", "val", "test")[i // 2 % 4]
            rows.append({"file": f"films/{name}", "patient": f"{source}{i}", "split": split})
            rows[-1] |= {"hospital": source, "finding": finding}
    pd.DataFrame(rows).to_csv(root / "table.csv", index=False)
    return root


def experiment_file(root: Path, storage: str | Path, **more: Any) -> Path:
    """Write an experiment of three mixtures on the films below ``root``."""
    if not (root / "table.csv").exists():
        make_films(root)
    columns = {"image": "file", "patient": "patient", "findings": "finding", "split": "split"}
    source = {"kind": "manifest", "root": str(root), "table": "table.csv", "columns": columns}
    tree: dict[str, Any] = {
        "name": "tiny",
        "storage": str(storage),
        "sources": {
            "H1": {**source, "where": {"hospital": "north"}},
            "H2": {**source, "where": {"hospital": "south"}},
        },
        "tasks": {"pneumonia": {"positive": "pneumonia", "negatives": "other_pathology"}},
        "cohort": {"train": 12, "val": 6, "test": 6},
        "mixtures": [0, 50, 100],
        "images": {"size": 32},
        "model": {
            "backbone": "resnet18",
            "weights": "none",
            "prototypes_per_class": 2,
            "prototype_dim": 8,
            "backbone_layers": 2,
        },
        "training": {
            "epochs": 2,
            "warm_epochs": 1,
            "projection_interval": 2,
            "last_layer_epochs": 2,
            "batch_size": 8,
            "schedule": "constant",
            "lr_backbone": 1e-3,
        },
        "explain": {"adai_images": 4, "top_k": 2},
        "tracking": {"enabled": False},
        **more,
    }
    path = root / "experiment.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def experiment(root: Path, storage: str | Path, overrides: list[str] | None = None, **more: Any) -> Experiment:
    return load_experiment(experiment_file(root, storage, **more), overrides or [])


def planned(
    films: Path, storage: Path, overrides: list[str] | None = None, **more: object
) -> tuple[StudyPlan, Storage]:
    found = experiment(films, storage, overrides, **more)
    root = open_storage(storage)
    return plan_study(found, root), root


def run(
    films: Path, storage: Path, overrides: list[str] | None = None, work: Work | None = None, **more: object
) -> Outcome:
    plan, root = planned(films, storage, overrides)
    return run_study(plan, root, work=work, **more)


def result_bytes(storage: str | Path, name: str = "tiny") -> dict[str, bytes]:
    """Return the bytes of every result and explanation of a study, by path."""
    place = open_storage(storage).child(name)
    names = [n for n in place.list("trials") if n.rsplit("/", 1)[-1] in RESULTS or "/explain/" in n]
    return {n: place.read_bytes(n) for n in names}


def kinds(paths: dict[str, bytes]) -> Counter[str]:
    return Counter(p.rsplit("/", 1)[-1] for p in paths)
