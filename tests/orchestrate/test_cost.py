"""The parts of which a study's time is put together are those that a trial really does, counted while it does them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from raystudy.config import load_experiment
from raystudy.explanation import explain_trial
from raystudy.explanation_jobs import JOBS
from raystudy.images.array import ImageArray
from raystudy.images.decode import decode_film
from raystudy.orchestrate import cost
from raystudy.orchestrate.plan import PlannedTrial, plan_study
from raystudy.protopnet import ProtoPNet
from raystudy.relevance import PrototypeExplainer
from raystudy.storage import Storage, open_storage
from raystudy.trial import run_trial
from tests.cohorts.hospitals import shared
from tests.orchestrate import tiny


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count images that networks see in training and otherwise, optimiser steps of the last layer, and maps."""
    seen: Counter[str] = Counter()
    backbone = type(ProtoPNet("resnet18", backbone_layers=2).backbone)
    maps = PrototypeExplainer._maps

    def forward(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, backbone):
            training = torch.is_grad_enabled() and module.training
            last_layer = training and not any(p.requires_grad for p in module.parameters())
            seen["train" if training and not last_layer else "evaluate"] += len(inputs[0])

    def counted_maps(self: PrototypeExplainer, tape: Any, cells: Any, start: torch.Tensor) -> torch.Tensor:
        seen["maps"] += start.shape[0] * start.shape[1]
        return maps(self, tape, cells, start)

    def stepped(optimizer: torch.optim.Optimizer, *given: Any) -> None:
        seen["last_layer"] += optimizer.param_groups[0]["name"] == "last_layer"

    monkeypatch.setattr(PrototypeExplainer, "_maps", counted_maps)
    hooks = [register_module_forward_hook(forward), register_optimizer_step_post_hook(stepped)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def decoded(trial: PlannedTrial) -> ImageArray:
    films = {r.image_id: r.uri for frame in (trial.cohort, trial.tests) for r in frame.itertuples()}
    pixels = [decode_film(Path(str(uri)).read_bytes(), str(uri), trial.images) for uri in films.values()]
    return ImageArray(tuple(map(str, films)), np.stack(pixels))


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["training.last_layer_bn=published", "explain.adai_draws=2"],
        ["training.augmentation=published", "training.batch_size=40"],
        ["explain.enabled=false", "training.epochs=4"],
        ["explain.enabled=false", "training.epochs=4", "training.last_layer_stages=last"],
    ],
    ids=["plain", "published last layer", "augmented", "unexplained", "one last-layer stage"],
)
def test_the_work_of_a_trial_is_what_it_does(
    changes: list[str], films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["training.warm_epochs=0", *changes]
    trial = plan_study(tiny.experiment(films, tmp_path, settings), open_storage(tmp_path)).trials[1]
    images, place = decoded(trial), open_storage(tmp_path).child("trial")
    with counting(monkeypatch) as seen:
        run_trial(trial.spec, trial.cohort, trial.tests, images, place)
        trained = Counter(seen)
        if trial.explain.enabled:
            explain(trial, images, place)
    explained = seen - trained
    training, explaining = cost.training_work(trial), cost.explanation_work(trial)
    assert trained == Counter(
        {"train": training.train, "evaluate": training.evaluate, "last_layer": training.last_layer}
    )
    # Prototypes that fell on one patch are explained once, and a source may be among the films that fire most.
    assert explaining.maps / 4 <= explained["maps"] <= explaining.maps
    assert explaining.evaluate / 3 <= explained["evaluate"] <= explaining.evaluate
    assert (explaining.maps > 0) == trial.explain.enabled


def explain(trial: PlannedTrial, images: ImageArray, place: Storage) -> None:
    for job in JOBS:
        explain_trial(job, trial.spec, trial.cohort, trial.tests, images, place, trial.explain)


def test_each_network_of_an_ablation_is_measured(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates, asked = {2: 1.0, 4: 10.0}, list[int]()  # seconds of a training step

    def measure(trial: PlannedTrial, *_: Any) -> cost.Work:
        asked.append(trial.spec.model.backbone_layers)
        return cost.Work(train=rates[asked[-1]])

    def seconds(**more: Any) -> float:
        experiment = tiny.experiment(films, tmp_path, ["images.size=64", "training.epochs=400"], **more)
        found = cost.estimate(plan_study(experiment, open_storage(tmp_path))).seconds
        assert found is not None
        return found

    monkeypatch.setattr(cost, "_measure", measure)
    small, both = seconds(), seconds(axes={"model.backbone_layers": [2, 4]})
    assert asked == [2, 2, 4]
    assert both == pytest.approx(11 * small, rel=0.01)


def test_steps_count_every_copy_of_a_film(films: Path, tmp_path: Path) -> None:
    steps = [
        cost.estimate(plan_study(tiny.experiment(films, tmp_path, [change]), open_storage(tmp_path)), False).joint_steps
        for change in ("training.augmentation=none", "training.augmentation=published")
    ]
    assert steps == [24 // 8, 24 * 30 // 8]


def test_decoding_goes_by_the_size_of_the_originals(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """103 films of 1024 px a second on two cores from S3 (docs/performance.md); of small ones many times as many."""
    monkeypatch.setattr(cost, "_measure", lambda *_: cost.Work())
    monkeypatch.setattr(cost, "_cores", lambda: 2)

    def decoding(**more: Any) -> tuple[float, int, str]:
        plan = plan_study(tiny.experiment(films, tmp_path, **more), open_storage(tmp_path))
        found = cost.estimate(plan)
        assert found.seconds is not None
        n = len(plan.image_table)
        return n / (found.seconds - cost.FIXED_SECONDS - 3 * cost.TRIAL_SECONDS / 2), n, found.assumed_size

    rate, _, assumed = decoding()
    assert rate == pytest.approx(103, rel=0.05)
    assert assumed == "H1, H2"
    phantoms = {h: {"kind": "phantom", "settings": {"look": h, "size": 128}} for h in ("north", "south")}
    rate, _, assumed = decoding(sources={"H1": phantoms["north"], "H2": phantoms["south"]})
    assert (rate > 500, assumed) == (True, "")


# Seconds of an image trained on, an image evaluated, a last-layer step and a map on the machine of docs/performance.md:
# their proportions measured part by part while other programs ran, all scaled so that the plans say what they said
# there on the quiet machine (4:24 and 15:05, 25 November 2026).
DEMO = cost.Work(train=0.00489, evaluate=0.00289, last_layer=0.00026, maps=0.00542)
XRAY_SAMPLE = cost.Work(train=0.00996, evaluate=0.0061, last_layer=0.00029, maps=0.01178)


@pytest.mark.parametrize(("name", "rates", "took"), [("demo", DEMO, 235), ("xray_sample", XRAY_SAMPLE, 914)])
def test_the_examples_are_estimated_as_they_were_measured(
    name: str, rates: cost.Work, took: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``took``: seconds of the whole command `raystudy run` on the same machine of two cores, once."""
    monkeypatch.setattr(cost, "_measure", lambda *_: rates)
    monkeypatch.setattr(cost, "_cores", lambda: 2)
    root = [f"sources.{h}.root={shared('data', 'xray')}" for h in ("H1", "H2")] if name == "xray_sample" else []
    file = Path(__file__).parents[2] / "experiments" / f"{name}.yaml"
    found = cost.estimate(plan_study(load_experiment(file, root), open_storage(tmp_path)))
    assert found.concurrent == 2
    assert found.seconds == pytest.approx(took, rel=0.3)
