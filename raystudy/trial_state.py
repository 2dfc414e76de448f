"""What of a running trial outlives an interruption: its position as JSON, its tensors by name (DESIGN.md rule 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raystudy.protopnet.stages import Stage

Phase = Literal["train", "projection", "last_layer"]


@dataclass
class Position:
    """Where a trial stands between two steps."""

    epoch: int = 0  # completed epochs of warm and joint training, together with what follows them
    phase: Phase = "train"  # of the epoch that is under way
    last_layer_epoch: int = 0  # completed since the projection
    step: int = 0  # taken in the current epoch
    weights: str = "none"  # none, imagenet or the SHA-256 of the file that the backbone started from
    record: dict[str, Any] = field(default_factory=dict[str, Any])  # of the last projection
    selected: dict[str, Any] = field(default_factory=dict[str, Any])  # the best projected state so far, with its record
    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def pack(
    model: nn.Module, optimizers: Mapping[Stage, torch.optim.Adam], **groups: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return all tensors under names such as ``model.add_on.0.weight`` and ``joint.exp_avg.add_on.0.weight``."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for group, content in groups.items():
        tensors.update({f"{group}.{name}": t for name, t in content.items()})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for label, optimizer in optimizers.items():
        for parameter, moments in optimizer.state.items():
            tensors.update({f"optimizer.{label}.{key}.{names[id(parameter)]}": t for key, t in moments.items()})
    return tensors


def unpack(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizers: Mapping[Stage, torch.optim.Adam]
) -> dict[str, dict[str, Tensor]]:
    """Put packed tensors back into the network and its optimizers; return the other groups by name.

    Moments get the strides of their parameters, as when they were made.
    """
    parameters = dict(model.named_parameters())
    stages = {str(stage): optimizer for stage, optimizer in optimizers.items()}
    groups: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        group, name = full_name.split(".", 1)
        if group != "optimizer":
            groups.setdefault(group, {})[name] = tensor
            continue
        label, key, name = name.split(".", 2)
        parameter = parameters[name]
        kept = tensor.clone() if key == "step" else torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        moments: dict[str, Tensor] = stages[label].state[parameter]
        moments[key] = kept
    model.load_state_dict(groups.pop("model"))
    return groups


def is_better(quality: Mapping[str, float], selected: Mapping[str, Any]) -> bool:
    """True when a state is to be selected: higher validation accuracy, then lower cross entropy, then earlier."""
    if not selected:
        return True
    new, old = (
        (-quality["val_accuracy"], quality["val_cross_entropy"]),
        (
            -selected["val_accuracy"],
            selected["val_cross_entropy"],
        ),
    )
    return new < old
