import pytest
import torch
from torch import Tensor

from raystudy.protopnet import ProtoPNet, ProtoPNetOutput
from raystudy.protopnet.losses import (
    cluster_and_separation,
    last_layer_loss,
    loss_terms,
    mean_pair_distance,
    wrong_class_l1,
)
from raystudy.protopnet.settings import TrainingSettings
from tests.protopnet import oracle

SETTINGS = TrainingSettings()


def network(classes: int = 2, per_class: int = 2) -> ProtoPNet:
    return ProtoPNet("resnet18", classes, per_class, 4, 1, seed=2)


def output_of(minima: Tensor, logits: Tensor) -> ProtoPNetOutput:
    """An output whose smallest distances over a 1 x 2 grid are ``minima``."""
    distances = torch.stack([minima, minima + 1], -1)[:, :, None]  # N, P, 1, 2
    return ProtoPNetOutput(logits, torch.zeros_like(minima), distances, torch.zeros(len(minima), 4, 1, 2))


def test_cluster_and_separation_of_a_hand_made_case() -> None:
    #        class 0    class 1
    minima = torch.tensor([[3.0, 5.0, 2.0, 7.0], [1.0, 4.0, 6.0, 9.0]])
    cluster, separation = cluster_and_separation(minima, torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1]))
    assert float(cluster) == (3 + 6) / 2  # image 0 is of class 0: 3; image 1 of class 1: 6
    assert float(separation) == (2 + 1) / 2


def test_a_prototype_of_the_own_class_is_pulled_and_one_of_another_class_pushed_away() -> None:
    model, labels = network(), torch.tensor([0])
    minima = torch.tensor([[3.0, 5.0, 2.0, 7.0]], requires_grad=True)
    terms = loss_terms(output_of(minima, torch.zeros(1, 2)), labels, model, SETTINGS)
    (gradient,) = torch.autograd.grad(terms.total, minima)
    torch.testing.assert_close(gradient, torch.tensor([[0.8, 0.0, -0.08, 0.0]]))  # only the nearest of each kind


def test_l1_counts_only_entries_of_other_classes() -> None:
    model = network()
    with torch.no_grad():
        model.last_layer.weight.copy_(torch.tensor([[10.0, 20.0, -1.0, 2.0], [3.0, -4.0, 30.0, 40.0]]))
    assert float(wrong_class_l1(model).detach()) == 1 + 2 + 3 + 4


@pytest.mark.parametrize(("classes", "per_class"), [(2, 3), (3, 2), (4, 1)])
def test_all_terms_equal_the_slow_oracle(classes: int, per_class: int) -> None:
    model, draw = network(classes, per_class), torch.Generator().manual_seed(1)
    n, p = 9, classes * per_class
    labels = torch.arange(n) % classes
    distances = torch.rand(n, p, 3, 2, generator=draw) * 30
    logits = torch.randn(n, classes, generator=draw)
    output = ProtoPNetOutput(logits, torch.zeros(n, p), distances, torch.zeros(n, 4, 3, 2))
    terms = loss_terms(output, labels, model, SETTINGS)
    slow = oracle.losses(
        {"distances": distances.double(), "logits": logits.double()},
        model.last_layer.weight.detach().double(),
        labels.tolist(),
        per_class,
    )
    for name, value in slow.items():
        assert float(getattr(terms, name).detach()) == pytest.approx(float(value), rel=1e-5), name
    wrong = [float(distances[i, j].min()) for i in range(n) for j in range(p) if j // per_class != labels[i]]
    assert float(terms.wrong_class_distance) == pytest.approx(sum(wrong) / len(wrong), rel=1e-5)
    assert int(terms.correct) == int((logits.argmax(1) == labels).sum())


def test_masked_minimum_equals_the_published_form_for_sigmoid_features() -> None:
    # The published code writes D - max((D - m) mask), the same as long as no distance exceeds D = 128 (method.md a.2).
    minima = torch.rand(6, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 128
    labels, classes = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([0, 0, 1, 1])
    mask = (labels[:, None] == classes[None]).double()
    published = [(128 - ((128 - minima) * m).amax(1)).mean() for m in (mask, 1 - mask)]
    torch.testing.assert_close(list(cluster_and_separation(minima, labels, classes)), published)


def test_coefficients_weigh_the_terms() -> None:
    model, minima = network(), torch.tensor([[3.0, 5.0, 2.0, 7.0]])
    settings = TrainingSettings(
        coefficient_cross_entropy=2, coefficient_cluster=3, coefficient_separation=-5, coefficient_l1=7
    )
    terms = loss_terms(output_of(minima, torch.tensor([[0.3, -0.1]])), torch.tensor([0]), model, settings)
    wanted = 2 * terms.cross_entropy + 3 * terms.cluster - 5 * terms.separation + 7 * terms.l1
    torch.testing.assert_close(terms.total, wanted)


def test_the_last_layers_own_loss_has_the_gradient_of_the_whole_loss() -> None:
    model, labels = network(), torch.tensor([0, 1, 1])
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(3)) * 9
    logits = model.last_layer(scores)
    whole = loss_terms(output_of(scores, logits), labels, model, SETTINGS)
    alone = last_layer_loss(logits, labels, model, SETTINGS)
    weight = [model.last_layer.weight]
    wanted = torch.autograd.grad(whole.total, weight, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(alone.total, weight), wanted)
    assert torch.equal(alone.cross_entropy, whole.cross_entropy)
    assert torch.equal(alone.l1, whole.l1)
    assert int(alone.correct) == int(whole.correct)


def test_pair_distance_averages_over_all_ordered_pairs() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])[:, :, None, None]
    assert float(mean_pair_distance(points)) == pytest.approx(2 * (25 + 1 + 18) / 9)
