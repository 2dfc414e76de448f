"""Pruning of prototypes that other classes activate as well (method.md a.6); no part of the paper's reproduction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raystudy.protopnet.model import ProtoPNet


def prototypes_to_keep(
    min_distances: Tensor, labels: Tensor, prototype_class: Tensor, *, nearest: int = 6, required: int = 3
) -> Tensor:
    """Say which prototypes have enough images of their own class among the images nearest to them.

    Parameters
    ----------
    min_distances : (N, P) of the training images of all classes, after a projection.
    labels : (N,).
    prototype_class : (P,).
    nearest : how many images to look at; equal distances are taken in the order of images.
    required : how many of them must be of the prototype's class.

    Returns
    -------
    (P,) bool.
    """
    n = len(min_distances)
    if not 1 <= required <= nearest <= n:
        raise ValueError(f"1 <= required <= nearest <= images must hold, not 1 <= {required} <= {nearest} <= {n}")
    closest = min_distances.sort(dim=0, stable=True).indices[:nearest]  # nearest, P
    return (labels[closest] == prototype_class[None]).sum(0) >= required


@torch.no_grad()
def drop_prototypes(model: ProtoPNet, keep: Tensor) -> None:
    """Take prototypes out of a model, with their columns of the last layer; optimizers must be built anew.

    Raises
    ------
    ValueError : a class would lose all its prototypes; the model is then unchanged.
    """
    classes = model.prototype_class[keep]
    bare = sorted(set(range(model.num_classes)) - {int(c) for c in classes.cpu().numpy()})
    if bare:
        raise ValueError(f"class {bare[0]} would lose all its prototypes: lower `required`")
    model.prototypes = nn.Parameter(model.prototypes[keep])
    model.prototype_class = classes
    model.last_layer.weight = nn.Parameter(model.last_layer.weight[:, keep])
    model.last_layer.in_features = len(classes)
