"""The job "faithfulness": AD/AI pairs of a finished trial (method.md c), image by image.

In: the trial's network and prototypes, its test set's films.  Out: `pairs.parquet`.  Every image is computed by itself
from streams of its own id, so that no number depends on chunks, order or which other images there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystudy.evaluate.faithfulness import METHODS
from raystudy.evaluate.masking import (
    least_activated,
    mask_noise,
    mask_ties,
    masked_similarities,
    random_ranking,
)
from raystudy.explanation_settings import ExplainSettings
from raystudy.protopnet.model import ProtoPNet, log_similarity
from raystudy.protopnet.normalise import normalise
from raystudy.relevance import PrototypeExplainer, UniquePrototype, scale_activation, upsample_activation
from raystudy.streams import stream

Masks = Mapping[str, Mapping[str, NDArray[np.bool_]]]  # image id -> kind -> (S, S)

PAIR_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("patient_id", pa.string()),
        ("source", pa.string()),
        ("test_set", pa.string()),
        ("prototype", pa.int32()),
        ("multiplicity", pa.int32()),
        ("method", pa.string()),
        ("draw", pa.int32()),
        ("score", pa.float32()),
        ("score_masked", pa.float32()),
    ]
)
MASK_SHARE_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("prototype", pa.int32()),
        ("multiplicity", pa.int32()),
        ("method", pa.string()),
        ("mask", pa.string()),
        ("positive_share", pa.float32()),
        ("area_share", pa.float32()),
    ]
)


def faithfulness_test_set(h1_share: int) -> str:
    """Return the test set of AD/AI: the paper's three models, extended to all mixtures."""
    if h1_share < 50:
        return "Test-100H2"
    return "Test-50-50" if h1_share == 50 else "Test-100H1"


def balanced_order(tests: pd.DataFrame, study_seed: int, task: str) -> pd.DataFrame:
    """Order one test set's rows so that every prefix holds classes and hospitals as evenly as can be.

    A seeded order inside each (source, label), taken in turns; independent of the rows' order.
    """
    rows = tests.sort_values("image_id", kind="stable").reset_index(drop=True)
    turn = np.empty(len(rows), dtype=np.int64)
    cell = rows["source"].astype(str) + "/" + rows["label"].astype(str)
    names = sorted(set(cell))
    for name in names:
        at = np.flatnonzero((cell == name).to_numpy())
        draw = stream(study_seed, "AD/AI images", task, str(rows["test_set"].iloc[0]), name)
        turn[at[draw.permutation(len(at))]] = np.arange(len(at))
    rank = cell.map({name: i for i, name in enumerate(names)}).to_numpy()
    return rows.iloc[np.lexsort((rank, turn))].reset_index(drop=True)


@dataclass(frozen=True)
class Original:
    """The network's view of one unmasked image: predicted class, scores (P,), similarity grids (P, h, w)."""

    predicted: int
    similarities: Tensor
    activation: Tensor


def look(model: ProtoPNet, image: Tensor) -> Original:
    """Run the un-canonised network on one (3, H, W) normalised image; equal logits predict the first class."""
    output = model(image.unsqueeze(0))
    return Original(int(output.logits[0].argmax()), output.similarities[0], log_similarity(output.distances[0]))


def masked_scores(
    model: ProtoPNet,
    image: Tensor,
    prototypes: Sequence[int],
    maps: Mapping[str, NDArray[Any]],
    ties: NDArray[np.float64],
    noise: NDArray[np.float32],
    share: float = 0.5,
) -> dict[str, NDArray[np.float32]]:
    """Return the K prototypes' scores on their masked images, by method.

    Parameters
    ----------
    image : (3, H, W) normalised.
    maps : by method (K, H, W), or (1, H, W) where all prototypes share one map.
    ties : (H, W).  noise : (3, H, W) in pixel space; both shared by methods and prototypes.

    Raises
    ------
    ValueError for a stack that holds neither one map nor one of each prototype, and as `masked_similarities`.
    """
    for method, stack in maps.items():
        if len(stack) not in (1, len(prototypes)):
            raise ValueError(
                f"{method} must have 1 map or one of each of {len(prototypes)} prototypes, not {len(stack)}"
            )
    masks = {method: least_activated(stack, ties, share) for method, stack in maps.items()}
    together = torch.from_numpy(np.concatenate(list(masks.values())))
    scores = masked_similarities(model, image, together, torch.from_numpy(noise)).cpu().numpy()  # sum of K, P
    found: dict[str, NDArray[np.float32]] = {}
    at = 0
    for method, mask in masks.items():
        rows = np.arange(len(prototypes)) if len(mask) == len(prototypes) else np.zeros(len(prototypes), np.int64)
        found[method] = scores[at + rows, np.asarray(prototypes)]
        at += len(mask)
    return found


