"""Input gradients of convolutions, ``c^T(S; w)``: nearly all of the arithmetic of relevance.

Prepared once per convolution and called many times.  A convolution with stride 1 is a convolution with turned weights,
which keeps to the fastest channels-last kernels; a strided one is a transposed convolution, except where it has
so few inputs (the stem's three colours and the box) that the kernels' vectors would be nearly empty.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from raystudy.relevance import winograd

Size = tuple[int, int]
InputGradient = Callable[[Tensor, Size], Tensor]  # (M, O, h, w), (H, W) -> (M, I, H, W)
VECTOR = 16  # float32 values in the widest vector of current CPUs


def input_gradient(weight: Tensor, stride: int, padding: int) -> InputGradient:
    """Prepare ``c^T(.; weight)`` of a square convolution with ``weight`` (O, I, k, k)."""
    if stride == 1 and padding == 1 and winograd.pays(weight):
        convolve = winograd.convolution(weight.flip(2, 3).transpose(0, 1))
        return lambda outer, _: convolve(outer)
    if stride == 1:
        return _turned(weight, padding)
    if weight.shape[1] * stride**2 <= VECTOR:
        return _by_phases(weight, stride, padding)
    return _transposed(weight, stride, padding)


def _turned(weight: Tensor, padding: int) -> InputGradient:
    turned = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    around = weight.shape[-1] - 1 - padding
    return lambda outer, _: F.conv2d(outer, turned, padding=around)


def _transposed(weight: Tensor, stride: int, padding: int) -> InputGradient:
    weight = weight.contiguous(memory_format=torch.channels_last)
    kernel = weight.shape[-1]

    def gradient(outer: Tensor, size: Size) -> Tensor:
        extra = [s + 2 * padding - kernel - (o - 1) * stride for s, o in zip(size, outer.shape[2:], strict=True)]
        return F.conv_transpose2d(outer, weight, stride=stride, padding=padding, output_padding=tuple(extra))

    return gradient


def _by_phases(weight: Tensor, stride: int, padding: int) -> InputGradient:
    """One dense convolution gives all ``stride`` x ``stride`` phases of the input grid; a pixel shuffle weaves them.

    Input row ``stride i + phase`` meets output row ``i + d`` through kernel row ``phase + padding - stride d``.
    """
    outputs, inputs, kernel = weight.shape[:3]
    first = -((kernel - 1 - padding) // stride)  # smallest d of phase 0
    last = (stride - 1 + padding) // stride  # largest d of the last phase
    taps = range(first, last + 1)
    dense = weight.new_zeros(inputs, stride, stride, outputs, len(taps), len(taps))
    for py in range(stride):
        for px in range(stride):
            for ty, dy in enumerate(taps):
                for tx, dx in enumerate(taps):
                    ky, kx = py + padding - stride * dy, px + padding - stride * dx
                    if 0 <= ky < kernel and 0 <= kx < kernel:
                        dense[:, py, px, :, ty, tx] = weight[:, :, ky, kx].T
    dense = dense.view(-1, outputs, len(taps), len(taps)).contiguous(memory_format=torch.channels_last)
    around = max(-first, last)

    def gradient(outer: Tensor, size: Size) -> Tensor:
        rows, columns = (-(-s // stride) for s in size)
        woven = F.conv2d(outer, dense, padding=around)
        # row i of the phases reads outer rows from i + first on; the convolution starts at -around
        begin = around + first
        woven = woven[:, :, begin : begin + rows, begin : begin + columns]
        return F.pixel_shuffle(woven, stride)[:, :, : size[0], : size[1]]

    return gradient
