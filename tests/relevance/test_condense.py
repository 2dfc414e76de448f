"""Maps that are combinations of others are found and given back."""

from __future__ import annotations

import pytest
import torch

from raystudy.relevance import PrototypeExplainer
from raystudy.relevance.condense import condense
from tests.relevance.nets import random_images, random_net


def test_combinations_are_found_and_given_back() -> None:
    g = torch.Generator().manual_seed(0)
    basis = torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64)
    mix = torch.randn(2, 7, 3, generator=g, dtype=torch.float64)
    mix[1, :, 2] = 0  # the second image has two dimensions only
    maps = torch.einsum("nkr,nrhw->nkhw", mix, basis)
    fewer = condense(maps, 1e-6)
    assert fewer is not None
    chosen, coefficients = fewer
    assert chosen.shape == (2, 3)
    kept = maps[torch.arange(2)[:, None], chosen]
    torch.testing.assert_close(torch.einsum("nkr,nrhw->nkhw", coefficients, kept), maps, rtol=0, atol=1e-7)


def test_independent_maps_are_all_carried_and_zero_maps_stay_zero() -> None:
    assert condense(torch.eye(4).view(1, 4, 4), 1e-3) is None
    fewer = condense(torch.tensor([[[0.0, 0.0], [0.0, 2.0], [0.0, -3.0]]]), 1e-3)
    assert fewer is not None
    chosen, coefficients = fewer
    assert chosen.shape == (1, 1)
    kept = torch.tensor([0.0, 2.0, -3.0])[chosen[0, 0]]
    assert (coefficients[0, :, 0] * kept).tolist() == pytest.approx([0, 2, -3])


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
def test_no_map_is_further_off_than_the_tolerance(tolerance: float) -> None:
    g = torch.Generator().manual_seed(1)
    spectrum = 10.0 ** -torch.arange(8.0)
    maps = (torch.randn(1, 8, 8, generator=g) * spectrum) @ torch.linalg.qr(torch.randn(20, 20, generator=g))[0][:8]
    fewer = condense(maps, tolerance)
    assert fewer is not None
    chosen, coefficients = fewer
    error = (coefficients.float() @ maps[:, chosen[0]] - maps).norm(dim=2) / maps.norm(dim=2)
    assert error.max() <= tolerance * 1.001


def test_equal_prototypes_get_equal_maps_from_one_pass() -> None:
    net, images = random_net(), random_images(2, 96)
    with torch.no_grad():
        net.prototypes[1] = net.prototypes[0]
        net.prototypes[4] = net.prototypes[0]
    prototypes = torch.tensor([[0, 1, 2, 4], [4, 3, 1, 0]])
    together = PrototypeExplainer(net)(images, prototypes).maps
    assert torch.equal(together[0, 0], together[0, 1])
    for n in range(2):
        for k in range(4):
            alone = PrototypeExplainer(net)(images[n : n + 1], prototypes[n : n + 1, k : k + 1]).maps[0, 0]
            assert float((alone - together[n, k]).abs().max() / alone.abs().max()) < 1e-5
