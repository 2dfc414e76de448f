"""Batch norm fusion is exact and reads the model only (method.md e 3)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raystudy.relevance.canonise import canonise, fuse
from raystudy.relevance.rules import RULE_SETS
from raystudy.relevance.tape import RuleNetwork
from tests.relevance.nets import random_images, random_net


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_fused_features_equal_the_models(arch: str) -> None:
    net, images = random_net(arch, layers=3), random_images(2, 96)
    with torch.no_grad():
        fused = {
            dtype: RuleNetwork(canonise(net, dtype), RULE_SETS["published"], dtype).record(images).features
            for dtype in (torch.float32, torch.float64)
        }
        single = net(images)
        net.double()
        exact = net.add_on(net.backbone(images.double()))
        scores = net.float().compare(fused[torch.float32])
    torch.testing.assert_close(scores.logits, single.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(fused[torch.float64], exact, rtol=0, atol=1e-10)
    torch.testing.assert_close(fused[torch.float32].double(), exact, rtol=0, atol=2e-4)
    torch.testing.assert_close(fused[torch.float32], single.features, rtol=0, atol=2e-4)


def test_fusion_keeps_eps_bias_and_negative_scales() -> None:
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=True).double()
    norm = nn.BatchNorm2d(4, eps=0.1).double().eval()  # an eps that shows
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, -0.1]))
        norm.bias.copy_(torch.randn(4, generator=g))
    norm.running_mean = torch.randn(4, generator=g, dtype=torch.float64)
    norm.running_var = torch.rand(4, generator=g, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 5, generator=g, dtype=torch.float64)
    with torch.no_grad():
        fused = fuse(conv, norm, torch.float64)
        expected = norm(conv(x))
        result = nn.functional.conv2d(x, fused.weight, fused.bias, fused.stride, fused.padding)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_fusion_shares_no_memory_with_the_model() -> None:
    net = random_net()
    network = canonise(net)
    own = {p.data_ptr() for p in net.parameters()}
    convs = [network.stem, *network.add_on, *(c for b in network.blocks for c in b.convs)]
    assert not own & {t.data_ptr() for c in convs for t in (c.weight, c.bias)}
    assert network.prototypes.data_ptr() not in own


@pytest.mark.parametrize(("layers", "stride"), [(1, 4), (2, 8), (3, 16), (4, 32)])
def test_stride_follows_the_stages(layers: int, stride: int) -> None:
    network = canonise(random_net("resnet50", layers=layers))
    assert network.stride == stride
    assert network.stages == tuple(f"layer{i + 1}" for i in range(layers))


def test_layers_without_a_rule_are_refused() -> None:
    net = random_net()
    net.add_on = nn.Sequential(nn.Conv2d(512, 16, 1), nn.Sigmoid()).eval()
    with pytest.raises(ValueError, match="the add-on must be conv, ReLU, conv, sigmoid"):
        canonise(net)
    net = random_net()
    net.backbone.conv1 = nn.Conv2d(3, 64, 7, 2, 3, dilation=2, bias=False).eval()
    with pytest.raises(ValueError, match="without groups and dilation"):
        canonise(net)
