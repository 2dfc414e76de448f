import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.model import check_finite, log_similarity
from raystudy.torchvision_shim import models


def small(**settings: object) -> ProtoPNet:
    given = {"backbone": "resnet18", "prototypes_per_class": 3, "prototype_dim": 8, "backbone_layers": 2, **settings}
    return ProtoPNet(**given).eval()


def pictures(n: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(5))


def torchvision_names(backbone: str) -> set[str]:
    with torch.device("meta"):
        return set(getattr(models, backbone)(weights=None).state_dict())


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50"])
def test_backbone_names_are_torchvisions_without_fc(backbone: str) -> None:
    names = set(ProtoPNet(backbone).backbone.state_dict())
    assert names == {n for n in torchvision_names(backbone) if not n.startswith("fc.")}


def test_layers_that_are_left_out_have_no_parameters() -> None:
    names = set(small(backbone_layers=3).backbone.state_dict())
    assert names == {n for n in torchvision_names("resnet18") if not n.startswith(("fc.", "layer4."))}


def test_head_has_the_names_and_shapes_that_others_rely_on() -> None:
    model = ProtoPNet("resnet18", 3, 4, 16)
    head = {name: tuple(p.shape) for name, p in model.state_dict().items() if not name.startswith("backbone.")}
    assert head == {
        "add_on.0.weight": (16, 512, 1, 1),
        "add_on.0.bias": (16,),
        "add_on.2.weight": (16, 16, 1, 1),
        "add_on.2.bias": (16,),
        "prototypes": (12, 16, 1, 1),
        "last_layer.weight": (3, 12),
    }
    assert model.prototype_class.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_defaults_are_the_papers_network() -> None:
    model = ProtoPNet()
    assert sum(p.numel() for p in model.backbone.parameters()) == 21_284_672  # ResNet34's 21,797,672 less fc's 513,000
    assert model.prototypes.shape == (20, 128, 1, 1)


@pytest.mark.parametrize(
    ("settings", "size", "grid"),
    [
        ({"backbone_layers": 4}, (96, 96), (3, 3)),
        ({"backbone_layers": 4}, (160, 160), (5, 5)),
        ({"backbone_layers": 3}, (96, 96), (6, 6)),
        ({"backbone_layers": 2}, (64, 96), (8, 12)),
        ({"backbone_layers": 1}, (33, 50), (9, 13)),
        ({"backbone": "resnet50", "backbone_layers": 4}, (96, 96), (3, 3)),
        ({"backbone": "resnet50", "backbone_layers": 3, "num_classes": 3}, (96, 64), (6, 4)),
        ({"backbone": "resnet34", "backbone_layers": 3, "prototype_dim": 5}, (64, 64), (4, 4)),
    ],
)
def test_shapes_follow_from_settings_and_image_size(
    settings: dict[str, int], size: tuple[int, int], grid: tuple[int, int]
) -> None:
    model = small(**settings)
    classes, dim = settings.get("num_classes", 2), settings.get("prototype_dim", 8)
    with torch.no_grad():
        output = model(pictures(2, *size))
    assert output.features.shape == (2, dim, *grid)
    assert output.distances.shape == (2, 3 * classes, *grid)
    assert output.similarities.shape == (2, 3 * classes)
    assert output.logits.shape == (2, classes)


def test_initialisation_is_the_published_one() -> None:
    model = ProtoPNet("resnet18", prototype_dim=64, seed=3)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            wanted = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))  # Kaiming normal, fan-out, ReLU
            assert float(module.weight.detach().std()) == pytest.approx(wanted, rel=0.05), name
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert (module.weight == 1).all()
            assert (module.running_var == 1).all()
            assert not module.bias.any()
            assert not module.running_mean.any()
    p = model.prototypes.detach()
    assert p.min() >= 0
    assert p.max() < 1
    assert float(p.mean()) == pytest.approx(0.5, abs=0.03)
    assert model.last_layer.weight.tolist() == [[1.0] * 10 + [-0.5] * 10, [-0.5] * 10 + [1.0] * 10]
    assert all(t.device.type == "cpu" for t in [*model.parameters(), *model.buffers()])


def test_one_seed_gives_one_network_and_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    first = small(seed=4)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    with torch.random.fork_rng():
        torch.manual_seed(99)
        second = small(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.prototypes, small(seed=5).prototypes)
    assert not torch.equal(first.backbone.conv1.weight, small(seed=5).backbone.conv1.weight)


