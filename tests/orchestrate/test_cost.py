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

from raystudy.explanation import JOBS, explain_trial
from raystudy.images.array import ImageArray
from raystudy.images.decode import decode_film
from raystudy.orchestrate import cost
from raystudy.orchestrate.plan import PlannedTrial, plan_study
from raystudy.protopnet import ProtoPNet
from raystudy.relevance import PrototypeExplainer
from raystudy.storage import Storage, open_storage
from raystudy.trial import run_trial
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


def test_each_network_of_an_ablation_is_measured(films: Path, tmp_path: Path) -> None:
    def seconds(**more: Any) -> float:
        experiment = tiny.experiment(films, tmp_path, ["images.size=64", "training.epochs=400"], **more)
        found = cost.estimate(plan_study(experiment, open_storage(tmp_path))).seconds
        assert found is not None
        return found

    small, both = seconds(), seconds(axes={"model.backbone_layers": [2, 4]})
    assert both > 3 * small  # twice the trials, and the deeper network has many times the parameters


def test_steps_count_every_copy_of_a_film(films: Path, tmp_path: Path) -> None:
    steps = [
        cost.estimate(plan_study(tiny.experiment(films, tmp_path, [change]), open_storage(tmp_path)), False).joint_steps
        for change in ("training.augmentation=none", "training.augmentation=published")
    ]
    assert steps == [24 // 8, 24 * 30 // 8]
