"""The push: nearest patch of the own class, first of equals, copied bit for bit (method.md a.4, e 14)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from raystudy.protopnet import ProjectionRecord, ProtoPNet, project_prototypes
from raystudy.protopnet.projection import NearestPatches, merge_patches, nearest_patches, project_features
from tests.protopnet import oracle

N, CLASSES, PER_CLASS, DIM, GRID = 11, 3, 2, 4, (3, 5)
LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 0, 1, 2, 2, 0])
IDS = [f"film {i}" for i in range(N)]


def network(seed: int = 1) -> ProtoPNet:
    return ProtoPNet("resnet18", CLASSES, PER_CLASS, DIM, 1, seed=seed).eval()


def patches(seed: int = 0, levels: int | None = None) -> Tensor:
    """Features of N films; few ``levels`` make many patches exactly equal."""
    z = torch.rand(N, DIM, *GRID, generator=torch.Generator().manual_seed(seed))
    return z if levels is None else (z * levels).floor() / levels


def films(n: int = N) -> Tensor:
    return torch.randn(n, 3, 40, 56, generator=torch.Generator().manual_seed(3))


def places(record: ProjectionRecord) -> list[tuple[str, int, int]]:
    return list(zip(record.image_ids, record.rows, record.cols, strict=True))


@pytest.mark.parametrize("levels", [None, 2, 3])
@pytest.mark.parametrize("chunk", [1, 4, 256])
def test_sources_equal_one_loop_over_all_patches(levels: int | None, chunk: int) -> None:
    model, z = network(), patches(levels=levels)
    with torch.no_grad():
        if levels is not None:
            model.prototypes.copy_((model.prototypes * 2).round() / 2)
        d = model.distances_of(z)
    wanted = oracle.project(d.numpy(), LABELS.tolist(), PER_CLASS)
    record = project_features(model, z, LABELS, IDS, chunk=chunk)
    assert places(record) == [(IDS[i], row, col) for i, row, col, _ in wanted]
    assert record.distances == [distance for *_, distance in wanted]
    for j, (i, row, col, _) in enumerate(wanted):
        assert torch.equal(model.prototypes[j, :, 0, 0], z[i, :, row, col])
    assert [int(LABELS[IDS.index(i)]) for i in record.image_ids] == model.prototype_class.tolist()


@pytest.mark.parametrize("chunk", [1, 2, 256])
def test_equal_patches_go_to_the_first_image_and_then_to_the_first_cell_by_rows(chunk: int) -> None:
    model, z = network(), patches()
    patch = model.prototypes[0, :, 0, 0].detach()  # of class 0: films 1, 4, 6, 10
    for image, row, col in ((10, 0, 0), (6, 2, 1), (6, 1, 4), (6, 2, 0), (0, 0, 0)):
        z[image, :, row, col] = patch
    record = project_features(model, z, LABELS, IDS, chunk=chunk)
    assert places(record)[0] == ("film 6", 1, 4)


def test_a_film_that_is_there_twice_is_represented_by_the_first() -> None:
    x = torch.cat([films(6), films(6)])
    labels = torch.tensor([0, 1, 2, 0, 1, 2] * 2)
    for batch_size in (1, 3, 6, 12):
        record = project_prototypes(network(), x, labels, [str(i) for i in range(12)], batch_size=batch_size)
        assert max(int(i) for i in record.image_ids) < 6


def test_a_film_of_another_class_is_no_source_however_near() -> None:
    model, z = network(), patches()
    z[2, :, 1, 1] = model.prototypes[0, :, 0, 0].detach()  # film 2 is of class 1
    record = project_features(model, z, LABELS, IDS)
    assert record.image_ids[0] != "film 2"


@settings(max_examples=30)
@given(cuts=st.sets(st.integers(1, N - 1), max_size=4), order=st.randoms(use_true_random=False))
def test_shards_merge_to_the_same_sources_in_any_order(cuts: set[int], order: object) -> None:
    model, z = network(), patches(levels=2)
    with torch.no_grad():
        model.prototypes.copy_((model.prototypes * 2).round() / 2)
    whole = nearest_patches(model, z, LABELS)
    edges = [0, *sorted(cuts), N]
    shards = [nearest_patches(model, z[a:b], LABELS[a:b], first_image=a) for a, b in itertools.pairwise(edges)]
    order.shuffle(shards)
    merged = shards[0]
    for shard in shards[1:]:
        merged = merge_patches(merged, shard)
    assert all(torch.equal(a, b) for a, b in zip(merged, whole, strict=True))


def test_merging_prefers_distance_then_image_then_cell() -> None:
    def found(distance: float, image: int, cell: int) -> NearestPatches:
        place = torch.tensor([image]), torch.tensor([cell])
        return NearestPatches(torch.tensor([distance]), *place, torch.tensor([[float(cell)]]))

    best_first = [found(1, 5, 9), found(2, 3, 7), found(2, 3, 8), found(2, 4, 1)]
    for better, worse in itertools.combinations(best_first, 2):
        for merged in (merge_patches(better, worse), merge_patches(worse, better)):
            assert all(torch.equal(a, b) for a, b in zip(merged, better, strict=True))


def test_images_batch_by_batch_give_what_one_tensor_gives() -> None:
    one, other, x = network(), network(), films()
    first = project_prototypes(one, x, LABELS, IDS, batch_size=4)
    second = project_prototypes(other, iter(torch.split(x, 3)), LABELS, IDS)
    assert places(first) == places(second)
    torch.testing.assert_close(one.prototypes, other.prototypes, atol=1e-6, rtol=0)


def test_a_second_projection_changes_nothing() -> None:
    model, x = network(), films()
    first = project_prototypes(model, x, LABELS, IDS)
    vectors = model.prototypes.detach().clone()
    second = project_prototypes(model, x, LABELS, IDS)
    assert torch.equal(model.prototypes, vectors)
    assert places(second) == places(first)
    assert max(second.distances) <= 5e-5


def test_projection_moves_prototypes_only() -> None:
    model, x = network(), films()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    generator = torch.get_rng_state()
    project_prototypes(model, x, LABELS, IDS)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"prototypes"}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(m.training for m in model.modules())
    assert isinstance(model.prototypes, torch.nn.Parameter)


def test_record_holds_plain_values_for_every_prototype() -> None:
    record = project_prototypes(network(), films(), LABELS, IDS)
    p = CLASSES * PER_CLASS
    for values, kind in (
        (record.image_ids, str),
        (record.rows, int),
        (record.cols, int),
        (record.distances, float),
        (record.duplicate_of, int),
    ):
        assert len(values) == p
        assert {type(v) for v in values} == {kind}
    assert all(0 <= r < 10 for r in record.rows)
    assert all(0 <= c < 14 for c in record.cols)


def test_duplicates_name_the_first_prototype_with_the_same_patch() -> None:
    model, z = network(), patches()
    with torch.no_grad():
        model.prototypes[1] = model.prototypes[0]  # the same source
        model.prototypes[2, :, 0, 0], model.prototypes[3, :, 0, 0] = z[2, :, 0, 0], z[7, :, 2, 4]
        z[7, :, 2, 4] = z[2, :, 0, 0]  # an equal patch in another film: the first film is the source of both
        model.prototypes[3] = model.prototypes[2]
    record = project_features(model, z, LABELS, IDS)
    assert record.duplicate_of == [0, 0, 2, 2, 4, 5]


def test_equal_vectors_of_different_sources_are_duplicates_within_a_class_only() -> None:
    model, z = network(), torch.ones(N, DIM, 1, 1)  # every patch the same: each class has one source
    record = project_features(model, z, LABELS, IDS)
    assert places(record)[::2] == [("film 1", 0, 0), ("film 2", 0, 0), ("film 0", 0, 0)]
    assert record.duplicate_of == [0, 0, 2, 2, 4, 4]


def refused(rule: str, model: ProtoPNet, x: Tensor, labels: Tensor, ids: list[str]) -> None:
    before = model.prototypes.detach().clone()
    with pytest.raises(ValueError, match=rule):
        project_prototypes(model, x, labels, ids)
    torch.testing.assert_close(model.prototypes.detach(), before, rtol=0, atol=0, equal_nan=True)


def test_a_model_in_training_mode_is_refused() -> None:
    refused("eval mode", network().train(), films(), LABELS, IDS)
    model = network()
    model.backbone.bn1.train()
    refused("eval mode", model, films(), LABELS, IDS)


def test_a_class_without_images_is_refused_by_number() -> None:
    refused("class 2 has no image", network(), films(), LABELS.clamp(max=1), IDS)


def test_a_batch_size_without_images_is_refused_by_name() -> None:
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, not {batch_size}"):
            project_prototypes(network(), films(), LABELS, IDS, batch_size=batch_size)


def test_labels_outside_the_classes_are_refused() -> None:
    refused(r"labels must lie in 0\.\.2, not 3", network(), films(), LABELS + 1, IDS)


def test_weights_and_activations_that_are_not_finite_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model.prototypes[3, 1] = torch.nan
    refused("weights must be finite, prototypes", model, films(), LABELS, IDS)
    for entry in (1e38, -1e38):  # a ReLU and a sigmoid follow and would hide it
        model = network()
        with torch.no_grad():
            model.add_on[0].weight[0] = entry
        refused("activations must be finite", model, films(), LABELS, IDS)
    model = network()
    with torch.no_grad():
        model.prototypes.fill_(1e30)
    refused("distances must be finite", model, films(), LABELS, IDS)


def test_labels_that_are_no_whole_numbers_are_refused() -> None:
    refused("whole class numbers", network(), films(), LABELS + 0.5, IDS)
    refused("whole class numbers", network(), films(), LABELS[:, None], IDS)


class Counting(ProtoPNet):
    """Counts the films that go through the network."""

    seen = 0

    def features(self, images: Tensor, *, finite: bool = False) -> Tensor:
        self.seen += len(images)
        return super().features(images, finite=finite)


def test_pixels_that_are_not_finite_are_refused_before_any_work() -> None:
    model, x = Counting("resnet18", 3, 2, 8, 1).eval(), films()
    x[-1, 0, 3, 3] = torch.nan
    refused("a pixel is NaN", model, x, LABELS, IDS)
    assert model.seen == 0


def test_images_of_several_sizes_are_refused() -> None:
    def batches() -> Iterator[Tensor]:
        yield films()[:5]
        yield F.pad(films()[5:], (0, 32, 0, 32))

    model = network()
    before = model.prototypes.detach().clone()
    with pytest.raises(ValueError, match="all images must have one size"):
        project_prototypes(model, batches(), LABELS, IDS)
    assert torch.equal(model.prototypes, before)


def test_lengths_that_differ_are_refused_before_any_work() -> None:
    refused("11 images, 10 labels and 11 ids do not match", network(), films(), LABELS[:10], IDS)
    refused("11 images, 11 labels and 1 ids do not match", network(), films(), LABELS, IDS[:1])


def test_ids_that_do_not_match_labels_are_refused_before_the_first_batch_is_drawn() -> None:
    def batches() -> Iterator[Tensor]:
        raise AssertionError("a batch was drawn")
        yield films()

    with pytest.raises(ValueError, match="11 labels and 10 ids do not match"):
        project_prototypes(network(), batches(), LABELS, IDS[:10])


def test_wrong_images_are_refused() -> None:
    refused(r"images must be \(N, 3, H, W\)", network(), films()[:, :1], LABELS, IDS)
