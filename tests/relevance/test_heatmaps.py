"""Upsampling, scaling, boxes and overlays (method.md e 18 without the golden part)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raystudy.relevance import (
    crop_box,
    overlay_activation,
    overlay_relevance,
    scale_activation,
    scale_relevance,
    upsample_activation,
)


def cubic_row(values: list[float], size: int) -> list[float]:
    """OpenCV's INTER_CUBIC in one dimension: a = -0.75, centres at halves, edges repeated."""
    out = []
    for i in range(size):
        x = (i + 0.5) * len(values) / size - 0.5
        base = int(np.floor(x))
        total = 0.0
        for k in range(base - 1, base + 3):
            d = abs(x - k)
            near = 1.25 * d**3 - 2.25 * d**2 + 1
            far = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            total += (near if d <= 1 else far if d < 2 else 0.0) * values[min(max(k, 0), len(values) - 1)]
        out.append(total)
    return out


def test_cubic_upsampling_equals_the_written_out_kernel() -> None:
    row = [0.0, 1.0, 0.2, 0.7]
    result = upsample_activation(torch.tensor([row, row, row], dtype=torch.float64), (3, 13))
    np.testing.assert_allclose(result[0].numpy(), cubic_row(row, 13), atol=1e-12)


def test_bilinear_upsampling_by_hand() -> None:
    result = upsample_activation(torch.tensor([[[0.0, 1.0]]]), (1, 4), "bilinear")
    assert result[0, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1])


def test_upsampling_keeps_leading_dimensions_and_refuses_other_modes() -> None:
    assert upsample_activation(torch.zeros(2, 5, 7, 6), (20, 30)).shape == (2, 5, 20, 30)
    with pytest.raises(ValueError, match="cubic or bilinear"):
        upsample_activation(torch.zeros(2, 2), (4, 4), "nearest")


def test_scaling_reaches_the_ends_and_survives_constant_maps() -> None:
    heat = torch.tensor([[[1.0, 3.0], [2.0, 5.0]], [[2.0, 2.0], [2.0, 2.0]]])
    assert scale_activation(heat)[0].tolist() == [[0, 0.5], [0.25, 1]]
    assert not scale_activation(heat)[1].any()
    maps = torch.tensor([[[1.0, -4.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert scale_relevance(maps)[0].tolist() == [[0.25, -1], [0, 0.5]]
    assert not scale_relevance(maps)[1].any()


def test_crop_box_is_the_tight_rectangle_with_exclusive_ends() -> None:
    heat = torch.zeros(20, 30)
    heat[4, 7] = heat[9, 20] = 1.0  # 2 of 600 pixels: the 95th percentile is 0, everything is inside
    assert crop_box(heat) == (0, 20, 0, 30)
    assert crop_box(heat, 100) == (4, 10, 7, 21)


@pytest.mark.parametrize("seed", range(5))
def test_crop_box_uses_numpys_linear_percentile(seed: int) -> None:
    heat = torch.rand(17, 23, generator=torch.Generator().manual_seed(seed))
    inside = np.argwhere(heat.numpy() >= np.percentile(heat.numpy().astype(np.float64), 99))
    (top, left), (bottom, right) = inside.min(0), inside.max(0) + 1
    assert crop_box(heat, 99) == (top, bottom, left, right)


def test_crop_box_refuses_a_percentile_beyond_100() -> None:
    with pytest.raises(ValueError, match=r"0\.\.100"):
        crop_box(torch.zeros(2, 2), 101)


def test_overlays_mix_image_and_colours_as_published() -> None:
    image = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    heat = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    jet = overlay_activation(image, heat)
    assert jet.shape == (2, 2, 3)
    assert jet[0, 0].tolist() == pytest.approx([0, 0, 0.15])  # dark blue at 0
    assert jet[0, 1].tolist() == pytest.approx([0.65, 0.5, 0.5])  # dark red at 1
    seismic = overlay_relevance(image, torch.tensor([[0.0, 2.0], [-2.0, 1.0]]))
    assert seismic[0, 0].tolist() == pytest.approx([0.6, 0.6, 0.6])  # white at 0
    assert seismic[0, 1].tolist() == pytest.approx([0.5, 0.2, 0.2])  # dark red at +max
    assert seismic[1, 0].tolist() == pytest.approx([0.1, 0.1, 0.28])  # dark blue at -max
