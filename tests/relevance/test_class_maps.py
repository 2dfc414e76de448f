"""Unique prototypes, class maps and top-k images (method.md e 20)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raystudy.protopnet import project_prototypes
from raystudy.relevance import class_map, prototype_relevance, top_images, unique_prototypes
from tests.relevance.nets import random_images, random_net


def test_prototypes_of_one_patch_are_one_and_keep_their_number() -> None:
    vectors = torch.tensor([[0.0], [1.0], [0.0], [2.0], [0.0], [1.0]])
    groups = unique_prototypes(
        ["a", "b", "a", "c", "a", "d"], [0, 1, 0, 2, 0, 1], [0, 1, 0, 2, 0, 1], vectors, [0, 0, 0, 0, 1, 1]
    )
    # 0 and 2 share a patch; 4 is the same patch of another class; 1 and 5 are equal but of different classes
    assert [(g.prototype, g.label, g.members, g.multiplicity) for g in groups] == [
        (0, 0, (0, 2), 2),
        (1, 0, (1,), 1),
        (3, 0, (3,), 1),
        (4, 1, (4,), 1),
        (5, 1, (5,), 1),
    ]


def test_duplicate_files_merge_by_equal_vectors_even_through_a_third() -> None:
    # 0 and 2 have one source, 1 and 2 equal vectors: all three are one patch
    vectors = torch.tensor([[0.5, 1.0], [3.0, 4.0], [3.0, 4.0], [3.0, 4.000001]])
    groups = unique_prototypes(["a", "b", "a", "c"], [0, 0, 0, 0], [1, 0, 1, 0], vectors, [0, 0, 0, 0])
    assert [g.members for g in groups] == [(0, 1, 2), (3,)]


def test_unique_prototypes_refuses_columns_of_different_length() -> None:
    with pytest.raises(ValueError, match="one entry for each prototype"):
        unique_prototypes(["a"], [0], [0], torch.zeros(2, 1), [0, 0])


def test_class_map_is_the_mean_of_displayed_maps_with_largest_value_one() -> None:
    maps = torch.tensor([[[2.0, 0.0], [0.0, -1.0]], [[0.0, 10.0], [0.0, 0.0]]])
    # displayed: [1, 0, 0, -.5] and [0, 1, 0, 0]
    assert class_map(maps).flatten().tolist() == [1, 1, 0, -0.5]
    assert class_map(maps, "unit_sum").flatten().tolist() == pytest.approx([0.2, 1, 0, -0.1])
    assert class_map(maps, "multiplicity", multiplicities=[2, 1]).flatten().tolist() == [1, 0.5, 0, -0.5]
    assert class_map(maps, "score", scores=[1.0, 4.0]).flatten().tolist() == [0.25, 1, 0, -0.125]
    assert class_map(maps, "maximum").flatten().tolist() == [1, 1, 0, 0]


def test_class_map_refuses_missing_weights_and_no_maps() -> None:
    with pytest.raises(ValueError, match="one weight for each of 2 maps"):
        class_map(torch.ones(2, 3, 3), "score", scores=[1.0])
    with pytest.raises(ValueError, match="U >= 1"):
        class_map(torch.zeros(0, 3, 3))


def test_top_images_rank_by_distance_then_name() -> None:
    distances = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 0.5], [1.0, 9.0]])
    ranked = top_images(distances, ["d", "c", "b", "a"], 3)
    assert ranked.rows.tolist() == [[3, 1, 2], [2, 1, 0]]
    assert not ranked.is_source.any()


def test_the_source_image_is_first_among_ties_within_rounding_only() -> None:
    distances = torch.tensor([[1e-5, 0.2], [0.0, 0.3], [4.0, 0.1]])
    ranked = top_images(distances, ["a", "b", "c"], 5, sources=["a", "b"])
    assert ranked.rows.tolist() == [[0, 1, 2], [2, 0, 1]]
    assert ranked.is_source.tolist() == [[True, False, False], [False, False, True]]


def test_top_images_refuses_tables_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="one row for each of 3 images"):
        top_images(torch.zeros(2, 2), ["a", "b", "c"], 1)
    with pytest.raises(ValueError, match="one image for each of 2 prototypes"):
        top_images(torch.zeros(1, 2), ["a"], 1, sources=["a"])
    with pytest.raises(ValueError, match="k must be at least 1"):
        top_images(torch.zeros(1, 2), ["a"], 0)


def test_a_projected_prototypes_nearest_image_is_its_source_and_its_map_starts_at_the_source_cell() -> None:
    net, images = random_net(layers=3), random_images(8, 64)
    ids = [f"image{i}" for i in range(8)]
    record = project_prototypes(net, images, torch.arange(8) % 2, ids)
    with torch.no_grad():
        out = net(images)
    ranked = top_images(out.distances.amin((2, 3)), ids, 4, sources=record.image_ids)
    assert [ids[r] for r in ranked.rows[:, 0]] == list(record.image_ids)
    assert ranked.is_source[:, 0].all()
    for j, name in enumerate(record.image_ids):
        i = ids.index(name)
        result = prototype_relevance(net, images[i : i + 1], torch.tensor([[j]]))
        h, w = result.cells[0, 0].tolist()
        distances = out.distances[i, j]
        assert distances[h, w] <= distances[int(record.rows[j]), int(record.cols[j])] + 5e-5
        assert distances[h, w] <= 5e-5
    classes = np.arange(6) // 3
    groups = unique_prototypes(record.image_ids, record.rows, record.cols, net.prototypes, classes.tolist())
    assert sorted(j for g in groups for j in g.members) == list(range(6))
