import pytest
import torch

from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.receptive_field import receptive_field


@pytest.mark.parametrize(
    ("backbone", "layers", "size", "wanted"),
    [
        ("resnet34", 4, 224, (7, 32, 899, 0.5)),  # method.md a.1
        ("resnet18", 4, 224, (7, 32, 435, 0.5)),
        # layer3 of a ResNet18: 435 less layer4's own (3 - 1) * (16 + 32 + 32 + 32)
        ("resnet18", 3, 96, (6, 16, 211, 0.5)),
        # stem 11, then three bottlenecks with one 3 x 3 each at jump 4
        ("resnet50", 1, 64, (16, 4, 35, 0.5)),
    ],
)
def test_field_follows_kernels_and_strides(
    backbone: str, layers: int, size: int, wanted: tuple[int, int, int, float]
) -> None:
    model = ProtoPNet(backbone, prototype_dim=4, backbone_layers=layers)
    assert tuple(receptive_field(model, size)) == wanted


@pytest.mark.parametrize(("row", "col"), [(0, 0), (5, 7), (11, 15)])
def test_box_holds_every_pixel_that_moves_the_cell(row: int, col: int) -> None:
    model = ProtoPNet("resnet18", prototypes_per_class=1, prototype_dim=3, backbone_layers=1, seed=2).eval()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(model.features(image)[0, :, row, col].sum(), image)
    seen = gradient.abs().sum((0, 1)).nonzero()
    top, bottom, left, right = receptive_field(model, 64).box(row, col, 64)
    assert top <= seen[:, 0].min()
    assert seen[:, 0].max() < bottom
    assert left <= seen[:, 1].min()
    assert seen[:, 1].max() < right
    assert bottom - top <= 43  # stem 11, then four 3 x 3 convolutions at jump 4: 11 + 4 * 8


def test_boxes_are_truncated_and_clipped_as_published() -> None:
    field = receptive_field(ProtoPNet("resnet18", prototype_dim=4, backbone_layers=1), 224)
    assert tuple(field) == (56, 4, 43, 0.5)
    assert field.box(0, 55, 224) == (0, 22, 199, 224)  # centres 0.5 and 220.5, half a side 21.5
    assert field.box(10, 20, 224) == (19, 62, 59, 102)
