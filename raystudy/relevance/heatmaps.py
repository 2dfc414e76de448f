"""Heat maps for people: upsampling, display scaling, boxes and overlays (method.md a.5, b.1).

All functions take and return tensors of plain numbers; nothing is drawn or written here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# Control points of the colour maps at equal distances; linear between them.
_JET = ((0, 0, 0.5), (0, 0, 1), (0, 0.5, 1), (0, 1, 1), (0.5, 1, 0.5), (1, 1, 0), (1, 0.5, 0), (1, 0, 0), (0.5, 0, 0))
_SEISMIC = ((0, 0, 0.3), (0, 0, 1), (1, 1, 1), (1, 0, 0), (0.5, 0, 0))


def upsample_activation(grid: Tensor, size: tuple[int, int], mode: Literal["cubic", "bilinear"] = "cubic") -> Tensor:
    """Enlarge similarity maps to image size.

    Parameters
    ----------
    grid : (..., h, w).
    size : (H, W).
    mode : "cubic" is what ProtoPNet's code does (OpenCV INTER_CUBIC), "bilinear" what the paper says (INTER_LINEAR).

    Returns
    -------
    (..., H, W).
    """
    if mode not in ("cubic", "bilinear"):
        raise ValueError(f"upsampling must be cubic or bilinear, not {mode!r}")
    flat = grid.reshape(-1, 1, *grid.shape[-2:])
    large = F.interpolate(flat, size=size, mode="bicubic" if mode == "cubic" else "bilinear", align_corners=False)
    return large.reshape(*grid.shape[:-2], *size)


def scale_activation(heat: Tensor) -> Tensor:
    """Scale (..., H, W) to [0, 1]: subtract the minimum, divide by the new maximum; a constant map becomes 0."""
    low = heat - heat.amin((-2, -1), keepdim=True)
    high = low.amax((-2, -1), keepdim=True)
    return low / torch.where(high == 0, 1.0, high)


def scale_relevance(maps: Tensor) -> Tensor:
    """Scale (..., H, W) to [-1, 1] by the maximum of the absolute value; a map of zeros stays."""
    high = maps.abs().amax((-2, -1), keepdim=True)
    return maps / torch.where(high == 0, 1.0, high)


def crop_box(heat: Tensor, percentile: float = 95) -> tuple[int, int, int, int]:
    """Return the smallest box around the pixels of (H, W) at or above a percentile.

    Returns
    -------
    top, bottom, left, right; bottom and right are exclusive.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must lie in 0..100, not {percentile}")
    # float64 as numpy.percentile's linear interpolation; sorted by hand because quantile limits its input's size
    ordered = heat.flatten().double().sort().values
    position = percentile / 100 * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    threshold = ordered[below] + (position - below) * (ordered[above] - ordered[below])
    inside = heat.double() >= threshold
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _colours(values: Tensor, points: tuple[tuple[float, float, float], ...]) -> Tensor:
    table = torch.tensor(points, dtype=values.dtype, device=values.device)  # control points, 3
    place = values.clamp(0, 1) * (len(table) - 1)
    below = place.floor().long().clamp(max=len(table) - 2)
    share = (place - below).unsqueeze(-1)
    return table[below] * (1 - share) + table[below + 1] * share


def overlay_activation(image: Tensor, heat: Tensor) -> Tensor:
    """ProtoPNet's overlay, ``0.5 image + 0.3 colours`` (jet).

    Parameters
    ----------
    image : (H, W) grey in [0, 1].
    heat : (H, W) similarity map of the image's size.

    Returns
    -------
    (H, W, 3) in [0, 1].
    """
    return 0.5 * image.unsqueeze(-1) + 0.3 * _colours(scale_activation(heat), _JET)


def overlay_relevance(image: Tensor, relevance: Tensor) -> Tensor:
    """PRP's overlay, ``0.2 image + 0.6 colours`` (seismic, white at 0).

    Parameters
    ----------
    image : (H, W) grey in [0, 1].
    relevance : (H, W) signed map.

    Returns
    -------
    (H, W, 3) in [0, 1].
    """
    return 0.2 * image.unsqueeze(-1) + 0.6 * _colours((scale_relevance(relevance) + 1) / 2, _SEISMIC)
