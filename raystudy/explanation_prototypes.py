"""The job "prototypes": what a finished trial's prototypes look like (method.md d).

In: the network, its prototypes' sources and the training films.  Out: each unique prototype's own map on its source,
class maps, the most activated training images with their maps, and how specific maps are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raystudy.explanation_chunks import Pieces
from raystudy.explanation_faithfulness import Masks, look, positive_share
from raystudy.explanation_settings import ExplainSettings
from raystudy.images.array import ImageArray
from raystudy.protopnet.model import ProtoPNet, log_similarity
from raystudy.protopnet.normalise import normalise
from raystudy.relevance import (
    RULE_SETS,
    PrototypeExplainer,
    UniquePrototype,
    class_map,
    measure_specificity,
    pool_specificity,
    scale_relevance,
    top_images,
)
from raystudy.streams import stream

SCAN_BATCH, SCAN_CHUNK, MAP_CHUNK = 32, 256, 4  # constants: results do not depend on the machine
# A frozen network's prototype is its source patch up to rounding (method.md d). The number is that of 128 channels:
# distances round as the sum of squares does, whose terms are the channels (seen: 1.2e-4 of 512, 2.4e-4 of 2048).
SOURCE_GAP, SOURCE_GAP_CHANNELS = 5e-5, 128

Arrays = dict[str, NDArray[Any]]

TOP_K_SCHEMA = pa.schema(
    [
        ("prototype", pa.int32()),
        ("rank", pa.int32()),
        ("image_id", pa.string()),
        ("distance", pa.float32()),
        ("similarity", pa.float32()),
        ("row", pa.int32()),
        ("col", pa.int32()),
        ("is_source", pa.bool_()),
    ]
)
UNIQUE_SCHEMA = pa.schema(
    [
        ("prototype", pa.int32()),
        ("class", pa.int8()),
        ("multiplicity", pa.int32()),
        ("image_id", pa.string()),
        ("row", pa.int32()),
        ("col", pa.int32()),
        ("score", pa.float32()),
        ("at_source_cell", pa.bool_()),
        ("distance_gap", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Sources:
    """The training patch of each of the P prototypes, as `prototypes.parquet` has it."""

    image_ids: Sequence[str]
    rows: Sequence[int]
    cols: Sequence[int]
    classes: Sequence[int]


@dataclass(frozen=True)
class PrototypeJob:
    """Everything the job works on.

    train_ids : the training films by id.  frozen : whether batch norm was frozen after the projection.
    """

    model: ProtoPNet
    explainer: PrototypeExplainer
    unique: Sequence[UniquePrototype]
    sources: Sources
    train_ids: Sequence[str]
    images: ImageArray
    settings: ExplainSettings
    study_seed: int
    device: torch.device
    frozen: bool

    @property
    def items(self) -> int:
        """How many items the job reports progress over."""
        return len(self.train_ids) + len(self.unique) + 1

    @property
    def source_gap(self) -> float:
        """How much nearer than its source cell another cell may be to a prototype, by rounding alone."""
        channels = self.model.get_parameter("prototypes").shape[1]
        return SOURCE_GAP * max(1.0, channels / SOURCE_GAP_CHANNELS)

    def films(self, ids: Sequence[str]) -> Tensor:
        """Return (n, 3, S, S) normalised films on the device."""
        return normalise(torch.from_numpy(self.images.take(ids)).to(self.device))

    def scan(self, pieces: Pieces) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return minimum distances and arg-max cells, (N, P) each, of all training films."""

        def compute(part: range) -> bytes:
            least: list[Tensor] = []
            cells: list[Tensor] = []
            for start in range(part.start, part.stop, SCAN_BATCH):
                pieces.item()
                ids = self.train_ids[start : min(start + SCAN_BATCH, part.stop)]
                flat = self.model(self.films(ids)).distances.flatten(2)  # n, P, h w
                value, cell = flat.min(dim=2)
                least.append(value)
                cells.append(cell)
            return _pack(distances=torch.cat(least), cells=torch.cat(cells).int())

        parts = [_unpack(p) for p in pieces.run("scan", len(self.train_ids), SCAN_CHUNK, compute)]
        return np.concatenate([p["distances"] for p in parts]), np.concatenate([p["cells"] for p in parts])

    def maps(self, pieces: Pieces, top: NDArray[np.int64]) -> Arrays:
        """Return, per unique prototype, its map and activation on the source and its maps on its top images.

        Parameters
        ----------
        top : (U, k) positions in ``train_ids``.
        """

        def compute(part: range) -> bytes:
            found: list[Arrays] = []
            for u in part:
                pieces.item()
                found.append(self._one(self.unique[u], [self.train_ids[int(i)] for i in top[u]]))
            return safetensors.numpy.save({k: np.stack([f[k] for f in found]) for k in found[0]})

        parts = [_unpack(p) for p in pieces.run("maps", len(self.unique), MAP_CHUNK, compute)]
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    def _one(self, unique: UniquePrototype, top: list[str]) -> Arrays:
        j = unique.prototype
        source = self.sources.image_ids[j]
        names = list(dict.fromkeys([source, *top]))
        films = self.films(names)
        seen = look(self.model, films[0])
        distances = self.model(films[:1]).distances[0, j]  # h, w
        gap = float(distances[self.sources.rows[j], self.sources.cols[j]] - distances.min())
        if self.frozen and gap > self.source_gap:
            raise ValueError(f"prototype {j} does not fire at its source cell in {source}: {gap:.2g} nearer elsewhere")
        relevance = self.explainer(films, torch.full((len(names), 1), j, device=self.device))
        maps = relevance.maps[:, 0]  # n, S, S
        own = maps[0] * (relevance.scores[0, 0] if self.settings.prp_scale == "score" else 1.0)
        shown = scale_relevance(torch.stack([maps[names.index(name)] for name in top]))
        return {
            "prp": own.cpu().numpy(),
            "activation": seen.activation[j].cpu().numpy(),
            "top": shown.half().cpu().numpy(),
            "score": seen.similarities[j].cpu().numpy(),
            "gap": np.array(gap, dtype=np.float32),
        }

    def specificity(self, pieces: Pieces) -> dict[str, dict[str, float | int | None]]:
        """Return, by rule set, how far maps depend on which prototype they explain (method.md, the fifth of five).

        Of each class its first four unique prototypes, on the sources of the first two; a class of one has no pairs.
        """
        per_class = [[u.prototype for u in self.unique if u.label == c] for c in sorted({u.label for u in self.unique})]
        groups: list[tuple[Tensor, Tensor]] = []
        for members in per_class:
            films = self.films([self.sources.image_ids[j] for j in members[:2]])
            groups.append((films, torch.tensor([members[:4]] * len(films), device=self.device)))

        def compute(_: range) -> bytes:
            found: dict[str, dict[str, float | int | None]] = {}
            for rule in RULE_SETS:
                explainer = (
                    self.explainer if rule == self.settings.rule else make_explainer(self.model, self.settings, rule)
                )
                draw = stream(self.study_seed, "specificity")
                parts = [measure_specificity(explainer, films, index, draw) for films, index in groups]
                numbers: dict[str, Any] = asdict(pool_specificity(parts))
                found[rule] = {k: None if math.isnan(v) else v for k, v in numbers.items()}
            return json.dumps(found).encode()

        return json.loads(pieces.run("specificity", 1, 1, compute)[0])

    def files(self, pieces: Pieces, masks: Masks | None) -> tuple[dict[str, bytes | pa.Table | object], dict[str, int]]:
        """Compute all; return the job's files by name and its n's."""
        distances, cells = self.scan(pieces)
        chosen = [u.prototype for u in self.unique]
        own = [self.sources.image_ids[j] for j in chosen]
        found = top_images(torch.from_numpy(distances[:, chosen]), self.train_ids, self.settings.top_k, own)
        arrays = self.maps(pieces, found.rows)
        width = arrays["activation"].shape[2]
        files: dict[str, bytes | pa.Table | object] = {
            "maps.safetensors": safetensors.numpy.save({"prp": arrays["prp"], "activation": arrays["activation"]}),
            "top_k_maps.safetensors": safetensors.numpy.save({"prp": arrays["top"]}),
            "unique.parquet": self._unique_table(arrays),
            "top_k.parquet": self._top_table(found.rows, found.is_source, distances, cells, width),
            "class_maps.safetensors": self._class_maps(arrays["prp"], arrays["score"]),
            "specificity.json": self.specificity(pieces),
        }
        if masks is not None:
            files["mask_share.parquet"] = self._mask_shares(arrays["prp"], masks)
        n = {"n_train": len(self.train_ids), "n_prototypes": len(self.sources.rows), "n_unique": len(self.unique)}
        for label in sorted({u.label for u in self.unique}):
            n[f"n_unique_class_{label}"] = sum(u.label == label for u in self.unique)
        return files, n

    def _class_maps(self, maps: NDArray[np.float32], scores: NDArray[np.float32]) -> bytes:
        members: dict[int, list[int]] = {}
        for i, unique in enumerate(self.unique):
            members.setdefault(unique.label, []).append(i)
        found = {
            f"class_{label}": class_map(
                torch.from_numpy(maps[at]),
                self.settings.superposition,
                multiplicities=[self.unique[i].multiplicity for i in at],
                scores=[float(scores[i]) for i in at],
            ).numpy()
            for label, at in sorted(members.items())
        }
        return safetensors.numpy.save(found)

    def _unique_table(self, arrays: Mapping[str, NDArray[Any]]) -> pa.Table:
        rows = [
            {
                "prototype": u.prototype,
                "class": u.label,
                "multiplicity": u.multiplicity,
                "image_id": self.sources.image_ids[u.prototype],
                "row": self.sources.rows[u.prototype],
                "col": self.sources.cols[u.prototype],
                "score": float(arrays["score"][i]),
                "at_source_cell": bool(arrays["gap"][i] <= self.source_gap),
                "distance_gap": float(arrays["gap"][i]),
            }
            for i, u in enumerate(self.unique)
        ]
        return pa.Table.from_pylist(rows, schema=UNIQUE_SCHEMA)

    def _top_table(
        self,
        top: NDArray[np.int64],
        is_source: NDArray[np.bool_],
        distances: NDArray[np.float32],
        cells: NDArray[np.int32],
        width: int,
    ) -> pa.Table:
        rows: list[dict[str, object]] = []
        similarities = log_similarity(torch.from_numpy(distances))  # N, P
        for i, unique in enumerate(self.unique):
            j = unique.prototype
            for rank, at in enumerate(top[i]):
                cell = int(cells[at, j])
                rows.append(
                    {
                        "prototype": j,
                        "rank": rank + 1,
                        "image_id": self.train_ids[at],
                        "distance": float(distances[at, j]),
                        "similarity": float(similarities[at, j]),
                        "row": cell // width,
                        "col": cell % width,
                        "is_source": bool(is_source[i, rank]),
                    }
                )
        return pa.Table.from_pylist(rows, schema=TOP_K_SCHEMA)

    def _mask_shares(self, maps: NDArray[np.float32], masks: Masks) -> pa.Table:
        rows = [
            {
                "prototype": u.prototype,
                "class": u.label,
                "multiplicity": u.multiplicity,
                "image_id": self.sources.image_ids[u.prototype],
                "mask": kind,
                "positive_share": float(positive_share(maps[i : i + 1], np.asarray(mask, dtype=bool))[0]),
                "area_share": float(mask.mean()),
            }
            for i, u in enumerate(self.unique)
            for kind, mask in sorted(masks.get(self.sources.image_ids[u.prototype], {}).items())
        ]
        kinds = [
            ("prototype", pa.int32()),
            ("class", pa.int8()),
            ("multiplicity", pa.int32()),
            ("image_id", pa.string()),
        ]
        kinds += [("mask", pa.string()), ("positive_share", pa.float32()), ("area_share", pa.float32())]
        return pa.Table.from_pylist(rows, schema=pa.schema(kinds))


def make_explainer(model: nn.Module, settings: ExplainSettings, rule: str | None = None) -> PrototypeExplainer:
    """Prepare a model for maps as the settings say; ``rule`` in place of theirs."""
    return PrototypeExplainer(
        model, rule or settings.rule, settings.l2_power, l2_eps=settings.l2_eps, precision=settings.precision
    )


def _pack(**tensors: Tensor) -> bytes:
    return safetensors.numpy.save({k: np.ascontiguousarray(v.cpu().numpy()) for k, v in tensors.items()})


def _unpack(data: bytes) -> Arrays:
    return safetensors.numpy.load(data)
