"""Numbers of our slow oracle, kept in the repository: they stand where the published vectors are not at hand."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch

from raystudy.relevance import Relevance, prp
from raystudy.relevance.rules import RuleSet
from tests.golden.make_relevance import FILE, GAMMAS, digest, small_images, small_net


@pytest.mark.parametrize(("name", "power"), [("power2", 2), ("power4", 4), ("gamma", 2)])
@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-6), ("float32", 1e-2)])
def test_maps_equal_the_stored_ones(
    name: str,
    power: int,
    precision: prp.Precision,
    tolerance: float,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # float32 is loose because the L2 rule with few channels enlarges rounding where a channel nearly matches
    monkeypatch.setattr(prp, "RULE_SETS", {"published": RuleSet(), "gamma": RuleSet(GAMMAS)})
    net, images = small_net(), small_images()
    with np.load(FILE) as arrays:
        assert digest(net, images) == str(arrays["sha256"])
        pairs = torch.from_numpy(arrays["pairs"])
        net, images = net.to(device), images.to(device)
        rule = "gamma" if name == "gamma" else "published"
        explainer = prp.PrototypeExplainer(net, rule, power, precision=precision)
        result = Relevance(*(part.cpu() for part in astuple(explainer(images[pairs[:, 0]], pairs[:, 1:]))))
        golden = arrays[f"{name}_maps"]
        error = np.abs(result.maps[:, 0].numpy() - golden).max((1, 2)) / np.abs(golden).max((1, 2))
        assert error.max() < tolerance
        assert np.array_equal(result.cells[:, 0].numpy(), arrays[f"{name}_cells"])
        np.testing.assert_allclose(result.features[:, 0].numpy(), arrays[f"{name}_features"], atol=tolerance)
        np.testing.assert_allclose(result.scores[:, 0].numpy(), arrays[f"{name}_scores"], rtol=1e-4)
