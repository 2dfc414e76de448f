"""The same relevance maps by zennit with an equal composite: an independent second for tests, a peer for benchmarks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from raystudy.relevance.rules import BOX_HIGH, BOX_LOW, L2_EPS
from raystudy.torchvision_shim import torchvision  # before zennit imports it


class _SimilarityStart(torch.autograd.Function):
    """Score of one prototype an image; backwards: inverse power of the channel differences at the arg-max cell."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, prototypes: Tensor, power: int) -> Tensor:
        difference = z - prototypes[:, :, None, None]  # M, D, h, w
        distance = difference.square().sum(1).flatten(1)
        nearest, cell = distance.min(1)
        g = 1 / (difference.flatten(2).gather(2, cell.view(-1, 1, 1).expand(-1, z.shape[1], 1)).abs() ** power + L2_EPS)
        start = torch.zeros_like(difference.flatten(2))
        start.scatter_(2, cell.view(-1, 1, 1).expand(-1, z.shape[1], 1), g / (g.sum(1, keepdim=True) + 2e-12))
        ctx.save_for_backward(start.view_as(z))
        return torch.log((nearest + 1) / (nearest + 1e-4))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (start,) = ctx.saved_tensors
        return start * grads[0].view(-1, 1, 1, 1), None, None


class _Features(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        backbone: Any = model.get_submodule("backbone")
        stages = [getattr(backbone, f"layer{i}") for i in (1, 2, 3, 4) if hasattr(backbone, f"layer{i}")]
        self.stem = nn.Sequential(backbone.conv1, backbone.bn1, nn.ReLU(), backbone.maxpool)
        self.stages = nn.Sequential(*stages)
        self.add_on = model.get_submodule("add_on")

    def forward(self, x: Tensor) -> Tensor:
        return self.add_on(self.stages(self.stem(x)))


class ZennitPRP:
    """Explains pairs of image and prototype in one batch."""

    def __init__(self, model: nn.Module, power: int = 2) -> None:
        from zennit.composites import SpecialFirstLayerMapComposite
        from zennit.layer import Sum
        from zennit.rules import Norm, Pass, ZBox, ZPlus
        from zennit.torchvision import ResNetCanonizer
        from zennit.types import Activation, BatchNorm, Convolution

        if not torchvision.__version__:
            raise RuntimeError("torchvision must be imported first")
        model = copy.deepcopy(model)
        for module in model.modules():
            # zennit merges a batch norm but leaves its eps behind; moved into the variance it is merged too.
            if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
                module.running_var += module.eps
                module.eps = 0.0
        prototypes: Any = model.prototypes
        self.prototypes = prototypes.detach().flatten(1)
        self.power = power
        self.features = _Features(model).eval()
        rules = [
            (Activation, Pass()),
            (BatchNorm, Pass()),
            (Convolution, ZPlus(stabilizer=1e-12, zero_params="bias")),
            (Sum, Norm(stabilizer=1e-6)),
        ]
        first = [(Convolution, ZBox(BOX_LOW, BOX_HIGH, stabilizer=1e-6, zero_params="bias"))]
        self.composite = SpecialFirstLayerMapComposite(rules, first, canonizers=[ResNetCanonizer()])

    def __call__(self, images: Tensor, prototypes: Tensor) -> Tensor:
        """Maps (M, H, W) of M images (M, 3, H, W) and their prototypes (M,)."""
        x = images.detach().clone().requires_grad_()
        with self.composite.context(self.features) as features:
            scores = _SimilarityStart.apply(features(x), self.prototypes[prototypes], self.power)
            (relevance,) = torch.autograd.grad(scores, x, torch.ones_like(scores))
        return relevance.sum(1)
