"""Does a map say which prototype it explains, or only where it fires (method.md, the fifth of the five)?

Two numbers beside any claim about prototype-specific maps: the correlation of maps of different prototypes at the same
cell, and the correlation of a map with the one from shuffled channel weights at its cell.  1.000 means that the map
knows the place only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from raystudy.relevance.prp import PrototypeExplainer


@dataclass(frozen=True)
class Specificity:
    """Means over image and prototype pairs; NaN where n is 0.

    Attributes
    ----------
    same_cell : correlation of maps of two different prototypes, both explained at the cell of the first-named one.
    n_same_cell : pairs of prototypes with different vectors.
    n_natural : of these, the pairs whose arg-max cells are the same by themselves.
    shuffled : correlation of a map with the map from shuffled channel weights.
    n_shuffled : maps.
    conservation : mean sum of a unit-seed map.
    """

    same_cell: float
    n_same_cell: int
    n_natural: int
    shuffled: float
    n_shuffled: int
    conservation: float


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation of maps (..., H, W) over their pixels."""
    a, b = (m.double().flatten(-2) for m in (first, second))
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def measure_specificity(
    explainer: PrototypeExplainer, images: Tensor, prototypes: Tensor, generator: np.random.Generator
) -> Specificity:
    """Measure how specific maps are.

    Parameters
    ----------
    explainer : the prepared model with its rule set.
    images : (N, 3, H, W), normalised.
    prototypes : (N, K) int64; the first of each image gives the common cell.
    generator : draws the shuffles of the channels, one an image and prototype in row-major order.
    """
    own = explainer(images, prototypes)
    n, k, d = own.features.shape
    shuffles = np.stack([generator.permutation(d) for _ in range(n * k)]).reshape(n, k, d)
    order = torch.tensor(shuffles, device=own.features.device)
    other = explainer.from_features(images, own.cells, own.features.gather(2, order))
    shuffled = correlation(own.maps, other)
    common = own if k < 2 else explainer(images, prototypes, cells=own.cells[:, :1].expand(-1, k, -1))
    values: list[float] = []
    natural = 0
    for i in range(n):
        for p, q in combinations(range(k), 2):
            if explainer.same_vector(int(prototypes[i, p]), int(prototypes[i, q])):
                continue
            values.append(float(correlation(common.maps[i, p], common.maps[i, q])))
            natural += bool((own.cells[i, p] == own.cells[i, q]).all())
    return Specificity(
        same_cell=float(np.mean(values)) if values else float("nan"),
        n_same_cell=len(values),
        n_natural=natural,
        shuffled=float(shuffled.mean()),
        n_shuffled=n * k,
        conservation=float(own.maps.double().sum((2, 3)).mean()),
    )
