"""Input gradients of convolutions, ``c^T(S; w)``: nearly all of the arithmetic of relevance.

Prepared once per convolution and called many times.  A convolution with stride 1 is a convolution with turned weights,
which keeps to the channels-last kernels that are fastest; a strided one is a transposed convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]


@dataclass(frozen=True)
class InputGradient:
    """``c^T(.; weight)`` of a square convolution; ``weight`` (O, I, k, k)."""

    weight: Tensor  # turned for stride 1
    stride: int
    padding: int

    @classmethod
    def of(cls, weight: Tensor, stride: int, padding: int) -> InputGradient:
        """Prepare the transposed form of a convolution."""
        if stride == 1:
            weight = weight.flip(2, 3).transpose(0, 1)
        return cls(weight.contiguous(memory_format=torch.channels_last), stride, padding)

    def __call__(self, outer: Tensor, size: Size) -> Tensor:
        """Return the input gradient (M, I, H, W) of ``outer`` (M, O, h, w) for an input of ``size`` = (H, W)."""
        kernel = self.weight.shape[-1]
        if self.stride == 1:
            return F.conv2d(outer, self.weight, padding=kernel - 1 - self.padding)
        extra = [
            s + 2 * self.padding - kernel - (o - 1) * self.stride for s, o in zip(size, outer.shape[2:], strict=True)
        ]
        return F.conv_transpose2d(
            outer, self.weight, stride=self.stride, padding=self.padding, output_padding=tuple(extra)
        )
