"""PRP of the published code, number by number (method.md e 4, 5, 6, 18)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from raystudy.protopnet import ProtoPNet
from raystudy.relevance import PrototypeExplainer, Relevance, crop_box, upsample_activation
from raystudy.relevance.canonise import canonise
from raystudy.relevance.rules import RULE_SETS
from raystudy.relevance.tape import RuleNetwork

pytestmark = pytest.mark.golden
Published = Callable[[str], tuple[dict[str, Any], ProtoPNet, torch.Tensor]]


def explain(net: ProtoPNet, images: torch.Tensor, pairs: np.ndarray, **settings: Any) -> Relevance:
    rows = torch.from_numpy(pairs.astype(np.int64))
    return PrototypeExplainer(net, **settings)(images[rows[:, 0]], rows[:, 1:])


def errors(maps: torch.Tensor, golden: np.ndarray) -> np.ndarray:
    difference = np.abs(maps.squeeze(1).numpy() - golden).max((1, 2))
    return difference / np.abs(golden).max((1, 2))


def at_cell(golden: np.ndarray, cells: torch.Tensor) -> np.ndarray:
    """(K, D, h, w) to (K, D) at the cells; the rest must be 0."""
    rest = golden.copy()
    values = np.stack([g[:, h, w] for g, (h, w) in zip(golden, cells[:, 0].tolist(), strict=True)])
    for g, (h, w) in zip(rest, cells[:, 0].tolist(), strict=True):
        g[:, h, w] = 0
    assert not rest.any()
    return values


@pytest.mark.parametrize("name", ["r18", "r34", "r18_d64"])
def test_maps_and_feature_relevance_equal_the_published_codes(name: str, published: Published) -> None:
    arrays, net, images = published(name)
    result = explain(net, images, arrays["pairs"])
    assert errors(result.maps, arrays["prp_map"]).max() < 1e-3
    for ours, golden in zip(result.maps[:, 0], arrays["prp_map"], strict=True):
        assert np.corrcoef(ours.numpy().ravel(), golden.ravel())[0, 1] > 0.9999
    summed = arrays["prp_rgb"].sum(1)  # ours are summed over the colour channels on the way
    assert errors(result.maps[: len(summed)], summed).max() < 1e-3
    features = at_cell(arrays["prp_feature_relevance"], result.cells)
    np.testing.assert_allclose(result.features[:, 0].numpy(), features, atol=2e-2)
    np.testing.assert_allclose(result.features.sum(2).numpy(), 1, atol=1e-5)
    np.testing.assert_allclose(result.maps.sum((2, 3)).numpy()[:, 0], arrays["prp_sum"], atol=1e-3)
    scores = np.array([s[j] for s, j in zip(arrays["prp_similarities"], arrays["pairs"][:, 1], strict=True)])
    np.testing.assert_allclose(result.scores[:, 0].numpy(), scores, atol=1e-4)


@pytest.mark.parametrize("name", ["r18", "r34", "r18_d64"])
def test_fused_features_and_cells_equal_the_published_forward(name: str, published: Published) -> None:
    arrays, net, images = published(name)
    with torch.no_grad():
        tape = RuleNetwork(canonise(net), RULE_SETS["published"], torch.float32).record(images)
    np.testing.assert_allclose(tape.features.numpy(), arrays["features"], atol=1e-4)
    prototypes = torch.arange(len(net.prototypes)).repeat(len(images), 1)[:, :3]
    result = PrototypeExplainer(net)(images, prototypes)
    flat = arrays["distances"][:, :3].reshape(len(images), 3, -1)
    width = arrays["distances"].shape[3]
    ours = (result.cells[..., 0] * width + result.cells[..., 1]).numpy()
    np.testing.assert_allclose(np.take_along_axis(flat, ours[..., None], 2)[..., 0], flat.min(2), atol=2e-4)
    np.testing.assert_allclose(result.scores.numpy(), arrays["similarities"][:, :3], atol=1e-5)


@pytest.mark.parametrize("name", ["r18", "r34"])
def test_power_four_gives_the_maps_from_before_2024(name: str, published: Published) -> None:
    arrays, net, images = published(name)
    golden = arrays["prp_map_before_2024_fix"]
    result = explain(net, images, arrays["pairs"][: len(golden)], l2_power=4)
    assert errors(result.maps, golden).max() < 1e-3


def leave_batch_norm_behind(net: ProtoPNet) -> None:
    """The published canoniser leaves 1 / sqrt(1 + 1e-5) behind each fused convolution; so does this."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight *= (1 + 1e-5) ** -0.5
                module.bias *= (1 + 1e-5) ** -0.5


