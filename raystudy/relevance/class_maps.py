"""From single prototypes to a class: unique prototypes, global class maps, top-k images (method.md d).

Works on what the projection and one evaluation pass left (sources, vectors, N x P minimum distances); no network here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raystudy.relevance.heatmaps import scale_relevance

Superposition = Literal["displayed_mean", "unit_sum", "multiplicity", "score", "maximum"]
SOURCE_TIE = 5e-5  # rounding of a distance at an exact match (method.md a.1)


@dataclass(frozen=True)
class UniquePrototype:
    """Prototypes of one class that are the same patch: the first of them, its class and all members."""

    prototype: int
    label: int
    members: tuple[int, ...]

    @property
    def multiplicity(self) -> int:
        """How many prototypes are this patch."""
        return len(self.members)


def unique_prototypes(
    image_ids: Sequence[str], rows: Sequence[int], cols: Sequence[int], prototypes: Tensor, classes: Sequence[int]
) -> list[UniquePrototype]:
    """Group prototypes by source patch and by bitwise equal vectors (duplicate files).

    Parameters
    ----------
    image_ids, rows, cols : source of each prototype, as the projection recorded them.
    prototypes : (P, D) or (P, D, 1, 1).
    classes : class of each prototype; prototypes of different classes are never merged.

    Returns
    -------
    One entry a distinct prototype, ordered by its lowest index.
    """
    vectors = prototypes.detach().flatten(1).cpu().numpy()
    if not len(image_ids) == len(rows) == len(cols) == len(classes) == len(vectors):
        raise ValueError("sources, vectors and classes must have one entry for each prototype")
    leader = list(range(len(vectors)))

    def root(j: int) -> int:
        while leader[j] != j:
            j = leader[j]
        return j

    seen: dict[tuple[object, ...], int] = {}
    for j, vector in enumerate(vectors):
        label = int(classes[j])
        for key in ((label, image_ids[j], int(rows[j]), int(cols[j])), (label, vector.tobytes())):
            first, own = root(seen.setdefault(key, j)), root(j)
            leader[max(first, own)] = min(first, own)
    groups: dict[int, list[int]] = {}
    for j in range(len(vectors)):
        groups.setdefault(root(j), []).append(j)
    return [UniquePrototype(j, int(classes[j]), tuple(members)) for j, members in groups.items()]


def class_map(
    maps: Tensor,
    superposition: Superposition = "displayed_mean",
    *,
    multiplicities: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
) -> Tensor:
    """Superimpose the maps of a class's unique prototypes.

    Parameters
    ----------
    maps : (U, H, W) unit-seed maps, each on its prototype's source image.
    superposition : "displayed_mean" (default): each map divided by its largest absolute value, then the mean;
        "unit_sum": equal relevance each; "multiplicity", "score": displayed maps weighted; "maximum": elementwise
        maximum of displayed maps.

    Returns
    -------
    (H, W), largest absolute value 1.
    """
    if maps.dim() != 3 or not len(maps):
        raise ValueError(f"maps must be (U, H, W) with U >= 1, not {tuple(maps.shape)}")
    displayed = scale_relevance(maps)
    if superposition == "displayed_mean":
        return scale_relevance(displayed.mean(0))
    if superposition == "unit_sum":
        return scale_relevance(maps.sum(0))
    if superposition == "maximum":
        return scale_relevance(displayed.amax(0))
    weights = {"multiplicity": multiplicities, "score": scores}.get(superposition)
    if weights is None or len(weights) != len(maps):
        raise ValueError(f"superposition {superposition!r} needs one weight for each of {len(maps)} maps")
    weight = torch.tensor([float(w) for w in weights], dtype=maps.dtype, device=maps.device)
    return scale_relevance((displayed * weight.view(-1, 1, 1)).sum(0))


@dataclass(frozen=True)
class TopImages:
    """Nearest images of each prototype: rows of the distance table and whether they are the source, (P, k) each."""

    rows: np.ndarray
    is_source: np.ndarray


def top_images(distances: Tensor, image_ids: Sequence[str], k: int, sources: Sequence[str] | None = None) -> TopImages:
    """Rank images by minimum distance to each prototype, over all classes.

    Parameters
    ----------
    distances : (N, P) minimum distance of every training image to every prototype.
    image_ids : N names; equal distances rank by name.
    k : how many; fewer where there are fewer images.
    sources : source image of each prototype. It ranks first when it ties with the nearest within rounding (5e-5).
    """
    table = distances.detach().cpu().numpy()
    if table.ndim != 2 or len(table) != len(image_ids):
        raise ValueError(f"distances must be (N, P) with one row for each of {len(image_ids)} images")
    if sources is not None and len(sources) != table.shape[1]:
        raise ValueError(f"sources must name one image for each of {table.shape[1]} prototypes")
    if k < 1:
        raise ValueError("k must be at least 1")
    names = np.asarray(image_ids)
    by_name = np.argsort(names, kind="stable")
    rows: list[np.ndarray] = []
    for j in range(table.shape[1]):
        order = by_name[np.argsort(table[by_name, j], kind="stable")]
        if sources is not None:
            own = order[names[order] == sources[j]]
            if len(own) and table[own[0], j] <= table[order[0], j] + SOURCE_TIE:
                order = np.concatenate([own[:1], order[order != own[0]]])
        rows.append(order[:k])
    chosen = np.stack(rows)
    flags = np.zeros(chosen.shape, dtype=bool) if sources is None else names[chosen] == np.asarray(sources)[:, None]
    return TopImages(chosen, flags)
