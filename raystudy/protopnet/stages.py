"""The three stages: what is trained when, by which optimiser and at which rate (method.md a.3, a.7).

Epochs are counted from 0 and include the warm ones.  The joint schedule is stepped before each joint epoch, as
published: joint epoch k runs at ``lr * gamma ** floor((k + 1) / step_epochs)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from raystudy.protopnet.model import ProtoPNet
from raystudy.protopnet.settings import TrainingSettings

Stage = Literal["warm", "joint", "last_layer"]


class EpochPlan(NamedTuple):
    """One warm or joint epoch: its learning rates by parameter group, and whether a projection follows."""

    epoch: int
    stage: Literal["warm", "joint"]
    learning_rates: dict[str, float]
    projects: bool


def stage_of(epoch: int, settings: TrainingSettings) -> Literal["warm", "joint"]:
    """Return the stage of an epoch (0-based)."""
    return "warm" if epoch < settings.warm_epochs else "joint"


def projects_after(completed: int, settings: TrainingSettings) -> bool:
    """Say whether prototypes are projected after so many completed epochs."""
    beyond = completed - settings.projection_offset
    return beyond > 0 and beyond % settings.projection_interval == 0


def last_layer_epochs_after(completed: int, settings: TrainingSettings) -> int:
    """Return how many last-layer epochs follow so many completed epochs."""
    if not projects_after(completed, settings):
        return 0
    later = any(projects_after(e, settings) for e in range(completed + 1, settings.epochs + 1))
    return 0 if later and settings.last_layer_stages == "last" else settings.last_layer_epochs


def joint_factor(joint_epoch: int, settings: TrainingSettings) -> float:
    """Return what the joint learning rates are multiplied with in joint epoch k (0-based)."""
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "cosine":
        total = max(1, settings.epochs - settings.warm_epochs)
        return 0.5 * (1 + math.cos(math.pi * joint_epoch / total))
    return settings.step_gamma ** ((joint_epoch + 1) // settings.step_epochs)


def learning_rates(epoch: int, settings: TrainingSettings) -> dict[str, float]:
    """Return the learning rate of every parameter group in an epoch (0-based)."""
    if stage_of(epoch, settings) == "warm":
        return {"add_on": settings.lr_warm_add_on, "prototypes": settings.lr_warm_prototypes}
    factor = joint_factor(epoch - settings.warm_epochs, settings)
    rates = {"backbone": settings.lr_backbone, "add_on": settings.lr_add_on, "prototypes": settings.lr_prototypes}
    return {name: rate * factor for name, rate in rates.items()}


def epoch_plan(settings: TrainingSettings) -> list[EpochPlan]:
    """Return the whole schedule, one entry an epoch."""
    return [
        EpochPlan(e, stage_of(e, settings), learning_rates(e, settings), projects_after(e + 1, settings))
        for e in range(settings.epochs)
    ]


def build_optimizers(model: ProtoPNet, settings: TrainingSettings) -> dict[Stage, torch.optim.Adam]:
    """Return one Adam a stage; each keeps its moments over all its epochs. W is in the last-layer one only."""

    def group(name: str, parameters: Sequence[Tensor], rate: float, decay: float) -> dict[str, object]:
        return {"name": name, "params": parameters, "lr": rate, "weight_decay": decay}

    backbone, add_on = list(model.backbone.parameters()), list(model.add_on.parameters())
    decay = settings.weight_decay
    return {
        "warm": torch.optim.Adam(
            [
                group("add_on", add_on, settings.lr_warm_add_on, decay),
                group("prototypes", [model.prototypes], settings.lr_warm_prototypes, 0),
            ]
        ),
        "joint": torch.optim.Adam(
            [
                group("backbone", backbone, settings.lr_backbone, decay),
                group("add_on", add_on, settings.lr_add_on, decay),
                group("prototypes", [model.prototypes], settings.lr_prototypes, 0),
            ]
        ),
        "last_layer": torch.optim.Adam(
            [group("last_layer", [model.last_layer.weight], settings.lr_last_layer, 0)],
        ),
    }


def set_learning_rates(optimizer: torch.optim.Adam, epoch: int, settings: TrainingSettings) -> None:
    """Set the rates of a warm or joint epoch (0-based) on that stage's optimiser."""
    rates = learning_rates(epoch, settings)
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]


def set_stage(model: ProtoPNet, stage: Stage, settings: TrainingSettings) -> None:
    """Choose what receives gradients and how batch norm behaves.

    All of warm and joint training runs in train mode: batch norm uses batch statistics and moves its running ones even
    where it is frozen, as published.  In the last-layer stage ``last_layer_bn: frozen`` keeps the network in eval mode,
    so that prototypes stay training patches; ``published`` does not.
    """
    trained: dict[Stage, tuple[nn.Module, ...]] = {
        "warm": (model.add_on,),
        "joint": (model.backbone, model.add_on),
        "last_layer": (model.last_layer,),
    }
    model.requires_grad_(False)
    for module in trained[stage]:
        module.requires_grad_(True)
    model.prototypes.requires_grad_(stage != "last_layer")
    model.train(stage != "last_layer" or settings.last_layer_bn == "published")
