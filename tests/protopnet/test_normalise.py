"""Films to network input: by hand and against torchvision's own transform with the ImageNet statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raystudy.protopnet.normalise import normalise
from raystudy.torchvision_shim import models, torchvision


@pytest.mark.parametrize(
    ("grey", "channels"),
    [
        (0, (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225)),
        (255, (0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225)),
        (51, (-0.285 / 0.229, -0.256 / 0.224, -0.206 / 0.225)),
    ],
)
def test_grey_values_by_hand(grey: int, channels: tuple[float, float, float]) -> None:
    values = normalise(torch.full((1, 1, 1), grey, dtype=torch.uint8))
    assert values.shape == (1, 3, 1, 1)
    assert values.flatten().numpy() == pytest.approx(channels, abs=1e-6)


def test_bytes_and_shares_are_normalised_as_torchvisions_weights_want_it() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 5, 7), dtype=np.uint8))
    preset = models.get_model_weights("resnet34").IMAGENET1K_V1.transforms()
    wanted = torchvision.transforms.functional.normalize(
        (pixels / 255).unsqueeze(1).expand(-1, 3, -1, -1), preset.mean, preset.std
    )
    torch.testing.assert_close(normalise(pixels), wanted)
    torch.testing.assert_close(normalise(pixels / 255), wanted)