def test_similarity_has_the_published_range() -> None:
    # ln(1e4) at a match; ln(129 / 128.0001) at the largest distance of 128 sigmoid channels (method.md a.1)
    d = torch.tensor([0.0, 1e-4, 1.0, 128.0])
    wanted = [9.210340, math.log(1.0001 / 2e-4), math.log(2 / 1.0001), 0.00778214]
    torch.testing.assert_close(log_similarity(d), torch.tensor(wanted), atol=1e-6, rtol=1e-6)
    assert log_similarity(torch.linspace(0, 128, 1000)).diff().lt(0).all()


def test_a_prototype_that_is_a_patch_has_no_negative_distance_and_nearly_the_highest_score() -> None:
    model = small(prototype_dim=128)
    with torch.no_grad():
        z = model.features(pictures())
        model.prototypes[:, :, 0, 0] = z[1, :, 2, 5]
        output = model.compare(z)
    assert output.distances.min() >= 0
    assert output.distances[1, :, 2, 5].max() <= 5e-5
    assert output.similarities[1].min() > 8.8
    assert output.similarities.max() <= math.log(1e4) + 1e-6


def test_logits_are_the_last_layer_of_the_similarities() -> None:
    model = small(num_classes=3)
    with torch.no_grad():
        output = model(pictures())
    torch.testing.assert_close(output.logits, output.similarities @ model.last_layer.weight.T)
    torch.testing.assert_close(output.similarities, log_similarity(output.distances.flatten(2).amin(2)))


def test_under_autocast_only_the_backbone_computes_in_bf16() -> None:
    model, x = small(), pictures()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps = model.backbone(x)
        whole, head = model(x), model.head(maps)
        compared, distances = model.compare(head.features), model.distances_of(head.features)
    assert maps.dtype == torch.bfloat16
    assert {t.dtype for t in (*whole, *head, *compared)} == {torch.float32}
    with torch.no_grad():
        plain = model.head(maps.float())
    for inside, outside in ((head, plain), (whole, plain), (compared, plain)):
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    assert torch.equal(distances, plain.distances)


def test_a_float64_copy_computes_in_float64() -> None:
    model, x = small(), pictures()
    with torch.no_grad():
        single, double = model(x), model.double()(x.double())
    assert {t.dtype for t in double} == {torch.float64}
    torch.testing.assert_close(single.distances.double(), double.distances, atol=1e-4, rtol=0)


def test_an_image_scores_the_same_alone_and_in_a_batch_and_in_both_memory_formats() -> None:
    model, x = small(), pictures(5)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(x[i : i + 1]).similarities for i in range(5)])
        last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(alone, together.similarities, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last.similarities, together.similarities, atol=1e-5, rtol=1e-5)


def test_looking_at_images_changes_nothing() -> None:
    model = small()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    model(pictures())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training


@pytest.mark.parametrize(
    ("images", "rule"),
    [
        (torch.zeros(2, 1, 64, 64), r"images must be \(N, 3, H, W\)"),
        (torch.zeros(3, 64, 64), r"images must be \(N, 3, H, W\)"),
        (torch.zeros(2, 3, 16, 64), "at least 32 px"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "normalised floating point"),
    ],
)
def test_images_that_do_not_fit_are_refused_by_rule(images: Tensor, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        small()(images)
    with pytest.raises(ValueError, match=rule):
        small().features(images)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"backbone": "vgg16"}, "backbone must be resnet18, resnet34 or resnet50"),
        ({"backbone_layers": 0}, "backbone_layers must be 1, 2, 3 or 4"),
        ({"backbone_layers": 5}, "backbone_layers must be 1, 2, 3 or 4"),
        ({"num_classes": 1}, "at least 2 classes"),
        ({"prototypes_per_class": 0}, "1 prototype a class"),
        ({"prototype_dim": 0}, "1 feature channel"),
    ],
)
def test_settings_that_make_no_network_are_refused_by_rule(settings: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        small(**settings)


@pytest.mark.parametrize("name", ["prototypes", "backbone.layer1.0.bn2.running_var", "add_on.2.bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    model = small()
    check_finite(model)
    with torch.no_grad():
        model.state_dict()[name].view(-1)[1] = value
    with pytest.raises(ValueError, match=name):
        check_finite(model)
