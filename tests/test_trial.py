import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from raystudy.errors import StudyError
from raystudy.protopnet.normalise import normalise
from raystudy.results import damaged_files, read_result
from raystudy.storage import Storage, open_storage
from raystudy.streams import stream
from raystudy.trial import TrialInterrupted, TrialSpec, load_model, run_trial
from raystudy.trial_files import PREDICTION_SCHEMA, PROTOTYPE_SCHEMA, keep_spec, read_spec
from raystudy.trial_state import is_better
from tests.trial_example import FILES, MODEL, SIZE, contents, data, spec

VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "published batch norm, bf16": {"last_layer_bn": "published", "precision": "bf16", "schedule": "cosine"},
}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """The example trial with its defaults, which nothing interrupted."""
    storage = open_storage(tmp_path_factory.mktemp("frozen"))
    run_trial(spec(), *data(), storage)
    return storage


@pytest.fixture(scope="module", params=VARIANTS)
def finished(
    request: pytest.FixtureRequest, frozen: Storage, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrialSpec, Storage]:
    """A trial of each variant that nothing interrupted."""
    trial, storage = spec(VARIANTS[request.param]), frozen
    if request.param != "frozen":
        storage = open_storage(tmp_path_factory.mktemp("variant"))
        run_trial(trial, *data(), storage)
    return trial, storage


def after(n: int) -> Callable[[], bool]:
    """Return a should_stop that turns true when it is asked for the n-th time."""
    asked = iter(range(1, n + 1))
    return lambda: next(asked, n) == n


def run_with_stops(trial: TrialSpec, storage: Storage, pauses: list[int]) -> int:
    """Run a trial that is stopped after so many polls, again and again; return how often it was."""
    for stops, pause in enumerate(pauses):
        try:
            run_trial(trial, *data(), storage, should_stop=after(pause))
        except TrialInterrupted:
            continue
        return stops
    raise AssertionError("the trial did not come to its end")


def test_a_trial_leaves_its_files_and_nothing_else(frozen: Storage) -> None:
    assert frozen.list() == sorted(["events", "spec.json", *FILES])
    result = read_result(frozen)
    assert result is not None
    assert result["status"] == "finished"
    assert (result["n_train"], result["n_val"], result["weights"]) == (30, 14, "none")
    assert [(h["stage"], h["epoch"]) for h in result["history"] if h["stage"] != "last_layer"] == [
        ("warm", 1), ("joint", 2), ("projection", 2), ("joint", 3), ("joint", 4), ("projection", 4),
    ]  # fmt: skip
    assert Counter(h["epoch"] for h in result["history"] if h["stage"] == "last_layer") == {2: 3, 4: 3}
    assert damaged_files(frozen) == []


def test_the_last_layer_may_be_trained_after_the_last_projection_alone(frozen: Storage, tmp_path: Path) -> None:
    place = open_storage(tmp_path)
    result = run_trial(spec({"last_layer_stages": "last"}), *data(), place)
    assert Counter(h["epoch"] for h in result["history"] if h["stage"] == "last_layer") == {4: 3}
    until_then = [
        h for h in frozen.read_json("result.json")["history"] if h["epoch"] < 3 and h["stage"] != "last_layer"
    ]
    assert result["history"][: len(until_then)] == until_then


def test_predictions_hold_a_row_for_each_image_and_test_set(frozen: Storage) -> None:
    table = frozen.read_table("predictions.parquet")
    assert table.schema.metadata is None
    frame = table.to_pandas()
    assert list(frame) == PREDICTION_SCHEMA.names
    assert Counter(frame["test_set"]) == {"Test-100H1": 8, "Test-50-50": 16}
    twice = frame[frame["source"] == "H1"].groupby("image_id")[["logit_0", "logit_1"]].nunique()
    assert (twice == 1).all(axis=None)
    result = read_result(frozen)
    assert result is not None
    for name, rows in frame.groupby("test_set"):
        correct = int((rows["label"] == rows["predicted"]).sum())
        assert result["tests"][name] == {"n": len(rows), "correct": correct, "accuracy": 100 * correct / len(rows)}
    assert (frame["predicted"] == (frame["logit_1"] > frame["logit_0"])).all()


