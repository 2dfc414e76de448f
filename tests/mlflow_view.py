"""What an MLflow store holds of a study, and what it should hold, worked out from the study directory alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.tracking import MlflowClient

from raystudy.study import Study
from raystudy.tracking_identity import ID_FILE

LOSSES = ("loss", "cross_entropy", "cluster", "separation", "l1", "train_accuracy", "val_accuracy", "val_cross_entropy")
Datum = tuple[str, str, int, float]  # trial, metric, step, value


def runs(uri: str, experiment: str) -> list[Any]:
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id], max_results=1000)) if found else []


def numbers(uri: str, experiment: str) -> Counter[Datum]:
    """Return every point of every metric of every run, with how often it is there."""
    client = MlflowClient(tracking_uri=uri)
    points: Counter[Datum] = Counter()
    for run in runs(uri, experiment):
        for key in run.data.metrics:
            for m in client.get_metric_history(run.info.run_id, key):
                points[run.data.tags["raystudy.trial_id"], key, m.step, round(m.value, 9)] += 1
    return points


def expected_numbers(study: Study) -> Counter[Datum]:
    """Return what a study's files say, each once: epochs, results, and AD/AI as the report's table has them."""
    points: set[Datum] = set()
    table = pd.read_csv(Path(study.storage.uri) / "report/tables/faithfulness.csv")
    for trial_id in study.trial_ids():
        directory = study.trial(trial_id)
        for event in directory.read_events("events"):
            prefix = {"epoch": "", "projection": "projection_", "last_layer": "last_layer_"}.get(event["event"])
            if prefix is None:
                continue
            keys = [(f"{prefix}{k}", k) for k in LOSSES]
            keys += [("images_per_second", "images_per_second")] if event["event"] == "epoch" else []
            points |= {(trial_id, name, event["epoch"], round(event[k], 9)) for name, k in keys if k in event}
        result = directory.read_json("result.json")
        points.add((trial_id, "selected_val_accuracy", 0, round(result["selected"]["val_accuracy"], 9)))
        for test_set, value in result["tests"].items():
            name = f"accuracy_{test_set.lower().replace('-', '_')}"
            points.add((trial_id, name, 0, round(value["accuracy"], 9)))
        for row in table[table.h1_share == result["h1_share"]].itertuples():
            points.add((trial_id, f"average_drop_{row.method}", 0, round(float(row.average_drop), 9)))
            points.add((trial_id, f"average_increase_{row.method}", 0, round(float(row.average_increase), 9)))
    return Counter(dict.fromkeys(points, 1))


def artifacts(uri: str, run_id: str, folder: str | None = None) -> Iterator[str]:
    client = MlflowClient(tracking_uri=uri)
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from artifacts(uri, run_id, item.path)
        else:
            yield item.path


def assert_mirrored_once(study: Study, uri: str, experiment: str = "tiny") -> None:
    """One parent, one run a trial, every number and parameter once, the model and tables there."""
    found = runs(uri, experiment)
    tags = Counter(r.data.tags["raystudy.trial_id"] for r in found)
    assert tags == Counter(["", *study.trial_ids()])
    parent = next(r for r in found if r.data.tags["raystudy.trial_id"] == "")
    assert parent.info.status == "FINISHED"
    assert numbers(uri, experiment) == expected_numbers(study)
    for run in found:
        trial_id, files = run.data.tags["raystudy.trial_id"], sorted(artifacts(uri, run.info.run_id))
        if not trial_id:
            assert {"report/tables/accuracy.csv", "experiment.yaml"} <= set(files)
            continue
        spec = study.trial(trial_id).read_json("spec.json")
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["h1_share"] == str(spec["h1_share"])
        assert run.data.params["training.epochs"] == str(spec["training"]["epochs"])
        assert len(run.data.params) == _leaves(spec)
        assert files == ["model.safetensors", "spec.json"]


def _leaves(tree: dict[str, Any]) -> int:
    return sum(_leaves(v) if isinstance(v, dict) else 1 for v in tree.values())


def replay(source: Study, target: Study) -> Iterator[str]:
    """Write a finished study into ``target`` as its driver did, one step at a time."""
    target.storage.write_json("plan.json", source.plan())
    target.storage.write_bytes("experiment.yaml", source.storage.read_bytes("experiment.yaml"))
    for trial_id in source.trial_ids():
        came, goes = source.trial(trial_id), target.trial(trial_id)
        goes.write_bytes("spec.json", came.read_bytes("spec.json"))
        names = [n for n in came.list() if n not in ("events", "spec.json", "result.json")]
        events = came.read_events("events")
        for event in events[:-1]:
            goes.append_event("events", event)
            yield f"{trial_id} {event['event']}"
        for name in [n for n in names if not n.startswith("explain/")]:
            goes.write_bytes(name, came.read_bytes(name))
        goes.write_bytes("result.json", came.read_bytes("result.json"))
        goes.append_event("events", events[-1])
        yield f"{trial_id} result"
        for name in sorted((n for n in names if n.startswith("explain/")), key=lambda n: n.endswith("done.json")):
            goes.write_bytes(name, came.read_bytes(name))
        yield f"{trial_id} explained"
    for name in source.storage.list("report"):
        target.storage.write_bytes(name, source.storage.read_bytes(name))
    yield "report"


def cursor_file(study: Study) -> str:
    (name,) = (n for n in study.storage.list("tracking") if n != ID_FILE)
    return name


def cursor(study: Study) -> dict[str, Any]:
    name = cursor_file(study)
    return json.loads(study.storage.read_bytes(name))["sent"]
