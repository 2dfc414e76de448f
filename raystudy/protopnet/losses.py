"""The four loss terms of ProtoPNet training (method.md a.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from raystudy.protopnet.model import ProtoPNet, ProtoPNetOutput
from raystudy.protopnet.settings import TrainingSettings


class LossTerms(NamedTuple):
    """Scalars of one batch: the weighted total, its terms, and what is only logged."""

    total: Tensor
    cross_entropy: Tensor
    cluster: Tensor
    separation: Tensor
    l1: Tensor
    wrong_class_distance: Tensor  # mean distance to all prototypes of other classes
    correct: Tensor  # number of right predictions


def cluster_and_separation(min_distances: Tensor, labels: Tensor, prototype_class: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean smallest distance to prototypes of the own class and to those of the other classes.

    Parameters
    ----------
    min_distances : (N, P), smallest over the grid.
    labels : (N,) class numbers.
    prototype_class : (P,).
    """
    own = labels[:, None] == prototype_class[None]  # N, P
    cluster = min_distances.masked_fill(~own, torch.inf).amin(1).mean()
    separation = min_distances.masked_fill(own, torch.inf).amin(1).mean()
    return cluster, separation


def wrong_class_l1(model: ProtoPNet) -> Tensor:
    """Return the sum of |W| over entries that join a class to a prototype of another class."""
    classes = torch.arange(model.num_classes, device=model.prototype_class.device)
    other = classes[:, None] != model.prototype_class[None]  # C, P
    return (model.last_layer.weight.abs() * other).sum()


def loss_terms(output: ProtoPNetOutput, labels: Tensor, model: ProtoPNet, settings: TrainingSettings) -> LossTerms:
    """Return the terms of a batch in warm, joint or published last-layer training."""
    min_distances = output.distances.flatten(2).amin(2)  # N, P
    cross_entropy = nn.functional.cross_entropy(output.logits, labels)
    cluster, separation = cluster_and_separation(min_distances, labels, model.prototype_class)
    l1 = wrong_class_l1(model)
    total = (
        settings.coefficient_cross_entropy * cross_entropy
        + settings.coefficient_cluster * cluster
        + settings.coefficient_separation * separation
        + settings.coefficient_l1 * l1
    )
    with torch.no_grad():
        other = (labels[:, None] != model.prototype_class[None]).float()
        wrong = ((min_distances * other).sum(1) / other.sum(1)).mean()
        correct = (output.logits.argmax(1) == labels).sum()
    return LossTerms(total, cross_entropy, cluster, separation, l1, wrong, correct)


def last_layer_loss(logits: Tensor, labels: Tensor, model: ProtoPNet, settings: TrainingSettings) -> LossTerms:
    """Return the terms that move the last layer alone: cluster and separation are constants there and stand as 0."""
    cross_entropy = nn.functional.cross_entropy(logits, labels)
    l1 = wrong_class_l1(model)
    total = settings.coefficient_cross_entropy * cross_entropy + settings.coefficient_l1 * l1
    zero = torch.zeros_like(l1)
    return LossTerms(total, cross_entropy, zero, zero, l1, zero, (logits.argmax(1) == labels).sum())


def mean_pair_distance(prototypes: Tensor) -> Tensor:
    """Return the mean squared distance over all P² ordered pairs of prototypes (P, D, 1, 1), each with itself included.

    Only logged; the published log line counts the P zeros as well.
    """
    flat = prototypes.flatten(1)
    return 2 * nn.functional.pdist(flat).square().sum() / len(flat) ** 2
