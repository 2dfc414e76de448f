"""Grey films to network input: three equal channels, ImageNet statistics (method.md a.1)."""

from __future__ import annotations

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(pixels: Tensor) -> Tensor:
    """Normalise grey films.

    Parameters
    ----------
    pixels : (N, H, W) uint8 in 0..255, or floating point in [0, 1].

    Returns
    -------
    (N, 3, H, W) float32, ``(pixel / 255 - mean) / std`` in each channel.
    """
    grey = pixels.to(torch.float32)
    if not pixels.is_floating_point():
        grey = grey / 255
    # Plain numbers: a tensor of constants would make a GPU's queue wait for its copy in every step.
    return torch.stack([(grey - mean) / std for mean, std in zip(MEAN, STD, strict=True)], dim=1)  # N, 3, H, W
