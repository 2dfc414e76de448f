"""The ProtoPNet (method.md a.1): backbone, two 1x1 convolutions, prototypes, log similarity, last layer.

In flow normalised images; out flow logits, the similarity score of every prototype, its distance map and the features.
Parameter names are torchvision's for the backbone, then ``add_on.0``, ``add_on.2``, ``prototypes``,
``last_layer.weight``.  Nothing here reads or moves a global generator.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raystudy.protopnet.settings import ModelSettings

SIMILARITY_EPS = 1e-4
LAST_LAYER_OWN, LAST_LAYER_OTHER = 1.0, -0.5
STAGES = ("layer1", "layer2", "layer3", "layer4")


class ProtoPNetOutput(NamedTuple):
    """What one forward pass gives.

    logits : (N, C).  similarities : (N, P), largest over the grid.  distances : (N, P, h, w), squared L2.
    features : (N, D, h, w) in (0, 1).  All float32.
    """

    logits: Tensor
    similarities: Tensor
    distances: Tensor
    features: Tensor


class Backbone(nn.Module):
    """A ResNet of torchvision without average pool and fc, cut after ``layers`` stages; its closing ReLU is kept."""

    def __init__(self, name: str, layers: int) -> None:
        from raystudy.torchvision_shim import models  # slow to import, and whoever only looks at maps builds no network

        super().__init__()
        with torch.device("meta"):
            whole = getattr(models, name)(weights=None)
        self.conv1: nn.Conv2d = whole.conv1
        self.bn1: nn.BatchNorm2d = whole.bn1
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.MaxPool2d = whole.maxpool
        for stage in STAGES[:layers]:
            setattr(self, stage, getattr(whole, stage))
        self.stages = STAGES[:layers]
        last_block = list(getattr(self, self.stages[-1]).children())[-1]
        final_conv = last_block.conv3 if hasattr(last_block, "conv3") else last_block.conv2
        self.out_channels = int(final_conv.out_channels)
        self.stride = 4 * 2 ** (layers - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, C, h, w), h = H / stride rounded up."""
        x: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return x