def test_prototypes_name_training_films_of_their_class(frozen: Storage) -> None:
    frame = frozen.read_table("prototypes.parquet").to_pandas()
    assert list(frame) == PROTOTYPE_SCHEMA.names
    assert frame["class"].tolist() == [0, 0, 0, 1, 1, 1]
    cohort, _, _ = data()
    sources = frame.merge(cohort, on="image_id", suffixes=("", "_cohort"), validate="many_to_one")
    assert len(sources) == 6
    assert (sources["label"] == sources["class"]).all()
    assert (sources["role"] == "train").all()
    assert (sources["patient_id"] == sources["patient_id_cohort"]).all()
    assert (frame["duplicate_of"] <= frame["prototype"]).all()


def test_the_kept_model_gives_the_kept_predictions(finished: tuple[TrialSpec, Storage]) -> None:
    _, storage = finished
    model = load_model(storage)
    assert not model.training
    frame = storage.read_table("predictions.parquet").to_pandas()
    with torch.no_grad():
        logits = model(normalise(torch.from_numpy(data()[2].take(frame["image_id"])))).logits
    np.testing.assert_allclose(logits.numpy(), frame[["logit_0", "logit_1"]].to_numpy(), atol=1e-3)


def test_frozen_batch_norm_keeps_prototypes_on_their_patches_and_published_does_not(
    finished: tuple[TrialSpec, Storage],
) -> None:
    trial, storage = finished
    result = read_result(storage)
    assert result is not None
    frame = storage.read_table("prototypes.parquet").to_pandas()
    with torch.no_grad():
        distances = load_model(storage)(normalise(torch.from_numpy(data()[2].take(frame["image_id"])))).distances
    own = [float(distances[j, j, r, c]) for j, (r, c) in enumerate(zip(frame["row"], frame["col"], strict=True))]
    if trial.training.last_layer_bn == "frozen" or result["selected"]["last_layer_epoch"] == 0:
        assert max(own) <= 5e-5  # method.md e.14
    else:
        assert max(own) > 1e-3


def test_two_runs_are_the_same_to_the_byte_whatever_the_order_of_rows(frozen: Storage, tmp_path: Path) -> None:
    cohort, tests, images = data()
    again = open_storage(tmp_path)
    run_trial(spec(), cohort.sample(frac=1, random_state=1), tests.sample(frac=1, random_state=2), images, again)
    assert contents(again) == contents(frozen)


def test_another_seed_is_another_result_and_another_cohort_seed_starts_from_the_same_network(tmp_path: Path) -> None:
    cohort, tests, images = data()
    quick = {"epochs": 1, "projection_interval": 1, "warm_epochs": 1, "last_layer_epochs": 0}
    firsts: dict[str, dict[str, Any]] = {}
    for name, more in {"a": {}, "b": {"seed": 1}, "c": {"cohort_seed": 1, "axes": {"x": 1}}}.items():
        result = run_trial(spec(quick, **more), cohort, tests, images, open_storage(tmp_path / name))
        firsts[name] = result["history"][0]
    assert firsts["a"] == firsts["c"]
    assert firsts["a"] != firsts["b"]


def test_a_trial_stopped_again_and_again_ends_with_the_same_bytes(
    finished: tuple[TrialSpec, Storage], tmp_path: Path
) -> None:
    trial, whole = finished
    storage = open_storage(tmp_path)
    pauses = [int(n) for n in stream(3, "pauses", trial.training.last_layer_bn).integers(5, 9, 60)]
    stops = run_with_stops(trial, storage, pauses)
    assert stops >= 8
    assert contents(storage) == contents(whole)
    assert storage.list() == whole.list()
    stages = {e["stage"] for e in storage.read_events("events") if e["event"] == "interrupted"}
    assert stages >= {"joint", "projection", "last_layer"}


