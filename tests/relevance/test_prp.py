"""Whole maps: slow oracle, zennit, conservation, linearity, batches, bad input, no side effects (method.md e)."""

from __future__ import annotations

import copy
import dataclasses
import random
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.zennit_prp import ZennitPRP
from raystudy.protopnet import ProtoPNet
from raystudy.relevance import RULE_SETS, PrototypeExplainer, prototype_relevance, prp, rules
from raystudy.relevance.canonise import canonise
from raystudy.relevance.tape import RuleNetwork
from tests.relevance.nets import random_images, random_net
from tests.relevance.oracle import SlowPRP


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).abs().max() / expected.double().abs().max())


NETS = [
    pytest.param("resnet18", 3, 16, 4, 64, 24, id="resnet18"),
    pytest.param("resnet18", 2, 5, 3, (49, 70), 16, id="three stages, odd size"),
    pytest.param("resnet18", 4, 8, 1, 33, None, id="one stage"),
    pytest.param("resnet34", 3, 24, 3, 96, 16, id="resnet34, three stages"),
    pytest.param("resnet50", 3, 16, 2, 48, None, id="resnet50, two stages"),
]


@pytest.mark.parametrize(("arch", "per_class", "dim", "layers", "size", "width"), NETS)
@pytest.mark.parametrize(("rule", "power"), [("published", 2), ("published", 4), ("separating", 2)])
def test_maps_equal_the_slow_oracle(
    arch: str, per_class: int, dim: int, layers: int, size: int, width: int | None, rule: str, power: int
) -> None:
    net, images = random_net(arch, per_class, dim, layers, width=width), random_images(1, size)
    prototypes = torch.tensor([[0, 2 * per_class - 1]])
    slow = SlowPRP(net, power, RULE_SETS[rule].gammas)
    for precision, tolerance in (("float64", 1e-9), ("float32", 1e-3)):
        result = prototype_relevance(net, images, prototypes, rule, power, precision=precision)
        for k, j in enumerate(prototypes[0].tolist()):
            pixels, features, cell, score = slow(images[0], j)
            assert tuple(result.cells[0, k].tolist()) == cell
            assert float(result.scores[0, k]) == pytest.approx(score, rel=1e-4)
            assert relative(result.features[0, k], features) < max(tolerance, 1e-7)
            assert relative(result.maps[0, k], pixels) < tolerance
    assert result.maps.shape == (1, 2, *images.shape[2:])
    assert result.maps.dtype == result.scores.dtype == result.features.dtype == torch.float32
    assert result.cells.dtype == torch.int64


def test_maps_equal_zennit_with_an_equal_composite() -> None:
    net, images = random_net("resnet18").double(), random_images(2, 96).double()
    prototypes = torch.tensor([[0, 5], [3, 1]])
    ours = prototype_relevance(net, images, prototypes, precision="float64").maps.flatten(0, 1)
    peer = ZennitPRP(net)(images.repeat_interleave(2, 0), prototypes.flatten())
    assert relative(ours, peer) < 1e-6


def test_zennit_agrees_on_bottlenecks_too() -> None:
    net, images = random_net("resnet50", layers=2).double(), random_images(1, 64).double()
    ours = prototype_relevance(net, images, torch.tensor([[4]]), precision="float64").maps[0]
    assert relative(ours, ZennitPRP(net)(images, torch.tensor([4]))) < 1e-6


