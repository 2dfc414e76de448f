"""The job "prototypes" on small random networks: what each number is measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch

from raystudy.explanation_chunks import Pieces
from raystudy.explanation_prototypes import PrototypeJob, Sources
from raystudy.explanation_settings import ExplainSettings
from raystudy.images.array import ImageArray
from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.normalise import normalise
from raystudy.relevance import RULE_SETS, PrototypeExplainer, UniquePrototype, measure_specificity
from raystudy.streams import stream
from tests.relevance.nets import random_net

SIZE, PER_CLASS, SEED = 48, 5, 3


def job_of(net: ProtoPNet, members: Sequence[tuple[int, ...]], frozen: bool = True, **settings: Any) -> PrototypeJob:
    """Return the job of a network whose prototype j comes from film j, cell (0, 0); ``members`` are the unique ones."""
    pixels = np.random.default_rng(0).integers(0, 256, (2 * PER_CLASS, SIZE, SIZE), dtype=np.uint8)
    names = tuple(str(j) for j in range(2 * PER_CLASS))
    cells, classes = [0] * len(names), [0] * PER_CLASS + [1] * PER_CLASS
    unique = [UniquePrototype(m[0], classes[m[0]], m) for m in members]
    return PrototypeJob(
        net, PrototypeExplainer(net), unique, Sources(names, cells, cells, classes), names, ImageArray(names, pixels),
        ExplainSettings(**settings), SEED, torch.device("cpu"), frozen,
    )  # fmt: skip


class OnePiece:
    """Computes everything at once and keeps nothing."""

    def run(self, _name: str, count: int, _size: int, compute: Callable[[range], bytes]) -> list[bytes]:
        return [compute(range(count))]

    def item(self) -> None:
        """Nobody stops this job."""


def specificity(job: PrototypeJob) -> dict[str, dict[str, Any]]:
    with torch.no_grad():
        return job.specificity(cast(Pieces, OnePiece()))


def maps(job: PrototypeJob) -> dict[str, np.ndarray]:
    """Return what is found on the sources; the source is the one top image."""
    with torch.no_grad():
        return job.maps(cast(Pieces, OnePiece()), np.array([[u.prototype] for u in job.unique]))


def test_specificity_pools_classes_with_different_numbers_of_unique_prototypes() -> None:
    net = random_net(per_class=PER_CLASS, layers=2)
    job = job_of(net, [(0, 1, 2, 3, 4), (5,), (6,), (7,), (8,), (9,)])
    found = specificity(job)
    films = normalise(torch.from_numpy(job.images.take(["0", "5", "6"])))
    for rule in RULE_SETS:
        draw, explainer = stream(SEED, "specificity"), PrototypeExplainer(net, rule)
        one = measure_specificity(explainer, films[:1], torch.tensor([[0]]), draw)
        four = measure_specificity(explainer, films[1:], torch.tensor([[5, 6, 7, 8]] * 2), draw)
        numbers = found[rule]
        assert (numbers["n_same_cell"], numbers["n_natural"]) == (12, four.n_natural)
        assert (numbers["n_shuffled"], numbers["n_maps"]) == (9, 9)
        assert numbers["same_cell"] == pytest.approx(four.same_cell, abs=1e-6)
        assert numbers["shuffled"] == pytest.approx((one.shuffled + 8 * four.shuffled) / 9, abs=1e-6)
        assert numbers["conservation"] == pytest.approx((one.conservation + 8 * four.conservation) / 9, abs=1e-6)
    assert found["separating"]["shuffled"] < found["published"]["shuffled"] - 1e-4


def test_specificity_of_classes_of_one_prototype_has_no_pairs() -> None:
    found = specificity(job_of(random_net(per_class=PER_CLASS, layers=1), [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]))
    for numbers in found.values():
        assert (numbers["same_cell"], numbers["n_same_cell"], numbers["n_shuffled"]) == (None, 0, 2)
        assert numbers["shuffled"] is not None


def test_maps_are_of_the_unit_seed_or_of_the_score_as_the_settings_say() -> None:
    net = random_net(per_class=PER_CLASS, layers=2)
    unit, scored = (maps(job_of(net, [(0,), (7,)], frozen=False, prp_scale=scale)) for scale in ("unit", "score"))
    assert unit["prp"].sum((1, 2)) == pytest.approx([1, 1], abs=1e-2)
    assert np.abs(unit["score"] - 1).min() > 0.1
    np.testing.assert_allclose(scored["prp"], unit["prp"] * unit["score"][:, None, None], rtol=1e-5)
    assert (scored["top"] == unit["top"]).all()


@pytest.mark.parametrize("dim", [128, 256])
def test_a_frozen_prototype_must_fire_at_its_source_up_to_rounding(dim: int) -> None:
    # 5e-5 at 128 channels (method.md d), as much more as the sum of squares has more terms
    net = random_net(per_class=PER_CLASS, dim=dim, layers=2)
    job = job_of(net, [(0,)])
    with torch.no_grad():
        cells = net.features(job.films(["0"]))[0].flatten(1).double()  # D, h w
        source = cells[:, 0]  # cell (0, 0)
        lengths = (cells - source[:, None]).square().sum(0)
        lengths[0] = torch.inf
        length, other = float(lengths.min()), cells[:, int(lengths.argmin())]
        for gap, fits in ((0.0, True), (2 * 5e-5 * dim / 128, False)):
            # p divides the way between both cells so that the other one is nearer by the gap
            p = source + (0.5 + 0.5 * gap / length) * (other - source)
            net.prototypes[0] = p.float().view(-1, 1, 1)
            if fits:
                maps(job)
                continue
            with pytest.raises(ValueError, match="prototype 0 does not fire at its source cell in 0"):
                maps(job)
            maps(dataclasses.replace(job, frozen=False))  # published batch norm lets features move on