@dataclass(frozen=True)
class PairMaker:
    """Everything that an image's pairs depend on beside the image."""

    model: ProtoPNet
    explainer: PrototypeExplainer
    unique: Sequence[UniquePrototype]
    settings: ExplainSettings
    study_seed: int
    device: torch.device

    def __post_init__(self) -> None:
        if any(module.training for module in self.model.modules()):
            raise ValueError("AD/AI looks at a model in eval mode: call model.eval() first")
        named = [u.prototype for u in self.unique]
        if not named or not 0 <= min(named) <= max(named) < self.explainer.n_prototypes:
            raise ValueError(f"prototypes must lie in 0..{self.explainer.n_prototypes - 1}, not {named}")

    def rows(self, row: Mapping[str, Any], grey: NDArray[np.uint8], masks: Masks | None) -> list[dict[str, object]]:
        """Return the pair rows of one image.

        Parameters
        ----------
        row : its line of the test table.  grey : (S, S).  masks : see `explain_trial`.

        Raises
        ------
        ValueError for pixels that are no grey film, or a score that is not positive.
        """
        if grey.ndim != 2 or grey.dtype != np.uint8:
            raise ValueError(f"a film must be (H, W) grey bytes, not {grey.shape} {grey.dtype}")
        settings, image_id = self.settings, str(row["image_id"])
        size = (grey.shape[0], grey.shape[1])
        image = normalise(torch.from_numpy(grey.copy()).to(self.device).unsqueeze(0))[0]  # 3, S, S
        original = look(self.model, image)
        members = [u for u in self.unique if u.label == original.predicted]
        chosen = [u.prototype for u in members]
        scores = original.similarities[chosen].cpu().numpy()
        if not (np.isfinite(scores).all() and (scores > 0).all()):
            raise ValueError(f"similarity scores must be positive and finite; they are not on {image_id}")
        index = torch.tensor([chosen], device=self.device)
        prp = self.explainer(image.unsqueeze(0), index).maps[0].cpu().numpy()
        heat = upsample_activation(original.activation[chosen], size, settings.upsampling)
        inside = _positive_shares({"protopnet": scale_activation(heat).cpu().numpy(), "prp": prp}, masks, image_id)
        ranked = np.abs if settings.ranking == "absolute" else np.asarray
        rows: list[dict[str, object]] = []
        for draw in range(settings.adai_draws):
            maps = {
                "protopnet": ranked(heat.cpu().numpy()),
                "prp": ranked(prp),
                "random": random_ranking(self.study_seed, image_id, draw, size)[None],
            }
            ties = mask_ties(self.study_seed, image_id, draw, size)
            noise = mask_noise(self.study_seed, image_id, draw, size, settings.noise)
            after = masked_scores(self.model, image, chosen, maps, ties, noise, settings.mask_share)
            rows += [
                {
                    **{name: str(row[name]) for name in ("image_id", "patient_id", "source", "test_set")},
                    "prototype": unique.prototype,
                    "multiplicity": unique.multiplicity,
                    "method": method,
                    "draw": draw,
                    "score": float(scores[k]),
                    "score_masked": float(after[method][k]),
                    **{f"inside {kind}": float(v[k]) for kind, v in inside.get(method, {}).items() if draw == 0},
                }
                for method in METHODS
                for k, unique in enumerate(members)
            ]
        return rows


def pairs_table(rows: list[dict[str, object]]) -> pa.Table:
    """Return `pairs.parquet`'s rows in their order: image, method, prototype, draw."""
    ordered = sorted(rows, key=lambda r: (r["image_id"], METHODS.index(str(r["method"])), r["prototype"], r["draw"]))
    return pa.Table.from_pylist(ordered, schema=PAIR_SCHEMA)


def mask_share_table(rows: list[dict[str, object]], masks: Masks) -> pa.Table:
    """Return `mask_share.parquet`: how much positive relevance lies inside each truth mask, beside the mask's area."""
    ids = sorted({str(row["image_id"]) for row in rows})
    areas = {i: {kind: float(mask.mean()) for kind, mask in masks.get(i, {}).items()} for i in ids}  # drawn once a film
    found = [
        {
            **{name: row[name] for name in ("image_id", "source", "prototype", "multiplicity", "method")},
            "mask": key.removeprefix("inside "),
            "positive_share": value,
            "area_share": areas[str(row["image_id"])][key.removeprefix("inside ")],
        }
        for row in rows
        for key, value in row.items()
        if key.startswith("inside ") and value is not None
    ]
    found.sort(key=lambda r: (r["image_id"], METHODS.index(str(r["method"])), r["prototype"], r["mask"]))
    return pa.Table.from_pylist(found, schema=MASK_SHARE_SCHEMA)


def positive_share(maps: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return (K,) shares of the maps' positive values that lie inside ``mask``; NaN for a map without any."""
    if mask.shape != maps.shape[1:]:
        raise ValueError(f"a mask of {mask.shape} does not fit maps of {maps.shape[1:]}")
    positive = np.maximum(maps, 0).astype(np.float64)
    total = positive.sum(axis=(1, 2))
    return np.divide(positive[:, mask].sum(axis=1), total, out=np.full(len(maps), np.nan), where=total > 0)


def _positive_shares(
    maps: Mapping[str, NDArray[Any]], masks: Masks | None, image_id: str
) -> dict[str, dict[str, NDArray[np.float64]]]:
    kinds = {k: np.asarray(m, dtype=bool) for k, m in (masks or {}).get(image_id, {}).items()}
    return {method: {kind: positive_share(stack, m) for kind, m in kinds.items()} for method, stack in maps.items()}