@pytest.mark.parametrize("stage", ["warm", "joint", "projection", "last_layer", "evaluate"])
def test_a_trial_stopped_once_in_a_stage_ends_with_the_same_bytes(stage: str, frozen: Storage, tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    asked = Counter[str]()

    def should_stop() -> bool:
        asked["polls"] += 1
        return asked["polls"] == POLLS[stage]

    with pytest.raises(TrialInterrupted):
        run_trial(spec(), *data(), storage, should_stop=should_stop)
    last = storage.read_events("events")[-1]
    assert (last["event"], last["stage"]) == ("interrupted", stage)
    assert not storage.exists("result.json")
    run_trial(spec(), *data(), storage)
    assert [e["event"] for e in storage.read_events("events")].count("resumed") == 1
    assert contents(storage) == contents(frozen)


# 30 films in batches of 8 are 4 steps, in chunks of 10 they are 3; 14 validation films are 2 chunks, 16 test films 2.
# An epoch asks 4 + 2 times; epochs 1 and 2 end at 12, the projection (3 + 2) at 17, three last-layer epochs at 29;
# epochs 3 and 4 at 41, the projection at 46, the last layer at 58, the test at 60.
POLLS = {"warm": 3, "joint": 9, "projection": 15, "last_layer": 22, "evaluate": 59}


def test_checkpoints_come_by_time_and_go_with_the_result(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    long = spec({"epochs": 40, "projection_interval": 40}, model=dataclasses.replace(MODEL, backbone_layers=1))
    run_trial(long, *data(), storage, checkpoint_pause=0.0)
    events = storage.read_events("events")
    writing = [e["seconds"] for e in events if e["event"] == "checkpoint"]
    assert writing
    assert sum(writing[:-1]) <= 0.05 * (events[-1]["time"] - events[0]["time"])
    assert not any(name.startswith("checkpoint") for name in storage.list())


def test_a_damaged_checkpoint_is_told_and_the_bytes_stay_the_same(frozen: Storage, tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    for polls in (14, 16):
        with pytest.raises(TrialInterrupted):
            run_trial(spec(), *data(), storage, should_stop=after(polls))
    newest = max(n for n in storage.list("checkpoint") if n.endswith(".safetensors"))
    torn = bytearray(storage.read_bytes(newest))
    torn[len(torn) // 2] ^= 4
    storage.write_bytes(newest, bytes(torn))
    run_trial(spec(), *data(), storage)
    damage = [e for e in storage.read_events("events") if e["event"] == "checkpoint_damaged"]
    assert len(damage) == 1
    assert "does not match its checksum" in damage[0]["message"]
    assert contents(storage) == contents(frozen)


def test_a_finished_trial_is_only_read_and_left_over_checkpoints_go(frozen: Storage, tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with pytest.raises(TrialInterrupted):
        run_trial(spec(), *data(), storage, should_stop=after(3))
    for name in FILES:
        storage.write_bytes(name, frozen.read_bytes(name))
    n_events = len(storage.read_events("events"))
    assert run_trial(spec(), *data(), storage) == read_result(frozen)
    assert len(storage.read_events("events")) == n_events
    assert storage.list("checkpoint") == []


def test_a_loss_that_is_not_finite_ends_the_trial_as_diverged(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    wild = spec({"lr_backbone": 1e30, "lr_add_on": 1e30})
    result = run_trial(wild, *data(), storage)
    assert result["status"] == "diverged"
    assert "not finite in epoch 2" in result["reason"]
    assert [h["stage"] for h in result["history"]] == ["warm"]
    assert storage.list() == ["events", "result.json", "spec.json"]
    assert storage.read_events("events")[-1]["event"] == "diverged"
    assert run_trial(wild, *data(), storage) == result  # and is not tried again


def test_an_overflow_that_the_sigmoid_hides_from_every_loss_ends_the_trial_as_diverged(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    result = run_trial(spec({"epochs": 2, "warm_epochs": 2, "lr_warm_add_on": 1e18}), *data(), storage)
    assert [h["stage"] for h in result["history"]] == ["warm", "warm"]
    assert all(math.isfinite(h["val_cross_entropy"]) for h in result["history"])
    assert result["status"] == "diverged"
    assert "the network overflows in epoch 2" in result["reason"]
    assert storage.list() == ["events", "result.json", "spec.json"]


def test_the_selected_state_is_the_best_projected_one(finished: tuple[TrialSpec, Storage]) -> None:
    result = read_result(finished[1])
    assert result is not None
    candidates = [h for h in result["history"] if h["stage"] in ("projection", "last_layer")]
    best = min(
        candidates, key=lambda h: (-h["val_accuracy"], h["val_cross_entropy"])
    )  # min takes the earliest of equals
    assert {k: best[k] for k in result["selected"] if k != "stage"} == {
        k: v for k, v in result["selected"].items() if k != "stage"
    }


@pytest.mark.parametrize(
    ("quality", "selected", "better"),
    [
        ((80.0, 0.5), None, True),
        ((80.0, 0.5), (79.0, 0.1), True),
        ((80.0, 0.5), (81.0, 0.9), False),
        ((80.0, 0.4), (80.0, 0.5), True),
        ((80.0, 0.5), (80.0, 0.5), False),
    ],
)
def test_selection_prefers_accuracy_then_cross_entropy_then_the_earlier(
    quality: tuple[float, float], selected: tuple[float, float] | None, better: bool
) -> None:
    names = ("val_accuracy", "val_cross_entropy")
    kept = dict(zip(names, selected, strict=True)) if selected else {}
    assert is_better(dict(zip(names, quality, strict=True)), kept) is better


def test_a_trial_uses_its_threads_and_leaves_global_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 (the legacy state is what must not move)
    seen: set[int] = set()

    def should_stop() -> bool:
        seen.add(torch.get_num_threads())
        return len(seen) > 1

    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), torch.get_num_threads()  # noqa: NPY002
    quick = {"epochs": 1, "projection_interval": 1, "last_layer_epochs": 1, "threads": 2}
    run_trial(spec(quick), *data(), open_storage(tmp_path), should_stop=should_stop)
    assert seen == {2}
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.get_num_threads() == before[2]


def renamed(frame: pd.DataFrame, old: str) -> pd.DataFrame:
    return frame.assign(image_id=frame["image_id"].replace(old, "H1/x.png"))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda c, t: (renamed(c, "H1/000.png"), t), "not in the image array"),
        (lambda c, t: (c, renamed(t, "H1/022.png")), "not in the image array"),
        (lambda c, t: (c[(c["role"] != "train") | (c["label"] == 0)], t), "class 1 has no image"),
        (lambda c, t: (c[(c["role"] != "val") | (c["label"] == 1)], t), "class 0 has no image"),
        (lambda c, t: (c.assign(label=2), t), "must be 0 or 1"),
        (lambda c, t: (c.assign(role="test"), t), "train or val"),
        (lambda c, t: (c, t.drop(columns="test_set")), "no column test_set"),
        (lambda c, t: (c.assign(image_id="H1/000.png"), t), "appear twice"),
    ],
)
def test_rows_that_no_trial_can_be_made_of_are_refused_before_any_work(
    change: Callable[[pd.DataFrame, pd.DataFrame], tuple[pd.DataFrame, pd.DataFrame]], rule: str, tmp_path: Path
) -> None:
    cohort, tests, images = data()
    with pytest.raises(ValueError, match=rule):
        run_trial(spec(), *change(cohort, tests), images, open_storage(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_pixels_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"asks for images of 64 px, the image array holds {SIZE} px"):
        run_trial(spec(image_size=64), *data(), open_storage(tmp_path))


def test_a_directory_of_another_trial_is_refused(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write_json("spec.json", spec(seed=3).to_json())
    with pytest.raises(StudyError, match="holds another trial"):
        run_trial(spec(), *data(), storage)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_a_finished_trial_is_named(name: str, frozen: Storage, tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    for path in frozen.list():
        storage.write_bytes(path, frozen.read_bytes(path))
    flipped = bytearray(storage.read_bytes(name))
    flipped[len(flipped) // 2] ^= 1
    storage.write_bytes(name, bytes(flipped))
    if name == "result.json":
        with pytest.raises(StudyError, match=r"the result is damaged(.|\n)*delete this file and run again"):
            run_trial(spec(), *data(), storage)
        return
    assert damaged_files(storage) == [name]
    if name == "model.safetensors":
        with pytest.raises(StudyError, match="does not match its checksum"):
            load_model(storage)


def test_a_spec_survives_its_file_and_new_keys_leave_it_alone() -> None:
    trial = spec({"epochs": 9}, axes={"model.backbone": "resnet18", "training.epochs": 9})
    values = json.loads(json.dumps(trial.to_json()))
    assert TrialSpec.from_json(values) == trial
    assert TrialSpec.from_json(json.dumps(values)) == trial
    del values["training"]["augmentation"]  # as an older raystudy would have written it
    assert TrialSpec.from_json(values).fingerprint() == trial.fingerprint()
    often = spec({"epochs": 9, "checkpoint_share": 0.5}, axes=trial.axes)
    assert often.fingerprint() == trial.fingerprint()
    assert spec({"epochs": 8}).fingerprint() != trial.fingerprint()
    assert math.isclose(dataclasses.replace(trial).training.lr_backbone, 1e-3)


def test_classes_that_are_called_otherwise_are_the_same_trial(frozen: Storage, tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write_bytes("spec.json", frozen.read_bytes("spec.json"))
    keep_spec(storage, spec(class_names=("healthy", "ill")))
    assert read_spec(storage).class_names == ("healthy", "ill")


@pytest.mark.parametrize("where", ["", "training", "model"])
def test_a_spec_of_a_newer_raystudy_is_refused(where: str) -> None:
    values = spec().to_json()
    (values[where] if where else values)["gravity"] = 9.81
    with pytest.raises(StudyError, match="newer raystudy"):
        TrialSpec.from_json(values)
    with pytest.raises(StudyError, match="newer raystudy"):
        TrialSpec.from_json({**spec().to_json(), "schema": 99})
    with pytest.raises(StudyError, match="damaged"):
        TrialSpec.from_json("{")


def test_no_parquet_file_names_pandas(frozen: Storage) -> None:
    for name in ("prototypes.parquet", "predictions.parquet"):
        metadata = pq.read_metadata(Path(frozen.uri) / name).metadata or {}
        assert b"pandas" not in metadata


def test_a_trial_needs_only_torch_and_tables() -> None:
    """The machines that a trial may run on have no scheduler, tracker, validator or object store client."""
    script = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "mlflow", "pydantic", "obstore", "pandera", "optuna", "boto3", "yaml"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import raystudy.trial
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_trial_in_a_bucket_resumes_to_the_bytes_of_a_local_one(frozen: Storage, s3_bucket: str) -> None:
    bucket = open_storage(s3_bucket).child("trial")
    for polls in (14, 9):
        with pytest.raises(TrialInterrupted):
            run_trial(spec(), *data(), bucket, should_stop=after(polls))
    newest = max(n for n in bucket.list("checkpoint") if n.endswith(".safetensors"))
    bucket.write_bytes(newest, bucket.read_bytes(newest)[:-1])
    run_trial(spec(), *data(), bucket)
    assert {name: bucket.read_bytes(name) for name in FILES} == contents(frozen)
    assert [n for n in bucket.list() if not n.startswith("events/")] == sorted(["spec.json", *FILES])
    told = [e["event"] for e in bucket.read_events("events")]
    assert (told[0], told.count("resumed"), told.count("checkpoint_damaged")) == ("started", 2, 1)
