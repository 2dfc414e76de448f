"""Masks by rank, noise in pixel space (method.md c)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raystudy.evaluate.masking import (
    least_activated,
    mask_noise,
    mask_ties,
    masked_count,
    masked_images,
    masked_similarities,
    random_ranking,
)
from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.normalise import normalise


@given(
    maps=hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9), elements=st.integers(-2, 2)),
    share=st.sampled_from([0.25, 0.29, 0.5, 0.9]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_masked_positions_are_the_first_of_a_stable_sort_by_value_then_tie(
    maps: np.ndarray, share: float, seed: int
) -> None:
    ties = np.random.default_rng(seed).random(maps.shape[1:])
    masks = least_activated(maps, ties, share)
    count = masked_count(ties.size, share)
    for one, mask in zip(maps, masks, strict=True):
        expected = np.zeros(ties.size, bool)
        expected[np.lexsort((ties.ravel(), one.ravel()))[:count]] = True
        assert np.array_equal(mask.ravel(), expected)


def test_exactly_half_of_the_positions_is_masked_even_where_most_values_are_zero() -> None:
    rng = np.random.default_rng(0)
    sparse = np.where(rng.random((3, 224, 224)) < 0.7, 0.0, rng.random((3, 224, 224))).astype(np.float32)
    masks = least_activated(sparse, rng.random((224, 224)))
    assert masks.reshape(3, -1).sum(axis=1).tolist() == [25088] * 3
    assert masked_count(100, 0.29) == 29  # 0.29 * 100 is 28.999999999999996 in binary


def test_a_constant_map_masks_a_random_half_and_not_the_top_rows() -> None:
    mask = least_activated(np.zeros((1, 40, 40)), mask_ties(0, "H1/a.png", 0, (40, 40)))[0]
    assert mask.sum() == 800
    assert 300 < mask[:20].sum() < 500


def test_negative_relevance_is_masked_first() -> None:
    mask = least_activated(np.array([[[-3.0, -1.0], [0.5, 2.0]]]), np.zeros((2, 2)))[0]
    assert mask.tolist() == [[True, True], [False, False]]


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 20))
@settings(max_examples=25)
def test_a_map_and_its_positive_multiple_mask_the_same_positions(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps = np.round(rng.normal(size=(2, 11, 13)), 1)
    ties = rng.random((11, 13))
    assert np.array_equal(least_activated(maps, ties), least_activated(maps * scale, ties))


def test_maps_with_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        least_activated(np.full((1, 4, 4), np.nan), np.zeros((4, 4)))


def test_noise_depends_on_study_image_and_draw_only() -> None:
    field = mask_noise(3, "H1/a.png", 0, (8, 6))
    assert field.shape == (3, 8, 6)
    assert field.dtype == np.float32
    assert np.array_equal(field, mask_noise(3, "H1/a.png", 0, (8, 6)))
    for other in (
        mask_noise(4, "H1/a.png", 0, (8, 6)),
        mask_noise(3, "H1/b.png", 0, (8, 6)),
        mask_noise(3, "H1/a.png", 1, (8, 6)),
    ):
        assert not np.array_equal(field, other)
    assert np.array_equal(field[0], field[2])
    colour = mask_noise(3, "H1/a.png", 0, (8, 6), "per_channel")
    assert not np.array_equal(colour[0], colour[2])
    assert not np.array_equal(random_ranking(3, "H1/a.png", 0, (8, 6)), mask_ties(3, "H1/a.png", 0, (8, 6)))


def test_noise_is_uniform_in_pixel_space_and_then_normalised_as_a_film() -> None:
    image = normalise(torch.zeros(1, 64, 64, dtype=torch.uint8))[0]
    noise = torch.from_numpy(mask_noise(0, "H1/a.png", 0, (64, 64)))
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[1, :32] = True
    masked = masked_images(image, masks, noise)
    assert torch.equal(masked[0], image)
    assert torch.equal(masked[1, :, 32:], image[:, 32:])
    assert torch.allclose(masked[1, :, :32], normalise(noise[:1])[0, :, :32])
    pixels = masked[1, :, :32] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = pixels + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert pixels.mean().item() == pytest.approx(0.5, abs=0.02)


class Brightest(torch.nn.Module):
    """A toy scorer of two prototypes: the largest value in the left and in the right half."""

    def features(self, images: torch.Tensor, *, finite: bool):
        assert finite
        return images

    def compare(self, images: torch.Tensor):
        half = images.shape[-1] // 2
        halves = [images[..., :half], images[..., half:]]
        return type("Output", (), {"similarities": torch.stack([h.amax((1, 2, 3)) for h in halves], dim=1)})()


class NotFinite(Brightest):
    """The same with a weight that is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor([1.0, torch.nan]))


def test_scores_do_not_depend_on_how_many_masked_images_go_together() -> None:
    image = normalise(
        torch.randint(0, 256, (1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )[0]
    masks = torch.rand(7, 16, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    noise = torch.from_numpy(mask_noise(0, "a", 0, (16, 16)))
    together = masked_similarities(Brightest().eval(), image, masks, noise)
    assert together.shape == (7, 2)
    assert torch.equal(together, masked_similarities(Brightest().eval(), image, masks, noise, batch_size=3))


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"model": Brightest()}, "eval mode"),
        ({"image": torch.zeros(1, 8, 8)}, r"image and noise must be \(3, H, W\)"),
        ({"image": torch.zeros(3, 8, 9)}, r"masks \(K, H, W\)"),
        ({"noise": torch.zeros(1, 8, 8)}, r"image and noise must be \(3, H, W\)"),
        ({"masks": torch.zeros(2, 9, 8, dtype=torch.bool)}, r"masks \(K, H, W\)"),
        ({"image": torch.full((3, 8, 8), torch.nan)}, "the image must be finite: a pixel is NaN"),
        ({"noise": torch.full((3, 8, 8), torch.inf)}, "the noise must be finite: a pixel is NaN"),
        ({"model": NotFinite().eval()}, "weights must be finite, gain"),
    ],
)
def test_what_cannot_be_masked_or_scored_is_refused_by_rule(changed: dict[str, Any], rule: str) -> None:
    fitting: dict[str, Any] = {
        "model": Brightest().eval(), "image": torch.zeros(3, 8, 8), "masks": torch.zeros(2, 8, 8, dtype=torch.bool),
        "noise": torch.zeros(3, 8, 8),
    }  # fmt: skip
    assert masked_similarities(**fitting).shape == (2, 2)
    with pytest.raises(ValueError, match=rule):
        masked_similarities(**{**fitting, **changed})


def test_an_overflow_that_a_relu_would_hide_is_refused() -> None:
    model = ProtoPNet("resnet18", backbone_layers=2).eval()
    with torch.no_grad():
        model.add_on[0].weight[0] = -1e38
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match="activations must be finite"):
        masked_similarities(model, torch.ones(3, 32, 32), masks, torch.zeros(3, 32, 32))
