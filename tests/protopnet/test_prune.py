import pytest
import torch

from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.prune import drop_prototypes, prototypes_to_keep

CLASSES = torch.tensor([0, 0, 1, 1])
LABELS = torch.tensor([0, 0, 0, 1, 1, 1])


def test_a_prototype_stays_when_enough_of_its_nearest_images_are_of_its_class() -> None:
    distances = torch.tensor(
        [  # film by prototype; the three nearest films of each are below 4
            [1.0, 1.0, 9.0, 1.0],
            [2.0, 9.0, 9.0, 2.0],
            [3.0, 9.0, 9.0, 9.0],
            [9.0, 2.0, 1.0, 3.0],
            [9.0, 3.0, 2.0, 9.0],
            [9.0, 9.0, 3.0, 9.0],
        ]
    )
    assert prototypes_to_keep(distances, LABELS, CLASSES, nearest=3, required=2).tolist() == [True, False, True, False]
    assert prototypes_to_keep(distances, LABELS, CLASSES, nearest=3, required=1).all()


def test_equal_distances_count_in_the_order_of_images() -> None:
    kept = prototypes_to_keep(torch.ones(6, 4), LABELS, CLASSES, nearest=3, required=3)
    assert kept.tolist() == [True, True, False, False]  # the first three films are of class 0


def test_more_neighbours_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match="required <= nearest <= images"):
        prototypes_to_keep(torch.ones(2, 4), LABELS[:2], CLASSES)


def test_dropped_prototypes_leave_the_scores_of_the_others_alone() -> None:
    model = ProtoPNet("resnet18", 2, 2, 4, 1, seed=1).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(images)
        drop_prototypes(model, torch.tensor([True, False, True, True]))
        after = model(images)
    torch.testing.assert_close(after.similarities, before.similarities[:, [0, 2, 3]])
    torch.testing.assert_close(after.logits, after.similarities @ model.last_layer.weight.T)
    assert model.prototype_class.tolist() == [0, 1, 1]
    assert model.last_layer.weight.tolist() == [[1, -0.5, -0.5], [-0.5, 1, 1]]


def test_a_class_keeps_at_least_one_prototype() -> None:
    model = ProtoPNet("resnet18", 2, 2, 4, 1, seed=1)
    with pytest.raises(ValueError, match="class 1 would lose all its prototypes"):
        drop_prototypes(model, torch.tensor([True, True, False, False]))
    assert model.prototypes.shape[0] == 4
