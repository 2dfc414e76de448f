"""Winograd's F(4 x 4, 3 x 3) in plain torch: a 3 x 3 convolution with a quarter of the multiplications.

Lavin and Gray 2016.  Tiles of 6 x 6 inputs give 4 x 4 outputs; per tile position one matrix product over channels.  In
float32 the rounding is that of the direct form or smaller (shorter sums).  Worth it on CPUs from about
128 channels, where the products outweigh the transforms; torch has no float32 kernel of its own for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 4
CHUNK_BYTES = 2 << 20  # of transformed input at a time, so that it stays in the cache

_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def pays(weight: Tensor) -> bool:
    """Whether a convolution with this weight (O, I, k, k) is faster in this form."""
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and weight.shape[2:] == (3, 3) and min(weight.shape[:2]) >= 128


def _fits(height: int, width: int) -> bool:
    """Whether the grid fills its tiles well enough."""
    tiles = -(-height // TILE) * -(-width // TILE)
    return tiles * TILE**2 < 2 * height * width


def convolution(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Prepare ``conv2d(., weight, padding=1)`` for ``weight`` (O, I, 3, 3) and channels-last input."""
    direct = weight.contiguous(memory_format=torch.channels_last)
    input_1d, kernel_1d, output_1d = (torch.tensor(m, dtype=torch.float64) for m in (_INPUT, _KERNEL, _OUTPUT))
    transform = torch.kron(input_1d, input_1d).to(weight.dtype)  # 36, 36
    inverse = torch.kron(output_1d, output_1d).to(weight.dtype)  # 16, 36
    both = torch.kron(kernel_1d, kernel_1d).to(weight.dtype)  # 36, 9
    outputs, inputs = weight.shape[:2]
    kernels = (both @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, inputs, outputs)

    def convolve(x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        if not _fits(height, width):
            return F.conv2d(x, direct, padding=1)
        down, across = -(-height // TILE), -(-width // TILE)
        tiles = down * across
        step = max(1, min(n, max(CHUNK_BYTES, kernels.nbytes) // (36 * tiles * channels * x.element_size())))
        y = x.new_empty(n, down, TILE, across, TILE, outputs)
        padded = x.new_zeros(step, down * TILE + 2, across * TILE + 2, channels)
        inner = padded[:, 1 : height + 1, 1 : width + 1]
        image, row, column, _ = padded.stride()
        for i in range(0, n, step):
            part = x[i : i + step].permute(0, 2, 3, 1)
            m = len(part)
            inner[:m] = part
            shape = (6, 6, m, down, across, channels)
            windows = padded.as_strided(shape, (row, column, image, TILE * row, TILE * column, 1))
            v = (transform @ windows.reshape(36, -1)).view(36, m * tiles, channels)
            products = torch.bmm(v, kernels).view(36, -1)
            tile = (inverse @ products).view(TILE, TILE, m, down, across, outputs)
            y[i : i + m] = tile.permute(2, 3, 0, 4, 1, 5)
        y = y.view(n, down * TILE, across * TILE, outputs)[:, :height, :width]
        return _within_reach(y.permute(0, 3, 1, 2), x)

    return convolve


def _within_reach(y: Tensor, x: Tensor) -> Tensor:
    """Put exact zeros where no input within reach is other than 0: a tile's transforms leave rounding there."""
    largest = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True))  # N, 1, h, w
    reached = F.max_pool2d(largest, 3, 1, 1) > 0
    return y if bool(reached.all()) else y * reached
