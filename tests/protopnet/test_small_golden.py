"""Forward pass, losses, three steps of each stage and projection against the slow oracle's stored numbers.

These stand in where the published code's vectors are not at hand; see small_golden.py for their making.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from raystudy.protopnet import ProtoPNet, project_prototypes
from raystudy.protopnet.losses import LossTerms, loss_terms
from raystudy.protopnet.settings import TrainingSettings
from raystudy.protopnet.stages import Stage, build_optimizers, set_stage
from tests.protopnet import oracle
from tests.protopnet.small_golden import CASES, FILE, LABELS, images, shapes_of, weights

PUBLISHED = TrainingSettings(last_layer_bn="published")


@functools.cache
def stored() -> dict[str, NDArray[np.float64]]:
    with np.load(FILE) as file:
        return {name: file[name] for name in file.files}


def network(case: str, device: torch.device) -> ProtoPNet:
    c = CASES[case]
    model = ProtoPNet(c.arch, c.classes, c.per_class, c.dim, c.layers)
    state = {name: value.float() for name, value in weights(case, shapes_of(case)).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return model.eval().to(device)


@pytest.mark.parametrize("case", sorted(CASES))
def test_forward_equals_the_slow_oracle(case: str, device: torch.device) -> None:
    with torch.no_grad():
        output = network(case, device)(images(case).float().to(device))
    for name, atol in (("features", 1e-5), ("distances", 1e-4), ("similarities", 1e-4), ("logits", 1e-4)):
        ours, wanted = getattr(output, name).cpu().numpy(), stored()[f"{case}.{name}"]
        np.testing.assert_allclose(ours, wanted, atol=atol, rtol=0, err_msg=name)
        assert ours.dtype == np.float32


def test_the_stored_numbers_are_still_the_oracles() -> None:
    c = CASES["r50"]
    output = oracle.forward(weights("r50", shapes_of("r50")), c.arch, c.layers, images("r50"))
    for name, value in output.items():
        np.testing.assert_allclose(value.numpy(), stored()[f"r50.{name}"], atol=1e-10, rtol=0)


def shown(terms: LossTerms) -> list[float]:
    return [float(t.detach()) for t in (terms.total, terms.cross_entropy, terms.cluster, terms.separation, terms.l1)]


def test_losses_equal_the_slow_oracle(device: torch.device) -> None:
    model, labels = network("r18", device), torch.tensor(LABELS, device=device)
    terms = loss_terms(model(images("r18").float().to(device)), labels, model, PUBLISHED)
    np.testing.assert_allclose(shown(terms), stored()["losses"], rtol=1e-5)


@pytest.mark.parametrize("stage", ["warm", "joint", "last"])
def test_three_steps_equal_the_slow_oracle(stage: str, device: torch.device) -> None:
    model, labels = network("r18", device), torch.tensor(LABELS, device=device)
    x = images("r18").float().to(device)
    ours: Stage = "last_layer" if stage == "last" else "warm" if stage == "warm" else "joint"
    optimizer = build_optimizers(model, PUBLISHED)[ours]
    set_stage(model, ours, PUBLISHED)
    for step in range(3):
        terms = loss_terms(model(x), labels, model, PUBLISHED)
        np.testing.assert_allclose(shown(terms), stored()[f"{stage}.log"][step], rtol=1e-3, err_msg=f"step {step}")
        optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        optimizer.step()
    for name in ("prototypes", "add_on.2.weight", "last_layer.weight", "backbone.layer2.0.downsample.0.weight"):
        value = model.state_dict()[name].flatten()[:256].cpu().numpy()
        # A step is about the learning rate long, whatever the gradient: tolerance is a hundredth of the smallest rate.
        np.testing.assert_allclose(value, stored()[f"{stage}.{name}"], atol=1e-5, rtol=0, err_msg=name)


def test_projection_equals_the_slow_oracle(device: torch.device) -> None:
    model = network("r18", device)
    record = project_prototypes(
        model, images("r18").float().to(device), torch.tensor(LABELS), [str(i) for i in range(len(LABELS))]
    )
    sources = [[int(i), r, c] for i, r, c in zip(record.image_ids, record.rows, record.cols, strict=True)]
    assert sources == stored()["projection.sources"].tolist()
    np.testing.assert_allclose(record.distances, stored()["projection.distances"], atol=1e-4, rtol=0)
    vectors = model.prototypes.detach().flatten(1).cpu().numpy()
    np.testing.assert_allclose(vectors, stored()["projection.prototypes"], atol=1e-5, rtol=0)
