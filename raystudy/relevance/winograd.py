"""Winograd's F(4 x 4, 3 x 3) in plain torch: a 3 x 3 convolution with a quarter of the multiplications.

Lavin and Gray 2016.  Tiles of 6 x 6 inputs give 4 x 4 outputs; per tile position one matrix product over channels.  In
float32 the rounding is that of the direct form or smaller (shorter sums), but relative to the largest values of the
tile: sums that are small or zero beside their neighbours are mended.  Worth it on CPUs from 64 channels; torch has no
float32 kernel of its own for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 4
CHUNK_BYTES = 2 << 20  # of transformed input at a time, so that it stays in the cache
FEWEST_TILES = 16  # with fewer, reading the transformed kernels costs more than the multiplications that they save
SMALL = 1e-3  # of a channel's largest sum: below it a sum of positive terms is computed directly

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
    return on_cpu and weight.shape[2:] == (3, 3) and min(weight.shape[:2]) >= 64


def _fits(n: int, height: int, width: int) -> bool:
    """Whether the images have enough tiles and their grid fills them well enough."""
    tiles = -(-height // TILE) * -(-width // TILE)
    return n * tiles >= FEWEST_TILES and tiles * TILE**2 < 2 * height * width


def convolution(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Prepare ``conv2d(., weight, padding=1)`` for ``weight`` (O, I, 3, 3) and channels-last input.

    Outputs that no input other than 0 reaches are exactly 0.
    """
    tiled = _tiled([weight])

    @cache
    def direct() -> Tensor:
        return weight.contiguous(memory_format=torch.channels_last)

    def convolve(x: Tensor) -> Tensor:
        if not _fits(len(x), *x.shape[2:]):
            return F.conv2d(x, direct(), padding=1)
        return _within_reach(tiled(x)[0], x)

    return convolve


def output_and_positive_sum(weight: Tensor, bias: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Prepare ``conv2d(a, weight, bias)`` and ``conv2d(a, weight+)`` of one input ``a`` >= 0; the input is read once.

    The second result is a denominator, so that its error must be small beside itself: where it is below ``SMALL`` of
    its channel's largest value, for example beside dead regions, the position is computed directly.
    """
    positive = weight.clamp(min=0)
    tiled = _tiled([weight, positive])

    @cache
    def both() -> Tensor:
        return torch.cat([weight, positive]).contiguous(memory_format=torch.channels_last)

    @cache
    def rows() -> Tensor:
        return positive.permute(2, 3, 1, 0).reshape(-1, len(weight))  # 9 I, O

    def convolve(a: Tensor) -> tuple[Tensor, Tensor]:
        if not _fits(len(a), *a.shape[2:]):
            y, z = F.conv2d(a, both(), padding=1).tensor_split(2, dim=1)
            return y + bias.view(1, -1, 1, 1), z
        y, z = tiled(a)
        largest = z.amax((2, 3), keepdim=True)
        small = torch.sub(z, largest, alpha=SMALL).amin(1) < 0  # N, h, w
        if bool(small.any()):
            z.permute(0, 2, 3, 1)[small] = _patches(a, small) @ rows()
        return y.add_(bias.view(1, -1, 1, 1)), z

    return convolve


def _tiled(weights: Sequence[Tensor]) -> Callable[[Tensor], list[Tensor]]:
    """Prepare ``conv2d(., w, padding=1)`` of several weights (O, I, 3, 3) for one channels-last input."""
    weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    input_1d, kernel_1d, output_1d = (torch.tensor(m, dtype=torch.float64) for m in (_INPUT, _KERNEL, _OUTPUT))
    transform = torch.kron(input_1d, input_1d).to(weight.dtype)  # 36, 36
    inverse = torch.kron(output_1d, output_1d).to(weight.dtype)  # 16, 36
    both = torch.kron(kernel_1d, kernel_1d).to(weight.dtype)  # 36, 9
    outputs, inputs = weight.shape[:2]
    kernels = (both @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, inputs, outputs)
    edges = [0, *accumulate(len(w) for w in weights)]

    def convolve(x: Tensor) -> list[Tensor]:
        n, channels, height, width = x.shape
        down, across = -(-height // TILE), -(-width // TILE)
        tiles = down * across
        step = max(1, min(n, max(CHUNK_BYTES, kernels.nbytes) // (36 * tiles * channels * x.element_size())))
        results = [x.new_empty(n, down, TILE, across, TILE, stop - start) for start, stop in pairwise(edges)]
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
            tile = (inverse @ products).view(TILE, TILE, m, down, across, outputs).permute(2, 3, 0, 4, 1, 5)
            for y, (start, stop) in zip(results, pairwise(edges), strict=True):
                y[i : i + m] = tile[..., start:stop]
        grids = [y.view(n, down * TILE, across * TILE, -1)[:, :height, :width].contiguous() for y in results]
        return [y.permute(0, 3, 1, 2) for y in grids]

    return convolve


def _patches(x: Tensor, where: Tensor) -> Tensor:
    """Return the 3 x 3 surroundings (m, 9 C) of the positions ``where`` (N, h, w) in ``x`` (N, C, h, w)."""
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # N, h + 2, w + 2, C
    image, row, column = where.nonzero().unbind(1)
    return torch.cat([padded[image, row + i, column + j] for i in range(3) for j in range(3)], dim=1)


def _within_reach(y: Tensor, x: Tensor) -> Tensor:
    """Put exact zeros where no input within reach is other than 0: a tile's transforms leave rounding there."""
    largest = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True))  # N, 1, h, w
    reached = F.max_pool2d(largest, 3, 1, 1) > 0
    return y if bool(reached.all()) else y * reached