@pytest.mark.parametrize("rule", list(RULE_SETS))
def test_relevance_is_conserved_at_every_boundary(rule: str) -> None:
    # 64 channels: with few, an add-on output can lack positive contributions (Z = 0), and its relevance is lost by rule
    net, images = random_net("resnet34", dim=64), random_images(2, 128)
    explainer = PrototypeExplainer(net, rule)
    result = explainer(images, torch.tensor([[0, 1], [4, 5]]))
    torch.testing.assert_close(result.features.sum(2), torch.ones(2, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(result.maps.sum((2, 3)), torch.ones(2, 2), rtol=0, atol=1e-3)
    layers: dict[str, torch.Tensor] = {}
    network = RuleNetwork(canonise(net), RULE_SETS[rule], torch.float32)
    with torch.no_grad():
        tape = network.record(images)
        cells = result.cells[..., 0] * tape.features.shape[3] + result.cells[..., 1]
        network.relevance(tape, cells, result.features, layers)
    assert list(layers) == ["layer4", "layer3", "layer2", "layer1", "maxpool"]
    for values in layers.values():
        torch.testing.assert_close(values.sum((2, 3, 4)), torch.ones(2, 2), rtol=0, atol=1e-3)


@pytest.fixture
def no_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stabiliser so small that float64 does not see it."""
    for name in ("BOX_EPS", "NORMALISER_EPS"):
        monkeypatch.setattr(f"raystudy.relevance.rules.{name}", 1e-300)
    monkeypatch.setattr("raystudy.relevance.rules.residual_share", partial(rules.residual_share, eps=1e-300))


@pytest.mark.usefixtures("no_eps")
@pytest.mark.parametrize("rule", list(RULE_SETS))
def test_without_stabilisers_nothing_is_lost(rule: str) -> None:
    net, images = random_net("resnet34", dim=64, layers=3), random_images(2, 96)
    result = PrototypeExplainer(net, rule, precision="float64")(images, torch.tensor([[0, 1], [4, 5]]))
    torch.testing.assert_close(result.features.sum(2), torch.ones(2, 2, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(result.maps.sum((2, 3)), torch.ones(2, 2, dtype=torch.float64), rtol=0, atol=1e-9)


def test_relevance_is_conserved_at_every_block() -> None:
    # The tape notes the output of each stage: every block is made one of its own.
    net, images = random_net("resnet34", dim=64), random_images(1, 96)
    result = PrototypeExplainer(net)(images, torch.tensor([[0, 4]]))
    network = RuleNetwork(canonise(net), RULE_SETS["published"], torch.float32)
    network.blocks = tuple(dataclasses.replace(b, stage=f"block {i}") for i, b in enumerate(network.blocks))
    layers: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        tape = network.record(images)
        cells = result.cells[..., 0] * tape.features.shape[3] + result.cells[..., 1]
        network.relevance(tape, cells, result.features, layers)
    assert len(layers) == 1 + 16
    for values in layers.values():
        torch.testing.assert_close(values.sum((2, 3, 4)), torch.ones(1, 2), rtol=0, atol=1e-3)


def without_biases(net: ProtoPNet, *, negative: bool) -> ProtoPNet:
    """The network in float64 whose every layer is linear or a ReLU; without a negative weight where asked."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.zero_()
            torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            torch.nn.init.zeros_(module.bias)
    if not negative:
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name != "prototypes":
                    parameter.abs_()
    return net.double()


@pytest.mark.usefixtures("no_eps")
@pytest.mark.parametrize("negative", [False, True], ids=["z+ without negative weights", "eps rule"])
def test_relevance_at_the_pools_output_is_gradient_times_input(negative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULE_SETS, "zero", rules.RuleSet((0.0,) * 5))  # γ = 0: LRP-0, the eps rule without its eps
    net, images = without_biases(random_net(layers=3), negative=negative), random_images(1, 64).double()
    network = RuleNetwork(canonise(net, torch.float64), RULE_SETS["zero" if negative else "published"], torch.float64)
    layers: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        tape = network.record(images)
        relevance = torch.randn(16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        row, column = 1, 2
        cell = torch.tensor([[row * tape.features.shape[3] + column]])
        network.relevance(tape, cell, relevance.view(1, 1, -1), layers)
    h = tape.pooled.detach().clone().requires_grad_()
    a = h
    for stage in net.backbone.stages:
        a = net.backbone.get_submodule(stage)(a)
    z = net.add_on[2](net.add_on[1](net.add_on[0](a)))[0, :, row, column]
    (gradient,) = torch.autograd.grad((z * (relevance / z).detach()).sum(), h)
    assert relative(layers["maxpool"][0, 0], (h * gradient)[0].detach()) < 1e-8


def test_maps_are_linear_in_the_seed() -> None:
    net, images, prototypes = random_net(), random_images(2), torch.tensor([[0, 1], [2, 3]])
    unit = prototype_relevance(net, images, prototypes)
    scaled = prototype_relevance(net, images, prototypes, seed_values=3.7)
    assert relative(scaled.maps, 3.7 * unit.maps) < 1e-6
    seeds = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    each = prototype_relevance(net, images, prototypes, seed_values=seeds)
    assert relative(each.maps, seeds[..., None, None] * unit.maps) < 1e-6


def test_maps_do_not_depend_on_the_batch_or_its_order() -> None:
    net, images = random_net(per_class=10), random_images(4, 96)
    explainer = PrototypeExplainer(net)
    prototypes = torch.arange(20).repeat(4, 1)  # more maps than one pass back takes
    together = explainer(images, prototypes).maps
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    turned = explainer(images.flip(0), prototypes[:, order]).maps.flip(0)
    assert relative(turned, together[:, order]) < 1e-5
    for n, k in ((0, 0), (1, 19), (3, 7)):
        alone = explainer(images[n : n + 1], prototypes[n : n + 1, k : k + 1]).maps[0, 0]
        assert relative(alone, together[n, k]) < 1e-5


def test_prototypes_that_share_a_cell_start_there_and_only_there() -> None:
    net, images = random_net(), random_images(1)
    cells = torch.tensor([[[1, 0], [1, 0]]])
    explainer = PrototypeExplainer(net, precision="float64")
    result = explainer(images, torch.tensor([[0, 4]]), cells=cells)
    mixed = explainer.from_features(images, cells[:, :1], result.features.sum(1, keepdim=True))
    assert torch.equal(result.cells, cells)
    assert relative(mixed[0, 0], result.maps.sum(1)[0]) < 1e-10


def test_an_image_of_equal_cells_starts_at_the_first_cell() -> None:
    net = random_net(layers=3)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.zero_()  # every cell is the same, whatever the padding does
    result = prototype_relevance(net, random_images(1), torch.tensor([[0, 3]]))
    assert result.cells.tolist() == [[[0, 0], [0, 0]]]
    assert torch.equal(result.maps, torch.zeros_like(result.maps))  # no contribution anywhere, no NaN


def test_the_start_is_at_the_nearest_cell_not_beside_it() -> None:
    net, images = random_net(layers=3), random_images(3, 96)
    with torch.no_grad():
        out = net(images)
    result = prototype_relevance(net, images, torch.arange(6).repeat(3, 1))
    for n in range(3):
        for j in range(6):
            h, w = result.cells[n, j].tolist()
            assert out.distances[n, j, h, w] == pytest.approx(float(out.distances[n, j].min()), abs=1e-4)
    torch.testing.assert_close(result.scores, out.similarities, rtol=1e-4, atol=1e-5)


def test_bf16_stays_near_float64() -> None:
    net, images, prototypes = random_net("resnet34"), random_images(1, 128), torch.tensor([[0, 3, 5]])
    exact = prototype_relevance(net, images, prototypes, precision="float64")
    fast = prototype_relevance(net, images, prototypes, precision="bf16")
    assert torch.equal(fast.cells, exact.cells)
    assert relative(fast.maps, exact.maps) < 0.05
    assert fast.maps.dtype == torch.float32


def test_bf16_stays_near_float64_where_prototypes_share_cells() -> None:
    # Maps of one cell are combined from others within bf16's rounding: 4e-3 off as without, 2e-2 if combined freely.
    net, images = random_net(per_class=5, dim=64), random_images(1, 96)
    prototypes = torch.arange(10).unsqueeze(0)
    exact = prototype_relevance(net, images, prototypes, precision="float64")
    fast = prototype_relevance(net, images, prototypes, precision="bf16")
    assert torch.equal(fast.cells, exact.cells)
    assert len({tuple(cell) for cell in exact.cells[0].tolist()}) < 10
    assert max(relative(fast.maps[0, k], exact.maps[0, k]) for k in range(10)) < 1e-2


def state_of(net: ProtoPNet) -> tuple[object, ...]:
    return (
        {name: value.clone() for name, value in net.state_dict().items()},
        [p.requires_grad for p in net.parameters()],
        [p.grad for p in net.parameters()],
        [m.training for m in net.modules()],
        [p._version for p in [*net.parameters(), *net.buffers()]],
        [(p.device, p.data_ptr(), p.stride()) for p in [*net.parameters(), *net.buffers()]],
    )


@pytest.mark.parametrize("precision", ["float32", "bf16", "float64"])
def test_explaining_changes_nothing(precision: str) -> None:
    net, images = random_net(), random_images(2)
    for i, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    kept = images.clone()
    before, twin = state_of(net), copy.deepcopy(net)
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    switches = torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()
    prototype_relevance(net, images, torch.tensor([[0], [1]]), precision=precision)
    after = state_of(net)
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert before[1:] == after[1:]
    assert torch.equal(images, kept)
    assert torch.equal(generators[0], torch.get_rng_state())
    assert np.array_equal(generators[1], np.random.get_state()[1])  # noqa: NPY002
    assert generators[2] == random.getstate()
    assert switches == (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())
    assert torch.equal(net(images).logits, twin(images).logits)


def test_a_second_call_sees_every_change_of_the_model() -> None:
    net, images, prototypes = random_net(layers=2), random_images(1), torch.tensor([[0, 1]])
    conv, norm = net.backbone.conv1, net.backbone.bn1

    def scale_in_place() -> None:
        with torch.no_grad():
            conv.weight.mul_(1.5)

    def scale_behind_autograds_back() -> None:
        conv.weight.data[0] *= 3

    def load() -> None:
        net.load_state_dict(random_net(layers=2, seed=5).state_dict())

    def other_eps() -> None:
        norm.eps = 0.5

    def swap_behind_autograds_back() -> None:  # no sum and no version moves
        net.prototypes.data[:2] = net.prototypes.data[:2].flip(0).clone()

    def swap_in_inference_mode() -> None:
        with torch.inference_mode():
            net.prototypes[:2] = net.prototypes[:2].flip(0).clone()

    last = prototype_relevance(net, images, prototypes).maps
    assert torch.equal(prototype_relevance(net, images, prototypes).maps, last)
    changes = (scale_in_place, scale_behind_autograds_back, load, other_eps, swap_behind_autograds_back)
    for change in (*changes, swap_in_inference_mode):
        change()
        now = prototype_relevance(net, images, prototypes).maps
        assert not torch.equal(now, last), change.__name__
        assert torch.equal(now, PrototypeExplainer(net)(images, prototypes).maps), change.__name__
        last = now


def test_autocast_around_the_call_changes_nothing() -> None:
    net, images, prototypes = random_net(), random_images(1), torch.tensor([[2]])
    plain = prototype_relevance(net, images, prototypes)
    with torch.autocast("cpu", torch.bfloat16):
        inside = prototype_relevance(net, images, prototypes)
    assert torch.equal(plain.maps, inside.maps)


def one() -> torch.Tensor:
    return torch.tensor([[0]])


@pytest.mark.parametrize(
    ("images", "prototypes", "rule"),
    [
        (torch.zeros(1, 1, 64, 64), one(), r"images must be \(N, 3, H, W\)"),
        (torch.zeros(3, 64, 64), one(), r"images must be \(N, 3, H, W\)"),
        (torch.zeros(0, 3, 64, 64), torch.zeros(0, 1, dtype=torch.int64), "N >= 1"),
        (torch.zeros(1, 3, 31, 64), one(), "at least 32 pixels"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), one(), "normalised floating-point"),
        (torch.full((1, 3, 64, 64), float("nan")), one(), "a pixel is NaN"),
        (torch.zeros(1, 3, 64, 64), torch.tensor([[6]]), r"prototypes must lie in 0\.\.5"),
        (torch.zeros(1, 3, 64, 64), torch.tensor([[-1]]), r"prototypes must lie in 0\.\.5"),
        (torch.zeros(1, 3, 64, 64), torch.tensor([0]), r"prototypes must be \(N, K\)"),
        (torch.zeros(2, 3, 64, 64), one(), r"prototypes must be \(N, K\)"),
        (torch.zeros(1, 3, 64, 64), torch.tensor([[0.0]]), "int64"),
    ],
)
def test_bad_input_is_refused_with_the_rule_before_any_work(
    images: torch.Tensor, prototypes: torch.Tensor, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(prp, "RuleNetwork")  # the work begins with its weights
    with pytest.raises(ValueError, match=rule):
        prototype_relevance(random_net(), images, prototypes)


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"rule": "other"}, "rule must be one of published, separating"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"l2_power": 3}, "l2_power must be 2"),
        ({"l2_eps": 0.0}, "l2_eps must be positive"),
        ({"l2_eps": float("inf")}, "l2_eps must be positive and finite"),
    ],
)
def test_unknown_settings_are_refused(setting: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        prototype_relevance(random_net(), random_images(1), one(), **setting)


def test_a_model_in_training_mode_is_refused() -> None:
    net = random_net()
    net.backbone.bn1.train()
    with pytest.raises(ValueError, match="eval mode"):
        prototype_relevance(net, random_images(1), one())


def test_nan_weights_and_infinite_activations_are_refused() -> None:
    net = random_net()
    with torch.no_grad():
        net.add_on[0].bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"add_on\.0\.bias holds a NaN"):
        prototype_relevance(net, random_images(1), one())
    net = random_net()
    with torch.no_grad():
        net.backbone.bn1.weight.fill_(1e30)
        net.backbone.get_submodule("layer1.0.bn1").weight.fill_(1e30)
    with pytest.raises(ValueError, match="activations must be finite"):
        prototype_relevance(net, random_images(1), one())


