"""Prototype projection, the "push": every prototype becomes its nearest training patch of its class (method.md a.4).

Ties go to the first image, then to the first cell in row-major order, whatever the batch size and however the images
are shared out.  `project_features` starts from features that an evaluation pass has left, so that one pass over the
films serves projection, last-layer training and the search for the nearest images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    images : normalised (N, 3, H, W), or an iterable of such batches, in the order of `labels`; each batch of an
        iterable is checked when it comes.
    labels : (N,) whole class numbers.
    image_ids : N names, for the record.

    Raises
    ------
    ValueError : training mode; no positive batch size; weights, pixels or activations not finite; images that are none,
        or of several sizes; a class without images; lengths that differ.  The model is then unchanged.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    check_projection(model, labels)
    _check_lengths(images if isinstance(images, Tensor) else labels, labels, image_ids)
    batches: Iterable[Tensor] = torch.split(images, batch_size) if isinstance(images, Tensor) else images
    if isinstance(images, Tensor):
        _check_pixels(model, images, None)
    parts: list[Tensor] = []
    size: torch.Size | None = None
    for batch in batches:
        size = _check_pixels(model, batch, size)
        parts.append(model.features(batch, finite=True))
    features = torch.cat(parts)  # N, D, h, w
    return project_features(model, features, labels, image_ids)


@torch.no_grad()
def project_features(
    model: ProtoPNet, features: Tensor, labels: Tensor, image_ids: Sequence[str], chunk: int = 256
) -> ProjectionRecord:
    """Project onto features (N, D, h, w) that one evaluation pass has left; see `project_prototypes`."""
    check_projection(model, labels)
    _check_lengths(features, labels, image_ids)
    nearest = nearest_patches(model, features, labels, chunk=chunk)
    if not bool(torch.isfinite(nearest.distances).all()):
        raise ValueError("distances must be finite: the prototypes are too large to compare with")
    columns = features.shape[3]
    images, cells = _integers(nearest.images), _integers(nearest.cells)
    model.prototypes.copy_(nearest.vectors[:, :, None, None])
    return ProjectionRecord(
        [str(image_ids[i]) for i in images],
        [cell // columns for cell in cells],
        [cell % columns for cell in cells],
        [float(d) for d in nearest.distances.cpu().numpy()],
        _duplicates(list(zip(images, cells, strict=True)), nearest.vectors, _integers(model.prototype_class)),
    )


class NearestPatches(NamedTuple):
    """For every prototype the nearest patch of its class among some images.

    distances : (P,), infinite where no image is of the class.  images, cells : (P,) long, image number and row-major
    cell.  vectors : (P, D), the patch, bit for bit.
    """

    distances: Tensor
    images: Tensor
    cells: Tensor
    vectors: Tensor


@torch.no_grad()
def nearest_patches(
    model: ProtoPNet, features: Tensor, labels: Tensor, first_image: int = 0, chunk: int = 256
) -> NearestPatches:
    """Search a shard of the images, (n, D, h, w), whose numbers begin at ``first_image``."""
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features must be finite: the network's activations overflow or its input holds a NaN")
    found: NearestPatches | None = None
    for start in range(0, len(features), chunk):
        z = features[start : start + chunk]
        distances = model.distances_of(z).flatten(2)  # n, P, hw
        own = labels[start : start + chunk, None] == model.prototype_class[None]  # n, P
        flat = distances.masked_fill(~own[:, :, None], torch.inf).transpose(0, 1).flatten(1)  # P, n hw
        nearest = flat.amin(1)
        # Of equal distances `min` may name any, `argmax` names the first.
        position = (flat == nearest[:, None]).long().argmax(1)
        image, cell = position // distances.shape[2], position % distances.shape[2]
        vectors = z.flatten(2)[image, :, cell]  # P, D
        here = NearestPatches(nearest, first_image + start + image, cell, vectors)
        found = here if found is None else merge_patches(found, here)
    if found is None:
        raise ValueError("at least one image is needed")
    return found


def merge_patches(a: NearestPatches, b: NearestPatches) -> NearestPatches:
    """Join what two shards found, by distance, then image number, then cell; the order of merging does not matter."""
    earlier = (b.images < a.images) | ((b.images == a.images) & (b.cells < a.cells))
    b_wins = (b.distances < a.distances) | ((b.distances == a.distances) & earlier)  # P
    return NearestPatches(
        torch.where(b_wins, b.distances, a.distances),
        torch.where(b_wins, b.images, a.images),
        torch.where(b_wins, b.cells, a.cells),
        torch.where(b_wins[:, None], b.vectors, a.vectors),
    )


def check_projection(model: ProtoPNet, labels: Tensor) -> None:
    """Refuse what no projection can be made of, before any work."""
    if any(module.training for module in model.modules()):
        raise ValueError("projection needs the model in eval mode: call model.eval() first")
    check_finite(model)
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be (N,) whole class numbers, not {tuple(labels.shape)} {labels.dtype}")
    present, classes = set(_integers(labels)), set(range(model.num_classes))
    if present - classes:
        raise ValueError(f"labels must lie in 0..{model.num_classes - 1}, not {min(present - classes)}")
    empty = sorted(classes - present)
    if empty:
        raise ValueError(f"class {empty[0]} has no image, its prototypes would have no source")


def _check_pixels(model: ProtoPNet, images: Tensor, size: torch.Size | None) -> torch.Size:
    """Refuse images that are none, not finite, or of another size than the first; return their size."""
    model.check_images(images)
    if size is not None and images.shape[1:] != size:
        raise ValueError(f"all images must have one size, not {tuple(size)} and {tuple(images.shape[1:])}")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images must be finite: a pixel is NaN or infinite")
    return images.shape[1:]


def _check_lengths(images: Tensor, labels: Tensor, image_ids: Sequence[str]) -> None:
    if not len(images) == len(labels) == len(image_ids):
        raise ValueError(f"{len(images)} images, {len(labels)} labels and {len(image_ids)} ids do not match")


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
