"""How much a map depends on the prototype: the published rule hardly, the separating rule does (method.md, point 5)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raystudy.relevance import PrototypeExplainer, Relevance, measure_specificity
from raystudy.relevance.specificity import correlation
from raystudy.streams import stream
from tests.relevance.nets import random_images, random_net


def test_correlation_is_pearsons() -> None:
    a, b = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()
    expected = [np.corrcoef(a[i].ravel(), b[i].ravel())[0, 1] for i in range(3)]
    assert correlation(a, b).tolist() == pytest.approx(expected, rel=1e-5)


def test_published_maps_forget_the_prototype_and_separating_maps_do_not() -> None:
    net, images = random_net("resnet18", dim=64), random_images(2, 160)
    prototypes = torch.tensor([[0, 1, 4], [2, 3, 5]])
    published, separating = (
        measure_specificity(PrototypeExplainer(net, rule), images, prototypes, stream(0, "specificity"))
        for rule in ("published", "separating")
    )
    assert published.n_same_cell == separating.n_same_cell == 6
    assert published.n_shuffled == 6
    assert published.same_cell > 0.99
    assert published.shuffled > 0.99
    assert separating.same_cell < published.same_cell - 0.02
    assert separating.shuffled < published.shuffled - 0.02
    assert published.conservation == pytest.approx(1, abs=1e-3)
    assert separating.conservation == pytest.approx(1, abs=1e-3)


def test_the_measure_repeats_with_its_stream_and_skips_equal_prototypes() -> None:
    net, images = random_net(layers=2), random_images(1)
    with torch.no_grad():
        net.prototypes[1] = net.prototypes[0]
    explainer = PrototypeExplainer(net)
    first, second = (measure_specificity(explainer, images, torch.tensor([[0, 1]]), stream(1, "s")) for _ in range(2))
    assert first.shuffled == second.shuffled
    assert first.n_same_cell == 0
    assert math.isnan(first.same_cell)


class WithoutSecondImage(PrototypeExplainer):
    """Explains as ever, but finds nothing in the second image."""

    def __call__(self, images: Tensor, prototypes: Tensor, **options: Any) -> Relevance:
        found = super().__call__(images, prototypes, **options)
        return replace(found, maps=found.maps * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))


def test_maps_without_relevance_are_left_out_of_correlations_and_their_n_but_not_of_conservation() -> None:
    net, images = random_net(layers=2), random_images(2)
    explainer, prototypes = PrototypeExplainer(net), torch.tensor([[0, 1], [2, 3]])
    whole = measure_specificity(explainer, images[:1], prototypes[:1], stream(1, "s"))
    with_empty = measure_specificity(WithoutSecondImage(net), images, prototypes, stream(1, "s"))
    assert (with_empty.n_shuffled, with_empty.n_same_cell, with_empty.n_maps) == (2, 1, 4)
    assert with_empty.shuffled == pytest.approx(whole.shuffled, abs=1e-6)
    assert with_empty.same_cell == pytest.approx(whole.same_cell, abs=1e-6)
    assert with_empty.conservation == pytest.approx(whole.conservation / 2, abs=1e-6)