class ProtoPNet(nn.Module):
    """The network of Chen et al. 2019 as the study uses it.

    Parameters
    ----------
    backbone : ``resnet18``, ``resnet34`` or ``resnet50``.
    num_classes, prototypes_per_class : P = C times prototypes_per_class; prototype j belongs to class
        ``j // prototypes_per_class``.
    prototype_dim : D, channels of features and prototypes.
    backbone_layers : how many of layer1..layer4 are kept; 3 gives stride 16.
    seed : of the random initialisation (a private generator; global ones are left alone).
    """

    prototype_class: Tensor

    def __init__(
        self,
        backbone: str = "resnet34",
        num_classes: int = 2,
        prototypes_per_class: int = 10,
        prototype_dim: int = 128,
        backbone_layers: int = 4,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if backbone not in ("resnet18", "resnet34", "resnet50"):
            raise ValueError(f"backbone must be resnet18, resnet34 or resnet50, not {backbone!r}")
        if not 1 <= backbone_layers <= 4:
            raise ValueError(f"backbone_layers must be 1, 2, 3 or 4, not {backbone_layers}")
        if min(num_classes - 1, prototypes_per_class, prototype_dim) < 1:
            raise ValueError("at least 2 classes, 1 prototype a class and 1 feature channel are needed")
        self.num_classes, self.prototypes_per_class, self.prototype_dim = (
            num_classes,
            prototypes_per_class,
            prototype_dim,
        )
        prototypes = num_classes * prototypes_per_class
        self.backbone = Backbone(backbone, backbone_layers)
        with torch.device("meta"):
            self.add_on = nn.Sequential(
                nn.Conv2d(self.backbone.out_channels, prototype_dim, 1),
                nn.ReLU(),
                nn.Conv2d(prototype_dim, prototype_dim, 1),
                nn.Sigmoid(),
            )
            self.last_layer = nn.Linear(prototypes, num_classes, bias=False)
            self.prototypes = nn.Parameter(torch.empty(prototypes, prototype_dim, 1, 1))
        self.to_empty(device="cpu")
        classes = torch.arange(prototypes) // prototypes_per_class
        self.register_buffer("prototype_class", classes, persistent=False)
        self.reset_parameters(seed)

    @classmethod
    def from_settings(cls, settings: ModelSettings, seed: int = 0) -> ProtoPNet:
        """Build the network of an experiment, randomly initialised; weights from a file are loaded afterwards."""
        return cls(
            settings.backbone,
            2,
            settings.prototypes_per_class,
            settings.prototype_dim,
            settings.backbone_layers,
            seed=seed,
        )

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Initialise as published: convolutions Kaiming normal (fan-out), prototypes uniform in [0, 1), W +1 / -0.5."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1] // module.groups
                module.weight.normal_(0, math.sqrt(2 / fan_out), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        self.prototypes.uniform_(0, 1, generator=generator)
        own = torch.arange(self.num_classes)[:, None] == self.prototype_class.cpu()[None]  # C, P
        self.last_layer.weight.copy_(torch.where(own, LAST_LAYER_OWN, LAST_LAYER_OTHER))

    def forward(self, images: Tensor) -> ProtoPNetOutput:
        """Classify normalised images (N, 3, H, W).

        Raises
        ------
        ValueError : not (N, 3, H, W), or smaller than one cell of the grid.
        """
        self.check_images(images)
        return self.head(self.backbone(images))

    def head(self, maps: Tensor) -> ProtoPNetOutput:
        """Go on from the backbone's output (N, C, h, w), in the precision of the parameters even under autocast."""
        with torch.autocast(maps.device.type, enabled=False):
            return self.compare(self.add_on(maps.to(self.prototypes.dtype)))

    def compare(self, features: Tensor) -> ProtoPNetOutput:
        """Go on from the features (N, D, h, w), in the precision of the parameters even under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            distances = self.distances_of(features)  # N, P, h, w
            similarities = log_similarity(distances.flatten(2).amin(2))  # N, P
            return ProtoPNetOutput(self.last_layer(similarities), similarities, distances, features)

    def features(self, images: Tensor, *, finite: bool = False) -> Tensor:
        """Return the add-on's output (N, D, h, w).

        ``finite`` refuses (ValueError) what overflows before the sigmoid, which would hide it; the device is asked for
        a value then.
        """
        self.check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            maps = self.backbone(images.to(self.prototypes.dtype))
            if not finite:
                return self.add_on(maps)
            first = self.add_on[0](maps)
            last = self.add_on[2](self.add_on[1](first))
            if not bool(torch.isfinite(maps.sum() + first.sum() + last.sum())):
                raise ValueError("activations must be finite: the network overflows on these images")
            return self.add_on[3](last)

    def distances_of(self, features: Tensor) -> Tensor:
        """Return squared L2 distances (N, P, h, w): relu(sum z^2 - 2 <z, p> + sum p^2).

        Three large numbers nearly cancel here: 8 bits of bf16 would leave noise, so autocast is switched off.
        """
        p = self.prototypes  # P, D, 1, 1
        with torch.autocast(features.device.type, enabled=False):
            cross = nn.functional.conv2d(features, p)
            squares = (features**2).sum(1, keepdim=True)  # N, 1, h, w
            return torch.relu(squares - 2 * cross + (p**2).sum((1, 2, 3)).view(1, -1, 1, 1))

    def check_images(self, images: Tensor) -> None:
        """Refuse input that is not a batch of three-channel images."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (N, 3, H, W), not {tuple(images.shape)}")
        if min(images.shape[2:]) < 32:
            raise ValueError(f"images must be at least 32 px, not {tuple(images.shape[2:])}")
        if not images.is_floating_point():
            raise ValueError(f"images must be normalised floating point, not {images.dtype}")


def log_similarity(distances: Tensor) -> Tensor:
    """Return ln((d + 1) / (d + 1e-4)): decreasing in d, always positive (method.md a.1)."""
    return torch.log((distances + 1) / (distances + SIMILARITY_EPS))


def all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity.  A finite sum tells it in a tenth of the time; it may overflow."""
    return bool(torch.isfinite(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


def check_finite(model: nn.Module) -> None:
    """Refuse a model with a parameter or buffer that is not finite."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not all_finite(tensor):
            raise ValueError(f"weights must be finite, {name} is not")
