"""Prototype projection, the "push": every prototype becomes its nearest training patch of its class (method.md a.4).

Ties go to the first image, then to the first cell in row-major order, whatever the batch size.  The pass also keeps
every image's smallest distance to every prototype before the projection and the features, which later stages reuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raystudy.protopnet.model import ProtoPNet, check_finite


@dataclass(frozen=True)
class ProjectionRecord:
    """Where every prototype comes from; all lists have length P.

    ``distances`` are those before the projection.  ``duplicate_of[j]`` is the lowest prototype of the same class with
    the same image and cell, or a bitwise equal vector; j itself when there is none.
    """

    image_ids: list[str]
    rows: list[int]
    cols: list[int]
    distances: list[float]
    duplicate_of: list[int]


@torch.no_grad()
def project_prototypes(
    model: ProtoPNet,
    images: Tensor | Iterable[Tensor],
    labels: Tensor,
    image_ids: Sequence[str],
    batch_size: int = 100,
) -> ProjectionRecord:
    """Overwrite ``model.prototypes`` by their nearest training patches.

    Parameters
    ----------
    model : in eval mode.
    images : normalised (N, 3, H, W), or an iterable of such batches, in the order of `labels`.
    labels : (N,) class numbers.
    image_ids : N names, for the record.

    Raises
    ------
    ValueError : training mode, weights or features not finite, a class without images, lengths that differ. The model
        is then unchanged.
    """
    check_projection(model, labels)
    batches: Iterable[Tensor] = torch.split(images, batch_size) if isinstance(images, Tensor) else images
    features = torch.cat([model.features(batch) for batch in batches])  # N, D, h, w
    return project_features(model, features, labels, image_ids)


@torch.no_grad()
def project_features(
    model: ProtoPNet, features: Tensor, labels: Tensor, image_ids: Sequence[str], chunk: int = 256
) -> ProjectionRecord:
    """Project onto features (N, D, h, w) that one evaluation pass has left; see `project_prototypes`."""
    check_projection(model, labels)
    if not len(features) == len(labels) == len(image_ids):
        raise ValueError(f"{len(features)} images, {len(labels)} labels and {len(image_ids)} ids do not match")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features must be finite")
    columns = features.shape[3]
    best = torch.full((len(model.prototypes),), torch.inf, device=features.device)  # P
    image, cell = torch.zeros_like(best, dtype=torch.long), torch.zeros_like(best, dtype=torch.long)
    for start in range(0, len(features), chunk):
        distances = model.distances_of(features[start : start + chunk]).flatten(2)  # n, P, hw
        own = labels[start : start + chunk, None] == model.prototype_class[None]  # n, P
        flat = distances.masked_fill(~own[:, :, None], torch.inf).transpose(0, 1).flatten(1)  # P, n hw
        nearest, position = flat.min(1)
        # `min` may name any of several equal positions: take the first.
        position = (flat == nearest[:, None]).long().argmax(1)
        closer = nearest < best
        best = torch.where(closer, nearest, best)
        image = torch.where(closer, start + position // distances.shape[2], image)
        cell = torch.where(closer, position % distances.shape[2], cell)
    rows, cols = cell // columns, cell % columns
    patches = features[image, :, rows, cols]  # P, D, copied bit for bit
    model.prototypes.copy_(patches[:, :, None, None])
    sources = list(zip(_integers(image), _integers(cell), strict=True))
    return ProjectionRecord(
        [str(image_ids[i]) for i in _integers(image)],
        _integers(rows),
        _integers(cols),
        [float(d) for d in best.cpu().numpy()],
        _duplicates(sources, patches, _integers(model.prototype_class)),
    )


def check_projection(model: ProtoPNet, labels: Tensor) -> None:
    """Refuse what no projection can be made of, before any work."""
    if any(module.training for module in model.modules()):
        raise ValueError("projection needs the model in eval mode: call model.eval() first")
    check_finite(model)
    empty = sorted(set(range(model.num_classes)) - set(_integers(labels)))
    if empty:
        raise ValueError(f"class {empty[0]} has no image, its prototypes would have no source")


def _duplicates(sources: list[tuple[int, int]], patches: Tensor, classes: list[int]) -> list[int]:
    """Return for every prototype the lowest one of its class with the same source or the same vector."""
    vectors = [p.cpu().numpy().tobytes() for p in patches]
    first: dict[tuple[int, object], int] = {}
    out: list[int] = []
    for j, (source, vector) in enumerate(zip(sources, vectors, strict=True)):
        known = [first[key] for key in ((classes[j], source), (classes[j], vector)) if key in first]
        lowest = min([j, *known])
        for key in ((classes[j], source), (classes[j], vector)):
            first.setdefault(key, lowest)
        out.append(lowest)
    return out


def _integers(tensor: Tensor) -> list[int]:
    return [int(v) for v in tensor.cpu().numpy()]