@pytest.mark.parametrize("entry", [1e38, -1e38])
def test_an_overflow_that_a_relu_would_hide_is_refused(entry: float) -> None:
    net = random_net(layers=2)
    with torch.no_grad():
        net.add_on[0].weight[0] = entry
    with pytest.raises(ValueError, match="activations must be finite"):
        prototype_relevance(net, random_images(1), one())
    net = random_net(layers=2)
    with torch.no_grad():
        net.backbone.get_submodule("layer1.0.conv1").weight[0] = entry
    with pytest.raises(ValueError, match="activations must be finite"):
        prototype_relevance(net, random_images(1), one())


def test_large_finite_weights_are_no_infinity() -> None:
    net = random_net(layers=2)
    net.backbone.bn1.running_var[:] = 1e37  # its sum is infinite
    prototype_relevance(net, random_images(1), one())


CELL = torch.tensor([[[1, 1]]])


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"cells": torch.tensor([[[2, 0]]])}, "2 x 2 feature grid"),
        ({"cells": torch.tensor([[[0, -1]]])}, "2 x 2 feature grid"),
        ({"cells": torch.tensor([[1, 1]])}, r"cells must be \(1, 1, 2\) int64"),
        ({"cells": CELL.float()}, r"cells must be \(1, 1, 2\) int64"),
        ({"seed_values": float("nan")}, "seed values must be finite"),
    ],
)
def test_cells_and_seeds_that_cannot_be_are_refused(given: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        PrototypeExplainer(random_net())(random_images(1), one(), **given)


@pytest.mark.parametrize(
    ("cells", "features", "rule"),
    [
        (CELL, torch.full((1, 1, 16), torch.nan), r"features must be finite and \(N, K, 16\)"),
        (CELL, torch.zeros(1, 1, 15), r"features must be finite and \(N, K, 16\)"),
        (CELL, torch.zeros(1, 16), r"features must be finite and \(N, K, 16\)"),
        (CELL + 1, torch.zeros(1, 1, 16), "2 x 2 feature grid"),
        (CELL[0], torch.zeros(1, 1, 16), r"cells must be \(1, 1, 2\) int64"),
    ],
)
def test_feature_relevance_that_cannot_be_is_refused(cells: torch.Tensor, features: torch.Tensor, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        PrototypeExplainer(random_net()).from_features(random_images(1), cells, features)
