"""Small models with weights from a seed: random batch norm (negative scales too), biases, spread prototypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raystudy.protopnet import ProtoPNet


def random_net(
    arch: str = "resnet18", per_class: int = 3, dim: int = 16, layers: int = 4, seed: int = 0, width: int | None = None
) -> ProtoPNet:
    """A ProtoPNet in eval mode; ``width`` cuts every stage to that many channels, for slow oracles."""
    net = ProtoPNet(arch, 2, per_class, dim, layers, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    if width is not None:
        narrow(net, width)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                n = module.num_features
                module.weight.copy_(0.5 + torch.rand(n, generator=g))
                module.weight[1::8] *= -1
                module.bias.copy_(0.6 * torch.rand(n, generator=g) - 0.3)
                module.running_mean = 0.6 * torch.rand(n, generator=g) - 0.3
                module.running_var = 0.5 + 1.5 * torch.rand(n, generator=g)
            elif isinstance(module, nn.Conv2d):
                fan = module.weight[0].numel()
                module.weight.copy_((2 * torch.rand(module.weight.shape, generator=g) - 1) * (6 / fan) ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(0.2 * torch.rand(len(module.bias), generator=g) - 0.1)
    return net.eval()


def narrow(net: ProtoPNet, width: int) -> None:
    """Keep the first ``width`` channels of every stage."""

    def cut(conv: nn.Conv2d, inputs: int, outputs: int) -> nn.Conv2d:
        bias = conv.bias is not None
        return nn.Conv2d(inputs, outputs, conv.kernel_size, conv.stride, conv.padding, bias=bias)

    backbone: Any = net.backbone
    backbone.conv1, backbone.bn1 = cut(backbone.conv1, 3, width), nn.BatchNorm2d(width)
    for stage in backbone.stages:
        for block in getattr(backbone, stage).children():
            for i in (1, 2):
                setattr(block, f"conv{i}", cut(getattr(block, f"conv{i}"), width, width))
                setattr(block, f"bn{i}", nn.BatchNorm2d(width))
            if block.downsample is not None:
                block.downsample = nn.Sequential(cut(block.downsample[0], width, width), nn.BatchNorm2d(width))
    net.add_on[0] = cut(net.add_on[0], width, net.prototype_dim)


def random_images(n: int, size: int | tuple[int, int] = 64, seed: int = 0) -> Tensor:
    """Normalised images (n, 3, H, W) inside the box, smooth blobs and noise."""
    height, width = (size, size) if isinstance(size, int) else size
    g = torch.Generator().manual_seed(seed + 77)
    coarse = torch.rand(n, 3, 6, 6, generator=g)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    pixels = 0.8 * smooth + 0.2 * torch.rand(n, 3, height, width, generator=g)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
