"""The names, signatures and shapes of the numeric rooms that others rely on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import raystudy.protopnet
import raystudy.relevance
from raystudy.protopnet import ProjectionRecord, ProtoPNet, ProtoPNetOutput, project_prototypes
from raystudy.relevance import Relevance, prototype_relevance


def positional(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """What may be given without a name, with its default (None where there is none)."""
    return [
        (p.name, None if p.default is p.empty else p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]


def further_arguments_have_defaults(function: Callable[..., Any]) -> bool:
    named = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return all(p.default is not p.empty for p in named)


def test_the_network_is_built_by_the_documented_arguments() -> None:
    assert positional(ProtoPNet) == [
        ("backbone", "resnet34"), ("num_classes", 2), ("prototypes_per_class", 10), ("prototype_dim", 128),
        ("backbone_layers", 4),
    ]  # fmt: skip
    assert further_arguments_have_defaults(ProtoPNet)
    assert ProtoPNetOutput._fields == ("logits", "similarities", "distances", "features")


def test_projection_has_the_documented_arguments_and_record() -> None:
    arguments = positional(project_prototypes)
    assert arguments[:4] == [("model", None), ("images", None), ("labels", None), ("image_ids", None)]
    assert [name for name, _ in arguments[4:]] == ["batch_size"]
    assert further_arguments_have_defaults(project_prototypes)
    names = [f.name for f in dataclasses.fields(ProjectionRecord)]
    assert names[:4] == ["image_ids", "rows", "cols", "distances"]


def test_relevance_has_the_documented_arguments_and_result() -> None:
    assert positional(prototype_relevance) == [
        ("model", None), ("images", None), ("prototypes", None), ("rule", "published"), ("l2_power", 2)
    ]  # fmt: skip
    assert further_arguments_have_defaults(prototype_relevance)
    assert [f.name for f in dataclasses.fields(Relevance)] == ["maps", "scores", "cells", "features"]


@pytest.mark.parametrize("room", [raystudy.protopnet, raystudy.relevance])
def test_every_public_name_exists(room: Any) -> None:
    assert all(hasattr(room, name) for name in room.__all__)


NETWORKS = [
    pytest.param("resnet18", 2, 3, 16, 4, (96, 96), (3, 3), id="resnet18 at 96 px"),
    pytest.param("resnet18", 2, 3, 16, 3, (96, 96), (6, 6), id="three stages at 96 px"),
    pytest.param("resnet34", 2, 2, 64, 4, (160, 160), (5, 5), id="resnet34 at 160 px"),
    pytest.param("resnet50", 3, 2, 8, 3, (96, 64), (6, 4), id="resnet50, three classes, not square"),
    pytest.param("resnet50", 2, 1, 8, 4, (64, 64), (2, 2), id="resnet50, one prototype a class"),
]


@pytest.mark.parametrize(("backbone", "classes", "per_class", "dim", "layers", "size", "grid"), NETWORKS)
def test_shapes_follow_from_the_arguments_all_the_way(
    backbone: str, classes: int, per_class: int, dim: int, layers: int, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    model = ProtoPNet(backbone, classes, per_class, dim, layers).eval()
    n, p = 2 * classes, classes * per_class
    images = torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(images)
    assert [tuple(t.shape) for t in out] == [(n, classes), (n, p), (n, p, *grid), (n, dim, *grid)]
    assert tuple(model.prototypes.shape) == (p, dim, 1, 1)
    assert tuple(model.last_layer.weight.shape) == (classes, p)

    labels, names = torch.arange(n) % classes, [f"film {i}" for i in range(n)]
    record = project_prototypes(model, images, labels, names, batch_size=3)
    assert [len(v) for v in (record.image_ids, record.rows, record.cols, record.distances)] == [p] * 4
    assert all(0 <= r < grid[0] and 0 <= c < grid[1] for r, c in zip(record.rows, record.cols, strict=True))

    chosen = torch.tensor([[0, p - 1], [p - 1, 0]])
    result = prototype_relevance(model, images[:2], chosen)
    shapes = [tuple(t.shape) for t in (result.maps, result.scores, result.cells, result.features)]
    assert shapes == [(2, 2, *size), (2, 2), (2, 2, 2), (2, 2, dim)]
    assert result.cells.dtype == torch.int64
    # the seed of 1 is shared among the channels
    assert float(result.features.sum(2).sub(1).abs().max()) < 1e-5


def test_projection_takes_a_tensor_or_any_iterable_of_batches() -> None:
    images = torch.randn(7, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    labels, names = torch.arange(7) % 2, list("abcdefg")

    def project(given: Any) -> tuple[ProjectionRecord, torch.Tensor]:
        model = ProtoPNet("resnet18", 2, 2, 8, 2).eval()
        return project_prototypes(model, given, labels, names), model.prototypes.detach().clone()

    whole, vectors = project(images)
    for given in (list(images.split(3)), (batch for batch in images.split(2)), images.split(7)):
        record, moved = project(given)
        assert (record.image_ids, record.rows, record.cols) == (whole.image_ids, whole.rows, whole.cols)
        torch.testing.assert_close(moved, vectors, rtol=1e-5, atol=1e-6)