@pytest.mark.parametrize("name", ["r18", "r34"])
def test_maps_agree_to_rounding_with_the_published_reset_batch_norm(name: str, published: Published) -> None:
    arrays, net, images = published(name)
    leave_batch_norm_behind(net)
    result = explain(net, images, arrays["pairs"][:3])
    golden = arrays["prp_map"][:3]
    assert errors(result.maps, golden).max() < 1e-5
    ours = result.maps[:, 0].numpy()
    assert not ours[golden == 0].any()  # out of reach of the cell
    assert ours.min() > -1e-6 * ours.max()  # the published maps have no negative pixel


@pytest.mark.parametrize("name", ["push_r18", "push_r34"])
def test_maps_at_push_sources_equal_the_published_codes(name: str, published: Published) -> None:
    arrays, net, images = published(name)
    with torch.no_grad():
        net.prototypes.copy_(torch.from_numpy(arrays["prototypes_after"]).view_as(net.prototypes))
    result = explain(net, images, arrays["pairs"])
    assert errors(result.maps, arrays["prp_map"]).max() < 1e-2
    assert errors(result.maps, arrays["prp_map_exact_fusion"]).max() < 1e-2
    # At a source rounding decides the channel weights and moves the score by up to 0.4 (method.md b.4, e.2): their cell
    # and sum are compared, and the scores.
    for name_of in ("prp_feature_relevance", "prp_feature_relevance_exact_fusion"):
        np.testing.assert_allclose(at_cell(arrays[name_of], result.cells).sum(1), 1, atol=1e-5)
    for name_of in ("similarities_canonised", "similarities_exact_fusion"):
        golden = np.array([s[j] for s, j in zip(arrays[name_of], arrays["pairs"][:, 1], strict=True)])
        np.testing.assert_allclose(result.scores[:, 0].numpy(), golden, atol=0.4)


@pytest.mark.parametrize("name", ["push_r18", "push_r34"])
def test_maps_at_push_sources_agree_to_rounding_from_the_published_start(name: str, published: Published) -> None:
    # At a source the channels' differences to the prototype are rounding alone, and the start 1 / (difference² + 1e-12)
    # is made of them: it is the published forward pass's. From that start on nothing is left over.
    arrays, net, images = published(name)
    with torch.no_grad():
        net.prototypes.copy_(torch.from_numpy(arrays["prototypes_after"]).view_as(net.prototypes))
    leave_batch_norm_behind(net)
    result = explain(net, images, arrays["pairs"], precision="float64")
    assert errors(result.maps, arrays["prp_map"]).max() < 1e-3
    start = torch.from_numpy(at_cell(arrays["prp_feature_relevance"], result.cells)).unsqueeze(1)
    films = images[torch.from_numpy(arrays["pairs"][:, 0].astype(np.int64))]
    maps = PrototypeExplainer(net, precision="float64").from_features(films, result.cells, start)
    assert errors(maps, arrays["prp_map"]).max() < 1e-5


def test_relevance_at_each_stage_equals_the_published_codes(published: Published) -> None:
    arrays, net, images = published("r18")
    image, prototype = arrays["pairs"][0].tolist()
    result = explain(net, images, arrays["pairs"][:1])
    network = RuleNetwork(canonise(net), RULE_SETS["published"], torch.float32)
    layers: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        tape = network.record(images[image : image + 1])
        cell = result.cells[..., 0] * tape.features.shape[3] + result.cells[..., 1]
        network.relevance(tape, cell, result.features, layers)
    for stage, ours in layers.items():
        golden = arrays[f"mid_{stage}"]
        assert np.abs(ours[0, 0].numpy() - golden).max() / np.abs(golden).max() < 2e-3, (stage, prototype)


@pytest.mark.parametrize("name", ["r18", "r34"])
def test_activation_maps_are_upsampled_and_cropped_as_opencv_does(name: str, published: Published) -> None:
    arrays, _, _ = published(name)
    pairs = arrays["pairs"][: len(arrays["heat_cubic"])]
    distances = np.stack([arrays["distances"][i, j] for i, j in pairs])
    grid = torch.from_numpy(np.log((distances + 1) / (distances + 1e-4)))
    np.testing.assert_allclose(upsample_activation(grid, (224, 224)).numpy(), arrays["heat_cubic"], atol=1e-5)
    np.testing.assert_allclose(
        upsample_activation(grid, (224, 224), "bilinear").numpy(), arrays["heat_linear"], atol=1e-5
    )
    boxes = [crop_box(heat) for heat in upsample_activation(grid, (224, 224))]
    assert boxes == [tuple(box) for box in arrays["heat_crop95"].tolist()]
