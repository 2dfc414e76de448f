"""The published 30-fold training set: ten rotations, ten skews and ten shears of each film (method.md a.3).

The published code writes the copies to disk once; here the 30 N transformations are drawn once, from named streams, and
applied when a batch is made, so the copies are the same in each epoch and cost no memory.  Each copy is mirrored with
probability one half.  Every transformation zooms in as far as it must, so no empty border is seen.  Projection,
validation and tests never see a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raystudy.films import Films
from raystudy.protopnet.normalise import normalise

MAX_ROTATION, MAX_SHEAR, MAX_SKEW = 15.0, 10.0, 0.2  # degrees, degrees, share of the edge
COPIES_OF_EACH = 10
COPIES = 3 * COPIES_OF_EACH

Matrices = NDArray[np.float64]  # N, 3, 3: homogeneous output to input coordinates, both in -1..1, x to the right


class AugmentedFilms:
    """The 30-fold set of some films, in place of ``Films`` for training steps.

    Position ``copy * N + i`` is copy 0..29 of film i.

    Parameters
    ----------
    films : N films.
    draws : gives the generator of a copy by its number.
    """

    def __init__(self, films: Films, draws: Callable[[int], np.random.Generator]) -> None:
        self._films = films
        kinds = (rotations, skews, shears)
        matrices = [
            kinds[copy // COPIES_OF_EACH](draw, len(films)) @ flips(draw, len(films))
            for copy in range(COPIES)
            for draw in (draws(copy),)
        ]
        device = films.labels.device
        self._matrices = torch.from_numpy(np.concatenate(matrices).astype(np.float32)).to(device)  # 30 N, 3, 3
        self.labels = films.labels.repeat(COPIES)

    def __len__(self) -> int:
        return COPIES * len(self._films)

    def batch(self, index: Tensor) -> Tensor:
        """Return transformed films by position, normalised: (n, 3, S, S) float32, channels last in memory."""
        grey = self._films.grey(index % len(self._films)).float() / 255  # n, S, S
        seen = transform(grey, self._matrices[index])
        return normalise(seen).contiguous(memory_format=torch.channels_last)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield all copies in order, in chunks whose boundaries depend on ``size`` alone."""
        for start in range(0, len(self), size):
            yield self.batch(torch.arange(start, min(start + size, len(self)), device=self.labels.device))


def transform(grey: Tensor, matrices: Tensor) -> Tensor:
    """Return films seen through their transformations, bilinear.

    Parameters
    ----------
    grey : (n, S, S) in [0, 1].
    matrices : (n, 3, 3), homogeneous output to input coordinates.

    Returns
    -------
    (n, S, S) in [0, 1].
    """
    size = grey.shape[-1]
    centres = (torch.arange(size, device=grey.device) * 2 + 1) / size - 1  # pixel centres in -1..1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(1, -1, 3)  # 1, S S, 3
    found = points @ matrices.transpose(1, 2)  # n, S S, 3
    grid = (found[..., :2] / found[..., 2:]).view(-1, size, size, 2)
    return F.grid_sample(grey[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def flips(draw: np.random.Generator, n: int) -> Matrices:
    """Mirror left and right with probability one half."""
    matrices = _identities(n)
    matrices[:, 0, 0] = np.where(draw.random(n) < 0.5, -1.0, 1.0)
    return matrices


def rotations(draw: np.random.Generator, n: int) -> Matrices:
    """Rotate by up to 15 degrees and zoom to the largest upright square inside."""
    angle = np.deg2rad(draw.uniform(-MAX_ROTATION, MAX_ROTATION, n))
    zoom = 1 / (np.cos(angle) + np.abs(np.sin(angle)))
    matrices = _identities(n)
    matrices[:, 0, 0] = matrices[:, 1, 1] = zoom * np.cos(angle)
    matrices[:, 0, 1] = -zoom * np.sin(angle)
    matrices[:, 1, 0] = zoom * np.sin(angle)
    return matrices


def shears(draw: np.random.Generator, n: int) -> Matrices:
    """Shear by up to 10 degrees along x or along y and zoom along that axis."""
    slope = np.tan(np.deg2rad(draw.uniform(-MAX_SHEAR, MAX_SHEAR, n)))
    axis, rows = draw.integers(0, 2, n), np.arange(n)
    matrices = _identities(n)
    matrices[rows, axis, axis] = 1 - np.abs(slope)
    matrices[rows, axis, 1 - axis] = slope
    return matrices


def skews(draw: np.random.Generator, n: int) -> Matrices:
    """Tilt in perspective: one edge of what is seen is shorter by up to a fifth at one or at both of its ends."""
    amount = draw.uniform(0, MAX_SKEW, n)
    kind, edge = draw.integers(0, 3, n), draw.integers(0, 4, n)  # first end, second end, both
    corners = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])  # clockwise from the top left
    matrices = np.empty((n, 3, 3))
    for i in range(n):
        first, second = edge[i], (edge[i] + 1) % 4
        along = corners[second] - corners[first]
        seen = corners.copy()
        if kind[i] in (0, 2):
            seen[first] += amount[i] * along
        if kind[i] in (1, 2):
            seen[second] -= amount[i] * along
        matrices[i] = homography(corners, seen)
    return matrices


def homography(points: NDArray[np.float64], images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the (3, 3) projective map that takes four points (4, 2) to four others."""
    rows: list[list[float]] = []
    for (x, y), (u, v) in zip(points, images, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    solution = np.linalg.solve(np.array(rows), images.ravel())
    return np.append(solution, 1.0).reshape(3, 3)


def _identities(n: int) -> Matrices:
    return np.tile(np.eye(3), (n, 1, 1))
