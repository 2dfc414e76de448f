"""Winograd's form equals the direct convolution and rounds no worse."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from raystudy.relevance import winograd


@pytest.mark.parametrize(
    ("n", "inputs", "outputs", "height", "width"),
    [(1, 8, 5, 8, 8), (3, 4, 6, 14, 14), (2, 5, 4, 7, 7), (2, 3, 3, 13, 9), (1, 4, 4, 5, 5), (2, 2, 2, 3, 28)],
)
def test_equals_the_direct_convolution(n: int, inputs: int, outputs: int, height: int, width: int) -> None:
    g = torch.Generator().manual_seed(height)
    x = torch.randn(n, inputs, height, width, generator=g, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, 3, 3, generator=g, dtype=torch.float64)
    result = winograd.convolution(weight)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(result, F.conv2d(x, weight, padding=1), rtol=1e-10, atol=1e-10)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, 12, 12, generator=g).contiguous(memory_format=torch.channels_last)
    convolve = winograd.convolution(torch.randn(4, 4, 3, 3, generator=g))
    whole = convolve(x)
    monkeypatch.setattr(winograd, "CHUNK_BYTES", 36 * 9 * 4 * 4 * 3)  # three images at a time, then one
    torch.testing.assert_close(convolve(x), whole, rtol=1e-5, atol=1e-5)


def test_rounds_no_worse_than_the_direct_form_on_positive_sums() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(1, 256, 14, 14, generator=g).contiguous(memory_format=torch.channels_last)
    weight = torch.rand(128, 256, 3, 3, generator=g)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    error = float((winograd.convolution(weight)(x) - exact).abs().max() / exact.max())
    assert error < 5e-6


def test_outputs_out_of_reach_of_any_input_are_exactly_zero() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.zeros(2, 8, 12, 12)
    x[0, 3, 5, 5] = 0.7
    x[1, :, 0, :4] = -torch.rand(8, 4, generator=g)
    weight = torch.rand(8, 8, 3, 3, generator=g)
    result = winograd.convolution(weight)(x.contiguous(memory_format=torch.channels_last))
    expected = F.conv2d(x, weight, padding=1)
    assert torch.equal(result == 0, expected == 0)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def test_pays_only_where_the_products_outweigh_the_transforms() -> None:
    assert winograd.pays(torch.zeros(128, 128, 3, 3))
    assert winograd.pays(torch.zeros(64, 64, 3, 3))
    assert not winograd.pays(torch.zeros(32, 128, 3, 3))
    assert not winograd.pays(torch.zeros(128, 128, 1, 1))
    assert not winograd.pays(torch.zeros(128, 128, 3, 3, dtype=torch.float64))
    assert not winograd.pays(torch.zeros(128, 128, 3, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize(("n", "size"), [(1, (28, 28)), (4, (14, 14)), (9, (7, 7)), (1, (7, 7)), (3, (9, 13))])
def test_one_pass_gives_the_plain_output_and_the_sum_of_positive_weights(n: int, size: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(n)
    a = torch.rand(n, 7, *size, generator=g).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(6, 7, 3, 3, generator=g), torch.randn(6, generator=g)
    y, z = winograd.output_and_positive_sum(weight, bias)(a)
    torch.testing.assert_close(y, F.conv2d(a, weight, bias, padding=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z, F.conv2d(a, weight.clamp(min=0), padding=1), rtol=1e-4, atol=1e-5)


def test_sums_beside_a_dead_region_are_right_beside_themselves() -> None:
    # A tile's rounding is that of its largest value: here 1e6 times the sums in the faint half, and the rest is 0.
    g = torch.Generator().manual_seed(3)
    a = torch.rand(2, 32, 20, 20, generator=g)
    a[:, :, :, 6:10] *= 1e-6
    a[:, :, :, 10:] = 0
    weight = torch.randn(16, 32, 3, 3, generator=g)
    _, z = winograd.output_and_positive_sum(weight, torch.zeros(16))(a.contiguous(memory_format=torch.channels_last))
    exact = F.conv2d(a.double(), weight.double().clamp(min=0), padding=1)
    assert torch.equal(z == 0, exact == 0)
    reached = exact > 0
    assert float((z[reached] / exact[reached] - 1).abs().max()) < 1e-3


def test_a_channel_without_positive_weights_stays_without_relevance() -> None:
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(8, 8, 3, 3, generator=g)
    weight[5] = -weight[5].abs()
    a = torch.rand(1, 8, 16, 16, generator=g).contiguous(memory_format=torch.channels_last)
    _, z = winograd.output_and_positive_sum(weight, torch.zeros(8))(a)
    assert not z[:, 5].any()
    assert bool((z[:, 4] > 0).all())
