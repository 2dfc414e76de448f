"""AD/AI refuses what it cannot measure, before any work."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest
import torch

from raystudy.explanation_faithfulness import PairMaker, masked_scores
from raystudy.explanation_settings import ExplainSettings
from raystudy.protopnet import ProtoPNet
from raystudy.relevance import PrototypeExplainer, Relevance, UniquePrototype

ROW = {"image_id": "H1/a.png", "patient_id": "H1:a", "source": "H1", "test_set": "Test-50-50"}


def network() -> ProtoPNet:
    return ProtoPNet("resnet18", 2, 2, 8, 2).eval()


def maker(model: ProtoPNet, *prototypes: int) -> PairMaker:
    unique = [UniquePrototype(j, j // 2, (j,)) for j in prototypes]
    explainer = PrototypeExplainer(network())
    return PairMaker(model, explainer, unique, ExplainSettings(), 0, torch.device("cpu"))


def film() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8)


def test_pairs_of_a_fitting_film_have_three_methods() -> None:
    with torch.no_grad():
        rows = maker(network(), 0, 1, 2, 3).rows(ROW, film(), None)
    assert [r["method"] for r in rows] == ["protopnet"] * 2 + ["prp"] * 2 + ["random"] * 2


class Negated(PrototypeExplainer):
    """Explains with the sign turned round."""

    def __call__(self, images: torch.Tensor, prototypes: torch.Tensor) -> Relevance:
        found = super().__call__(images, prototypes)
        return dataclasses.replace(found, maps=-found.maps)


def masked_prp(explainer: PrototypeExplainer, ranking: Literal["signed", "absolute"]) -> list[object]:
    given = dataclasses.replace(maker(network(), 0, 1, 2, 3), explainer=explainer)
    with torch.no_grad():
        rows = dataclasses.replace(given, settings=ExplainSettings(ranking=ranking)).rows(ROW, film(), None)
    return [row["score_masked"] for row in rows if row["method"] == "prp"]


def test_absolute_ranking_does_not_see_the_sign_of_relevance() -> None:
    plain, turned = PrototypeExplainer(network()), Negated(network())
    assert masked_prp(turned, "absolute") == masked_prp(plain, "absolute") == masked_prp(plain, "signed")
    assert masked_prp(turned, "signed") != masked_prp(plain, "signed")


def test_a_model_in_training_mode_is_refused() -> None:
    model = network()
    model.backbone.bn1.train()
    with pytest.raises(ValueError, match="eval mode"):
        maker(model, 0)


@pytest.mark.parametrize("prototypes", [(0, 4), (-1, 2), ()])
def test_prototypes_out_of_range_are_refused(prototypes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"prototypes must lie in 0\.\.3"):
        maker(network(), *prototypes)


@pytest.mark.parametrize("grey", [film()[None], np.repeat(film()[..., None], 3, 2), film() / 255])
def test_pixels_that_are_no_grey_film_are_refused(grey: Any) -> None:
    with pytest.raises(ValueError, match=r"a film must be \(H, W\) grey bytes"):
        maker(network(), 0).rows(ROW, grey, None)


def test_a_network_whose_activations_overflow_is_refused() -> None:
    model = network()
    with torch.no_grad():
        model.add_on[2].get_parameter("bias").fill_(torch.nan)
    with torch.no_grad(), pytest.raises(ValueError, match="scores must be positive and finite"):
        maker(model, 0, 1, 2, 3).rows(ROW, film(), None)


def test_a_stack_of_maps_for_other_prototypes_is_refused() -> None:
    maps = {"prp": np.zeros((3, 48, 48))}
    with pytest.raises(ValueError, match="prp must have 1 map or one of each of 2 prototypes, not 3"):
        masked_scores(network(), torch.zeros(3, 48, 48), [0, 1], maps, film() / 1.0, np.zeros((3, 48, 48), np.float32))
