"""Does a map say which prototype it explains, or only where it fires (method.md, the fifth of the five)?

Two numbers beside any claim about prototype-specific maps: the correlation of maps of different prototypes at the same
cell, and the correlation of a map with the one from shuffled channel weights at its cell.  1.000 means that the map
knows the place only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from raystudy.relevance.prp import PrototypeExplainer


@dataclass(frozen=True)
class Specificity:
    """Means over image and prototype pairs; NaN where n is 0. A pair with a map that is 0 everywhere is left out.

    Attributes
    ----------
    same_cell : correlation of maps of two different prototypes, both explained at the cell of the first-named one.
    n_same_cell : pairs of prototypes with different vectors.
    n_natural : of these, the pairs whose arg-max cells are the same by themselves.
    shuffled : correlation of a map with the map from shuffled channel weights.
    n_shuffled : maps.
    conservation : mean sum of a unit-seed map.
    n_maps : maps of that mean; maps that are 0 everywhere are among them.
    """

    same_cell: float
    n_same_cell: int
    n_natural: int
    shuffled: float
    n_shuffled: int
    conservation: float
    n_maps: int


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation of maps (..., H, W) over their pixels; NaN where one has the same value everywhere."""
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
    shuffled = shuffled[~shuffled.isnan()]
    common = own if k < 2 else explainer(images, prototypes, cells=own.cells[:, :1].expand(-1, k, -1))
    values: list[float] = []
    natural = 0
    for i in range(n):
        for p, q in combinations(range(k), 2):
            if explainer.same_vector(int(prototypes[i, p]), int(prototypes[i, q])):
                continue
            value = float(correlation(common.maps[i, p], common.maps[i, q]))
            if math.isnan(value):
                continue
            values.append(value)
            natural += bool((own.cells[i, p] == own.cells[i, q]).all())
    return Specificity(
        same_cell=float(np.mean(values)) if values else float("nan"),
        n_same_cell=len(values),
        n_natural=natural,
        shuffled=float(shuffled.mean()),
        n_shuffled=len(shuffled),
        conservation=float(own.maps.double().sum((2, 3)).mean()),
        n_maps=n * k,
    )


def pool_specificity(parts: Sequence[Specificity]) -> Specificity:
    """Return the means over the pairs and maps of all parts, such as classes that have different numbers of them."""

    def mean(name: str, count: str) -> float:
        values = [(getattr(part, name), getattr(part, count)) for part in parts if getattr(part, count)]
        return sum(v * n for v, n in values) / sum(n for _, n in values) if values else float("nan")

    def total(count: str) -> int:
        return sum(getattr(part, count) for part in parts)

    return Specificity(
        same_cell=mean("same_cell", "n_same_cell"),
        n_same_cell=total("n_same_cell"),
        n_natural=total("n_natural"),
        shuffled=mean("shuffled", "n_shuffled"),
        n_shuffled=total("n_shuffled"),
        conservation=mean("conservation", "n_maps"),
        n_maps=total("n_maps"),
    )
