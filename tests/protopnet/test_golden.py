"""Network, losses, steps and projection against the published code, number by number (method.md e 2, 14, 16)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from raystudy.protopnet import ProtoPNet, project_prototypes
from raystudy.protopnet.losses import LossTerms, loss_terms, mean_pair_distance
from raystudy.protopnet.receptive_field import receptive_field
from raystudy.protopnet.settings import TrainingSettings
from raystudy.protopnet.stages import Stage, build_optimizers, set_stage
from raystudy.relevance import crop_box, upsample_activation
from tests.golden_vectors import Golden

pytestmark = pytest.mark.golden
Open = Callable[[str], Golden]
PUBLISHED = TrainingSettings(last_layer_bn="published")


def ids(n: int) -> list[str]:
    return [str(i) for i in range(n)]


@pytest.mark.parametrize("name", ["r18", "r34", "r18_d64"])
def test_forward_equals_the_published_one(name: str, golden: Open) -> None:
    arrays, model, images = golden(name)
    with torch.no_grad():
        output = model(images)
    np.testing.assert_allclose(output.features.numpy(), arrays["features"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(output.distances.numpy(), arrays["distances"], atol=2e-4, rtol=0)
    np.testing.assert_allclose(output.distances.flatten(2).amin(2).numpy(), arrays["min_distances"], atol=2e-4, rtol=0)
    np.testing.assert_allclose(output.similarities.numpy(), arrays["similarities"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(output.logits.numpy(), arrays["logits"], atol=1e-4, rtol=0)


def logged(terms: LossTerms, model: ProtoPNet, n: int) -> list[float]:
    """The published log line: CE, cluster, separation, wrong-class distance, l1 of all W, pair distance, accuracy."""
    l1, pairs = model.last_layer.weight.abs().sum(), mean_pair_distance(model.prototypes)
    shown = (
        terms.cross_entropy,
        terms.cluster,
        terms.separation,
        terms.wrong_class_distance,
        l1,
        pairs,
        terms.correct / n,
    )
    return [float(v.detach()) for v in shown]


def test_losses_in_eval_mode_equal_the_published_ones(golden: Open) -> None:
    arrays, model, images = golden("train_r18")
    labels = torch.from_numpy(arrays["labels"]).long()
    with torch.no_grad():
        terms = loss_terms(model(images), labels, model, PUBLISHED)
    np.testing.assert_allclose(logged(terms, model, len(labels)), arrays["eval_log"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("stage", ["warm", "joint", "last"])
def test_three_steps_equal_the_published_ones(stage: str, golden: Open) -> None:
    arrays, model, images = golden("train_r18")
    labels = torch.from_numpy(arrays["labels"]).long()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ours: Stage = "last_layer" if stage == "last" else "warm" if stage == "warm" else "joint"
    optimizer = build_optimizers(model, PUBLISHED)[ours]
    set_stage(model, ours, PUBLISHED)
    for step in range(3):
        terms = loss_terms(model(images), labels, model, PUBLISHED)
        np.testing.assert_allclose(logged(terms, model, len(labels))[:3], arrays[f"{stage}_log"][step, :3], rtol=1e-3)
        optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        optimizer.step()

    after = model.state_dict()
    for key, name in (
        ("prototypes", "prototypes"),
        ("last_layer", "last_layer.weight"),
        ("conv1_weight", "backbone.conv1.weight"),
        ("bn1_running_mean", "backbone.bn1.running_mean"),
        ("bn1_running_var", "backbone.bn1.running_var"),
    ):
        np.testing.assert_allclose(after[name].numpy(), arrays[f"{stage}_{key}"], atol=1e-4, rtol=1e-4, err_msg=key)
    add_on = after["add_on.0.weight"][:, :64]
    np.testing.assert_allclose(add_on.numpy(), arrays[f"{stage}_add_on_0_weight"], atol=1e-4, rtol=0)

    changed = {name.split(".")[0] for name, _ in model.named_parameters() if not torch.equal(after[name], before[name])}
    groups = {
        "warm": {"add_on", "prototypes"},
        "joint": {"backbone", "add_on", "prototypes"},
        "last": {"last_layer"},
    }
    assert changed == groups[stage]
    assert not torch.equal(after["backbone.bn1.running_mean"], before["backbone.bn1.running_mean"])


@pytest.mark.parametrize("name", ["push_r18", "push_r34"])
def test_projection_takes_the_patches_that_the_published_one_takes(name: str, golden: Open) -> None:
    arrays, model, images = golden(name)
    labels = torch.from_numpy(arrays["labels"]).long()
    with torch.no_grad():
        before = model(images)
    np.testing.assert_allclose(before.distances.numpy(), arrays["distances_before"], atol=2e-4, rtol=0)
    np.testing.assert_allclose(before.logits.numpy(), arrays["logits_before"], atol=1e-4, rtol=0)

    record = project_prototypes(model, images, labels, ids(len(images)), batch_size=5)
    np.testing.assert_allclose(model.prototypes.detach().numpy(), arrays["prototypes_after"], atol=1e-5, rtol=0)
    field, size = receptive_field(model, images.shape[2]), images.shape[2]
    places = list(zip(record.image_ids, record.rows, record.cols, strict=True))
    boxes = [[int(i), *field.box(row, col, size), j // (len(places) // 2)] for j, (i, row, col) in enumerate(places)]
    np.testing.assert_array_equal(np.array(boxes), arrays["rf_boxes"])

    # The box of the published push: the most activated 5 % of the source's activation map before the projection.
    rows = torch.tensor([int(i) for i in record.image_ids])
    distances = before.distances[rows, torch.arange(len(rows))]  # P, h, w
    activation = torch.log((distances + 1) / (distances + 1e-4))
    np.testing.assert_allclose(activation.numpy(), arrays["self_activation"], atol=1e-4, rtol=0)
    crops = [list(crop_box(m)) for m in upsample_activation(activation, (size, size))]
    np.testing.assert_array_equal(np.array(crops), arrays["bound_boxes"][:, 1:5])
    np.testing.assert_array_equal(rows.numpy(), arrays["bound_boxes"][:, 0])

    with torch.no_grad():
        after = model(images)
    own_source = after.distances.flatten(2).amin(2)[rows, torch.arange(len(rows))]
    assert own_source.max() <= 5e-5
    np.testing.assert_allclose(after.features.numpy(), arrays["features_after"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(after.distances.numpy(), arrays["distances_after"], atol=2e-4, rtol=0)
    away = torch.from_numpy(arrays["min_distances_after"]) > 1e-2
    ours, theirs = after.similarities[away], torch.from_numpy(arrays["similarities_after"])[away]
    # s' = 1/(d + 1) - 1/(d + 1e-4) is at most 100 at d = 0.01, and d is known to 1e-5 there.
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    np.testing.assert_allclose(after.similarities.numpy(), arrays["similarities_after"], atol=0.4, rtol=0)


@pytest.mark.parametrize("name", ["push_r18", "push_r34"])
def test_projection_is_the_same_for_all_batch_sizes_and_repeats(name: str, golden: Open) -> None:
    arrays, model, images = golden(name)
    labels = torch.from_numpy(arrays["labels"]).long()
    records, vectors = [], []
    for batch_size in (1, 5, 64):
        fresh = golden(name).model
        records.append(project_prototypes(fresh, images, labels, ids(len(images)), batch_size=batch_size))
        vectors.append(fresh.prototypes.detach())
        model = fresh
    for record, vector in zip(records[1:], vectors[1:], strict=True):
        assert (record.image_ids, record.rows, record.cols) == (records[0].image_ids, records[0].rows, records[0].cols)
        torch.testing.assert_close(vector, vectors[0], atol=1e-5, rtol=0)
    once = model.prototypes.detach().clone()
    again = project_prototypes(model, images, labels, ids(len(images)), batch_size=64)
    assert torch.equal(model.prototypes, once)
    assert (again.image_ids, again.rows, again.cols) == (records[0].image_ids, records[0].rows, records[0].cols)
    assert_sources_are_of_the_prototypes_class(again.image_ids, labels, model)
    with torch.no_grad():
        scores = model(images).similarities
    own = scores[torch.tensor([int(i) for i in again.image_ids]), torch.arange(scores.shape[1])]
    assert own.min() > 8.8
    assert scores.max() <= np.log(1e4) + 1e-5


def assert_sources_are_of_the_prototypes_class(image_ids: list[str], labels: Tensor, model: ProtoPNet) -> None:
    assert torch.equal(labels[torch.tensor([int(i) for i in image_ids])], model.prototype_class)
