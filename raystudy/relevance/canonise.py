"""A ProtoPNet as plain tensors, with batch norm fused into the convolutions (method.md b.1).

In: a model in eval mode with ``backbone.*`` (torchvision's ResNet names), ``add_on.0``, ``add_on.2``, ``prototypes``.
Out: a ``Network`` of weights and biases that the tape reads.  The fusion is exact (no batch norm is left behind with an
epsilon of its own, unlike in the published code) and works on new tensors: the model is only read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from raystudy.protopnet.model import all_finite


@dataclass(frozen=True)
class Conv:
    """A convolution after fusion: weight (O, I, k, k), bias (O,), square stride and padding."""

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int


@dataclass(frozen=True)
class Block:
    """A residual block: ``relu(convs(x) + shortcut(x))`` with a ReLU between the convolutions."""

    stage: str  # layer1 .. layer4
    convs: tuple[Conv, ...]
    shortcut: Conv | None  # None: identity


@dataclass(frozen=True)
class Pool:
    """The stem's max pool."""

    kernel: int
    stride: int
    padding: int


@dataclass(frozen=True)
class Network:
    """The canonised ProtoPNet; ``prototypes`` is (P, D)."""

    stem: Conv
    pool: Pool
    blocks: tuple[Block, ...]
    add_on: tuple[Conv, Conv]
    prototypes: Tensor

    @property
    def stages(self) -> tuple[str, ...]:
        """Residual stages from the input upwards."""
        return tuple(dict.fromkeys(block.stage for block in self.blocks))

    @property
    def stride(self) -> int:
        """Input pixels per feature cell."""
        strides = [self.stem.stride, self.pool.stride]
        strides += [conv.stride for block in self.blocks for conv in block.convs]
        total = 1
        for stride in strides:
            total *= stride
        return total


def _square(value: int | tuple[int, ...] | str, what: str) -> int:
    if isinstance(value, int):
        return value
    if isinstance(value, str) or len(set(value)) != 1:
        raise ValueError(f"{what} must be one whole number for both directions, not {value!r}")
    return value[0]


def fuse(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> Conv:
    """Fuse a batch norm in eval mode into the convolution before it.

    ``w' = w g / sqrt(var + eps)`` and ``b' = (b - mean) g / sqrt(var + eps) + beta``; the scale is computed in float64
    and a negative ``g`` keeps its sign.
    """
    if conv.groups != 1 or _square(conv.dilation, "dilation") != 1:
        raise ValueError("relevance rules are written for convolutions without groups and dilation")
    weight, bias = conv.weight.detach(), conv.bias
    shift = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    if bias is not None:
        shift = shift + bias.detach().double()
    if norm is None:
        fused = weight.to(dtype, copy=True)
    else:
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("batch norm must keep running statistics: relevance explains a model in eval mode")
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.affine:
            scale = scale * norm.weight.detach().double()
        shift = (shift - norm.running_mean.double()) * scale
        if norm.affine:
            shift = shift + norm.bias.detach().double()
        work = torch.promote_types(weight.dtype, dtype)
        fused = (weight.to(work) * scale.to(work).view(-1, 1, 1, 1)).to(dtype)
    return Conv(fused, shift.to(dtype), _square(conv.stride, "stride"), _square(conv.padding, "padding"))


def _fused(parent: nn.Module, conv: str, norm: str, dtype: torch.dtype) -> Conv:
    return fuse(cast(nn.Conv2d, parent.get_submodule(conv)), cast(nn.BatchNorm2d, parent.get_submodule(norm)), dtype)


def _block(stage: str, block: nn.Module, dtype: torch.dtype) -> Block:
    convs: list[Conv] = []
    for i in (1, 2, 3):
        if hasattr(block, f"conv{i}"):
            convs.append(_fused(block, f"conv{i}", f"bn{i}", dtype))
    downsample = getattr(block, "downsample", None)
    shortcut = None
    if downsample is not None:
        shortcut = _fused(downsample, "0", "1", dtype)
    return Block(stage, tuple(convs), shortcut)


def _add_on(layers: Iterable[nn.Module], dtype: torch.dtype) -> tuple[Conv, Conv]:
    modules = list(layers)
    kinds = [type(m) for m in modules]
    if kinds != [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Sigmoid]:
        raise ValueError("the add-on must be conv, ReLU, conv, sigmoid: PRP has no rule for another one")
    first, second = (fuse(cast(nn.Conv2d, modules[i]), None, dtype) for i in (0, 2))
    for conv in (first, second):
        if conv.weight.shape[2:] != (1, 1) or conv.stride != 1 or conv.padding != 0:
            raise ValueError("the add-on convolutions must be 1 x 1 with stride 1 and without padding")
    return first, second


def check_readable(model: nn.Module) -> None:
    """Refuse a model in training mode, or with a NaN or an infinity."""
    if any(module.training for module in model.modules()):
        raise ValueError("relevance explains a model in eval mode: call model.eval() first")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not all_finite(tensor):
            raise ValueError(f"{name} holds a NaN or an infinity: weights must be finite")


def canonise(model: nn.Module, dtype: torch.dtype = torch.float32) -> Network:
    """Read a ProtoPNet into plain tensors of ``dtype`` on the model's device.

    Raises
    ------
    ValueError
        The model is in training mode, holds a NaN or an infinity, or has a layer without a rule.
    """
    check_readable(model)
    backbone = model.get_submodule("backbone")
    with torch.no_grad():
        blocks = [
            _block(stage, block, dtype)
            for stage in ("layer1", "layer2", "layer3", "layer4")
            if isinstance(getattr(backbone, stage, None), nn.Sequential)
            for block in backbone.get_submodule(stage).children()
        ]
        stem = _fused(backbone, "conv1", "bn1", dtype)
        pool = cast(nn.MaxPool2d, backbone.get_submodule("maxpool"))
        sizes = [_square(v, "the max pool") for v in (pool.kernel_size, pool.stride, pool.padding)]
        prototypes = cast(Tensor, model.get_parameter("prototypes")).detach().flatten(1).to(dtype, copy=True)
        add_on = _add_on(model.get_submodule("add_on").children(), dtype)
    return Network(stem, Pool(*sizes), tuple(blocks), add_on, prototypes)
