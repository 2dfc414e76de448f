"""An image's AD/AI pairs equal a slow loop; what cannot be measured is refused before any work."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from raystudy.evaluate.masking import mask_noise, mask_ties, random_ranking
from raystudy.explanation_faithfulness import PairMaker, masked_scores
from raystudy.explanation_settings import ExplainSettings
from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.normalise import normalise
from raystudy.relevance import PrototypeExplainer, Relevance, UniquePrototype
from tests.relevance.nets import random_net
from tests.relevance.oracle import SlowPRP

ROW = {"image_id": "H1/a.png", "patient_id": "H1:a", "source": "H1", "test_set": "Test-50-50"}


def network() -> ProtoPNet:
    return ProtoPNet("resnet18", 2, 2, 8, 2).eval()


def maker(model: ProtoPNet, *prototypes: int) -> PairMaker:
    unique = [UniquePrototype(j, j // 2, (j,)) for j in prototypes]
    explainer = PrototypeExplainer(network())
    return PairMaker(model, explainer, unique, ExplainSettings(), 0, torch.device("cpu"))


def film() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8)


def slow_score(net: ProtoPNet, pixels: np.ndarray, prototype: int) -> tuple[float, np.ndarray]:
    """Return score and similarity grid (h, w) of one prototype on one film (3, S, S) in [0, 1]."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    image = torch.from_numpy((pixels - mean[:, None, None]) / std[:, None, None]).float()
    features = net.add_on(net.backbone(image[None]))[0].double()  # D, h, w
    distances = (features - net.prototypes[prototype].double()).square().sum(0)
    grid = torch.log((distances + 1) / (distances + 1e-4))
    return float(grid.max()), grid.numpy()


def slow_pairs(net: ProtoPNet, grey: np.ndarray, prototypes: list[int], settings: ExplainSettings, seed: int) -> dict:
    """Return {(method, prototype, draw): (score, masked score)}, one film, map and mask at a time."""
    size, image_id = grey.shape, ROW["image_id"]
    pixels = np.repeat(grey[None] / 255, 3, axis=0)
    normalised = normalise(torch.from_numpy(grey)[None])[0]
    found = {}
    for draw in range(settings.adai_draws):
        ties, noise = mask_ties(seed, image_id, draw, size), mask_noise(seed, image_id, draw, size)
        for j in prototypes:
            score, grid = slow_score(net, pixels, j)
            mode = "bicubic" if settings.upsampling == "cubic" else "bilinear"
            heat = F.interpolate(torch.from_numpy(grid)[None, None], size, mode=mode, align_corners=False)[0, 0]
            maps = {"protopnet": heat.numpy(), "prp": SlowPRP(net)(normalised, j)[0].numpy()}
            maps["random"] = random_ranking(seed, image_id, draw, size)
            for method, values in maps.items():
                least = np.lexsort((ties.ravel(), values.ravel()))[: int(settings.mask_share * values.size)]
                masked = pixels.copy()
                masked.reshape(3, -1)[:, least] = noise.reshape(3, -1)[:, least]
                found[method, j, draw] = score, slow_score(net, masked, j)[0]
    return found


@pytest.mark.parametrize(
    "settings",
    [ExplainSettings(adai_draws=2), ExplainSettings(upsampling="bilinear"), ExplainSettings(mask_share=0.8)],
    ids=["published", "bilinear", "more_masked"],
)
def test_every_pair_equals_a_slow_loop(settings: ExplainSettings) -> None:
    net = random_net(per_class=3, layers=2)
    grey = np.random.default_rng(1).integers(0, 256, (48, 48), dtype=np.uint8)
    unique = [UniquePrototype(j, j // 3, (j,)) for j in range(6)]
    pairs = PairMaker(net, PrototypeExplainer(net), unique, settings, 7, torch.device("cpu"))
    with torch.no_grad():
        rows = pairs.rows(ROW, grey, None)
        label = int(net(normalise(torch.from_numpy(grey)[None])).logits.argmax())
        slow = slow_pairs(net, grey, [3 * label, 3 * label + 1, 3 * label + 2], settings, 7)
    ours = {(r["method"], r["prototype"], r["draw"]): (r["score"], r["score_masked"]) for r in rows}
    assert ours.keys() == slow.keys()
    for key, values in slow.items():
        assert ours[key] == pytest.approx(values, rel=1e-4), key
    masked = np.array([values[1] for values in slow.values()])
    assert np.diff(np.sort(masked)).min() > 4e-4 * masked.max()  # no pair can stand for another one


def test_pairs_of_a_fitting_film_have_three_methods() -> None:
    with torch.no_grad():
        rows = maker(network(), 0, 1, 2, 3).rows(ROW, film(), None)
    assert [r["method"] for r in rows] == ["protopnet"] * 2 + ["prp"] * 2 + ["random"] * 2


def test_equal_logits_predict_the_first_class() -> None:
    model = network()
    with torch.no_grad():
        model.last_layer.weight[1] = model.last_layer.weight[0]
        rows = maker(model, 0, 1, 2, 3).rows(ROW, film(), None)
    assert {r["prototype"] for r in rows} == {0, 1}


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
