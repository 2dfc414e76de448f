"""Masked images of AD/AI: the half that a map calls least active becomes noise (method.md c).

In: maps of one image, whatever method made them.  Out: masks, masked images and the prototypes' scores on them.  Noise,
ties and the random ranking come from streams of (study seed, image id, draw): the same for all methods and prototypes
of an image, whoever computes it and in whatever order.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from raystudy.protopnet.model import ProtoPNet, check_finite
from raystudy.protopnet.normalise import MEAN, STD
from raystudy.streams import stream

MASKED_BATCH = 32  # masked images a forward pass; a constant, so that results do not depend on the machine


def masked_count(size: int, share: float = 0.5) -> int:
    """Return how many of ``size`` positions are masked: the whole part of ``share * size`` (25088 of 50176)."""
    if not 0 < share < 1:
        raise ValueError(f"the masked share must lie between 0 and 1, got {share}")
    return int(np.floor(share * size + 1e-9))


def least_activated(maps: ArrayLike, ties: ArrayLike, share: float = 0.5) -> NDArray[np.bool_]:
    """Mark the least activated positions of each map, by rank, so that every mask has the same size.

    Equal to the first ``masked_count`` entries of ``np.lexsort((ties, map))``, in linear time.

    Parameters
    ----------
    maps : (K, H, W) signed; ascending, so negative relevance goes first.
    ties : (H, W) a random number per position; among equal values the smaller goes first.

    Returns
    -------
    (K, H, W) bool, exactly ``masked_count(H * W, share)`` true in each.

    Raises
    ------
    ValueError for maps with NaN or infinite values, or ties of another shape.
    """
    stack = np.asarray(maps)
    order = np.asarray(ties)
    if stack.ndim != 3 or order.shape != stack.shape[1:]:
        raise ValueError(f"maps must be (K, H, W) and ties (H, W), got {stack.shape} and {order.shape}")
    if not np.isfinite(stack).all():
        raise ValueError("maps must be finite: a position without a rank cannot be masked")
    flat = stack.reshape(len(stack), -1)  # K, H W
    count = masked_count(flat.shape[1], share)
    masks = np.zeros(flat.shape, dtype=bool)
    for row, mask in zip(flat, masks, strict=True):
        if count == 0:
            continue
        limit = np.partition(row, count - 1)[count - 1]
        mask[row < limit] = True
        equal = np.flatnonzero(row == limit)
        missing = count - int(np.count_nonzero(mask))
        mask[equal[np.argsort(order.ravel()[equal], kind="stable")[:missing]]] = True
    return masks.reshape(stack.shape)


def mask_noise(
    study_seed: int, image_id: str, draw: int, size: tuple[int, int], kind: Literal["grey", "per_channel"] = "grey"
) -> NDArray[np.float32]:
    """Return the noise of one image and draw: (3, H, W) uniform in [0, 1), in pixel space; grey: equal channels."""
    channels = 1 if kind == "grey" else 3
    field = stream(study_seed, "mask noise", image_id, draw).random((channels, *size), dtype=np.float32)
    return np.ascontiguousarray(np.broadcast_to(field, (3, *size)))


def mask_ties(study_seed: int, image_id: str, draw: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """Return (H, W) random numbers that order equal map values of one image and draw."""
    return stream(study_seed, "mask ties", image_id, draw).random(size)


def random_ranking(study_seed: int, image_id: str, draw: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """Return the control's map, (H, W): a random ranking of positions, one per image and draw for all prototypes."""
    return stream(study_seed, "random ranking", image_id, draw).random(size)


def masked_images(image: Tensor, masks: Tensor, noise: Tensor) -> Tensor:
    """Replace the masked positions by noise, in all three channels together.

    Parameters
    ----------
    image : (3, H, W) normalised.  masks : (K, H, W) bool.
    noise : (3, H, W) in pixel space, [0, 1); it is normalised here as a film's pixels are.

    Returns
    -------
    (K, 3, H, W) normalised.
    """
    mean = torch.tensor(MEAN, device=image.device).view(3, 1, 1)
    std = torch.tensor(STD, device=image.device).view(3, 1, 1)
    fill = (noise.to(image.device, image.dtype) - mean) / std
    return torch.where(masks.to(image.device).unsqueeze(1), fill, image)


@torch.no_grad()
def masked_similarities(
    model: ProtoPNet, image: Tensor, masks: Tensor, noise: Tensor, batch_size: int = MASKED_BATCH
) -> Tensor:
    """Return (K, P) float32 similarity scores of all prototypes on the K masked images.

    Parameters
    ----------
    model : a ProtoPNet in eval mode, un-canonised; positions are maximised over anew.
    image : (3, H, W) normalised.  masks : (K, H, W) bool.  noise : (3, H, W) in pixel space.

    Raises
    ------
    ValueError for a model in training mode or not finite, other shapes, pixels that are not finite, before any work;
    and for activations that overflow on a masked image.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("masked images are scored in eval mode: call model.eval() first")
    if image.ndim != 3 or image.shape[0] != 3 or noise.shape != image.shape or masks.shape[1:] != image.shape[1:]:
        shapes = f"{tuple(image.shape)}, {tuple(noise.shape)} and {tuple(masks.shape)}"
        raise ValueError(f"image and noise must be (3, H, W) and masks (K, H, W), not {shapes}")
    for name, pixels in (("image", image), ("noise", noise)):
        if not bool(torch.isfinite(pixels).all()):
            raise ValueError(f"the {name} must be finite: a pixel is NaN or infinite")
    check_finite(model)
    parts: list[Tensor] = []
    for at in range(0, len(masks), batch_size):
        masked = masked_images(image, masks[at : at + batch_size], noise)
        parts.append(model.compare(model.features(masked, finite=True)).similarities)
    return torch.cat(parts)
