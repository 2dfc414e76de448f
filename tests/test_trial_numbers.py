"""A whole trial equals a loop written out from the method (a.2 to a.4): whole history and selected network.

The loop is plain: the network's layers in ordinary memory format, distances as sums of squares, torch's own StepLR,
every pass over the films made anew.  Nothing of the product's losses, stages, optimisers or projection is in it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raystudy.images.array import ImageArray
from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.model import Backbone
from raystudy.storage import open_storage
from raystudy.streams import stream, stream_seed
from raystudy.trial import TrialSpec, load_model, run_trial
from tests.trial_example import data, spec

Quality = tuple[int, float]  # of a projected state, smaller is better: minus the right predictions, cross entropy


class NaiveTrial:
    """The training of one ProtoPNet with warm, joint, projection and last-layer stages, step by step."""

    def __init__(self, trial: TrialSpec, cohort: pd.DataFrame, images: ImageArray) -> None:
        self.trial, self.s = trial, trial.training
        self.x, self.y = self.films(cohort, images, "train")
        self.val_x, self.val_y = self.films(cohort, images, "val")
        key = (trial.task, trial.h1_share, trial.seed)
        self.model = ProtoPNet.from_settings(trial.model, stream_seed(trial.study_seed, "initialisation", *key))
        self.per_class = trial.model.prototypes_per_class
        self.weight = self.model.last_layer.weight
        self.history: list[dict[str, Any]] = []
        self.best: tuple[Quality, dict[str, Tensor]] | None = None

    @staticmethod
    def films(cohort: pd.DataFrame, images: ImageArray, role: str) -> tuple[Tensor, Tensor]:
        rows = cohort[cohort["role"] == role].sort_values("image_id")
        grey = torch.from_numpy(images.take(list(rows["image_id"])).copy()).float()[:, None] / 255
        mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        return (grey.expand(-1, 3, -1, -1) - mean) / std, torch.tensor(rows["label"].to_numpy(np.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (n, 2), distances (n, P, h w) and features (n, D, h w)."""
        z = self.model.add_on(self.model.backbone(x)).flatten(2)
        d = ((z[:, None] - self.model.prototypes.flatten(1)[None, :, :, None]) ** 2).sum(2)
        least = d.amin(2)
        return torch.log((least + 1) / (least + 1e-4)) @ self.weight.T, d, z

    def losses(self, logits: Tensor, distances: Tensor, y: Tensor) -> dict[str, Tensor]:
        least, k = distances.amin(2), self.per_class
        own = [least[i, k * int(c) : k * int(c) + k].min() for i, c in enumerate(y)]
        other = [least[i, k * (1 - int(c)) : k * (1 - int(c)) + k].min() for i, c in enumerate(y)]
        return {
            "cross_entropy": F.cross_entropy(logits, y),
            "cluster": torch.stack(own).mean(),
            "separation": torch.stack(other).mean(),
            "l1": self.weight[0, k:].abs().sum() + self.weight[1, :k].abs().sum(),
        }

    def epoch(self, stage: str, optimizer: torch.optim.Adam, *key: int) -> dict[str, float]:
        """Take an epoch's steps; return the means of its losses and the training accuracy."""
        t, s = self.trial, self.s
        self.model.train(stage != "last_layer" or s.last_layer_bn == "published")
        draw = stream(t.study_seed, "order", t.task, t.h1_share, t.seed, stage, *key)
        order, sums = torch.from_numpy(draw.permutation(len(self.x))), dict[str, float]()
        for index in order.split(s.batch_size):
            logits, distances, _ = self.forward(self.x[index])
            terms = self.losses(logits, distances, self.y[index])
            self.model.zero_grad()
            total = terms["cross_entropy"] + 0.8 * terms["cluster"] - 0.08 * terms["separation"] + 1e-4 * terms["l1"]
            total.backward()
            optimizer.step()
            right = 100 * (logits.argmax(1) == self.y[index]).double().mean()
            for name, value in {**terms, "train_accuracy": right}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * len(index) / len(self.x)
        return sums

    @torch.no_grad()
    def validate(self, stage: str, epoch: int, **losses: float) -> None:
        self.model.eval()
        logits = self.forward(self.val_x)[0]
        right, loss = int((logits.argmax(1) == self.val_y).sum()), float(F.cross_entropy(logits.double(), self.val_y))
        quality = {"val_accuracy": 100 * right / len(self.val_y), "val_cross_entropy": loss}
        self.history.append({"stage": stage, "epoch": epoch + 1, **quality, **losses})
        if stage in ("projection", "last_layer") and (self.best is None or (-right, loss) < self.best[0]):
            self.best = (-right, loss), copy.deepcopy(self.model.state_dict())

    @torch.no_grad()
    def project(self) -> None:
        self.model.eval()
        _, distances, z = self.forward(self.x)
        for j, prototype in enumerate(self.model.prototypes):
            rows = (self.y == j // self.per_class).nonzero()[:, 0]
            film, cell = divmod(int(distances[rows, j].flatten().argmin()), distances.shape[2])
            prototype.copy_(z[rows[film], :, cell][:, None, None])

    def run(self) -> None:
        s, m = self.s, self.model
        add_on, decay = list(m.add_on.parameters()), s.weight_decay
        adam = torch.optim.Adam
        warm = adam([{"params": add_on, "lr": s.lr_warm_add_on, "weight_decay": decay},
                     {"params": [m.prototypes], "lr": s.lr_warm_prototypes}])  # fmt: skip
        joint = adam([{"params": list(m.backbone.parameters()), "lr": s.lr_backbone, "weight_decay": decay},
                      {"params": add_on, "lr": s.lr_add_on, "weight_decay": decay},
                      {"params": [m.prototypes], "lr": s.lr_prototypes}])  # fmt: skip
        last = adam([self.weight], lr=s.lr_last_layer)
        schedule = torch.optim.lr_scheduler.StepLR(joint, s.step_epochs, s.step_gamma)
        for epoch in range(s.epochs):
            if epoch < s.warm_epochs:
                self.validate("warm", epoch, **self.epoch("warm", warm, epoch))
            else:
                schedule.step()  # before the epoch, as published
                self.validate("joint", epoch, **self.epoch("joint", joint, epoch))
            if (epoch + 1) % s.projection_interval:
                continue
            self.project()
            self.validate("projection", epoch)
            for n in range(s.last_layer_epochs):
                self.validate("last_layer", epoch, **self.epoch("last_layer", last, epoch, n))


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")  # the published order of schedule and optimiser
@pytest.mark.parametrize("last_layer_bn", ["frozen", "published"])
def test_a_trial_equals_a_loop_written_out_from_the_method(last_layer_bn: str, tmp_path: Path) -> None:
    # Rates at which Adam does not blow rounding up: the two runs' validation losses differ by 2e-5 (and of seeds 2, 4).
    rates = {"lr_backbone": 3e-5, "lr_add_on": 1e-3, "lr_warm_add_on": 1e-3}
    trial = spec({"schedule": "step", "step_epochs": 2, "last_layer_bn": last_layer_bn, **rates}, seed=3)
    cohort, tests, images = data()
    storage = open_storage(tmp_path)
    result = run_trial(trial, cohort, tests, images, storage)
    naive = NaiveTrial(trial, cohort, images)
    naive.run()
    assert len(result["history"]) == len(naive.history) == 12
    for ours, slow in zip(result["history"], naive.history, strict=True):
        where = f"{slow['stage']} {slow['epoch']}"
        names = set(ours) & set(slow)
        assert names >= {"stage", "epoch", "val_accuracy", "val_cross_entropy"}, where
        assert slow["stage"] == "projection" or names >= {"cross_entropy", "l1", "train_accuracy"}, where
        assert (ours["stage"], ours["epoch"]) == (slow["stage"], slow["epoch"])
        assert ours["val_accuracy"] == slow["val_accuracy"], where
        for name in names - {"stage", "epoch"}:
            assert ours[name] == pytest.approx(slow[name], abs=2e-3), (where, name)
    assert naive.best is not None
    kept, slow = load_model(storage).state_dict(), naive.best[1]
    assert kept.keys() == slow.keys()
    for name, value in kept.items():
        assert float((value.double() - slow[name].double()).abs().max()) <= 1e-3, name


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_training_runs_the_backbone_in_the_precision_of_the_spec_and_everything_else_in_float32(
    precision: str, tmp_path: Path
) -> None:
    seen: dict[str, set[torch.dtype]] = {"trained": set(), "evaluated": set(), "head": set()}

    def note(module: torch.nn.Module, _: object, output: object) -> None:
        if isinstance(module, Backbone) and isinstance(output, Tensor):
            seen["trained" if module.training else "evaluated"].add(output.dtype)
        elif isinstance(module, torch.nn.Sigmoid | torch.nn.Linear) and isinstance(output, Tensor):
            seen["head"].add(output.dtype)

    quick = {"epochs": 2, "projection_interval": 2, "last_layer_epochs": 1, "precision": precision}
    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        run_trial(spec(quick), *data(), open_storage(tmp_path))
    finally:
        hook.remove()
    asked = torch.bfloat16 if precision == "bf16" else torch.float32
    assert seen == {"trained": {asked}, "evaluated": {torch.float32}, "head": {torch.float32}}
