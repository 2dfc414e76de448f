"""Prototypical relevance propagation: which pixels made a prototype's score (method.md b).

``prototype_relevance`` explains images in one call; ``PrototypeExplainer`` prepares a model once for many calls.  The
model is only read: no parameter, buffer, mode, flag or random generator changes.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from raystudy.protopnet.model import log_similarity
from raystudy.relevance.canonise import canonise
from raystudy.relevance.rules import L2_EPS, RULE_SETS, similarity_start
from raystudy.relevance.tape import RuleNetwork, Tape

Precision = Literal["float32", "bf16", "float64"]
MAPS_AT_ONCE = 16  # bounds the memory of the pass back: 64 x 112 x 112 values a map at the stem
IMAGES_AT_ONCE = 8

# forward; Z and the pass back; tolerance of combining maps: float32's rounding, a channel's rounding in bf16, none
_PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype, float]] = {
    "float32": (torch.float32, torch.float32, 1e-6),
    "bf16": (torch.float32, torch.bfloat16, 5e-3),
    "float64": (torch.float64, torch.float64, 0.0),
}


@dataclass(frozen=True)
class Relevance:
    """Relevance of K prototypes in each of N images.

    Attributes
    ----------
    maps : (N, K, H, W) signed, summed over the colour channels; the sum of a map is its seed (1) up to the
        stabilisers.  ``maps * scores[..., None, None]`` is the paper's seed.
    scores : (N, K) similarity scores of the prototypes.
    cells : (N, K, 2) row and column of the arg-max cell in the feature grid, first in row-major order on ties.
    features : (N, K, D) relevance of the feature channels at that cell; elsewhere it is 0.
    """

    maps: Tensor
    scores: Tensor
    cells: Tensor
    features: Tensor


@contextmanager
def _exact(device: torch.device) -> Generator[None]:
    """No graph, no autocast, no TF32; all of it restored on the way out."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        tf32 = matmul.allow_tf32
        matmul.allow_tf32 = False
        try:
            with cudnn.flags(enabled=True, benchmark=False, deterministic=cudnn.deterministic, allow_tf32=False):
                yield
        finally:
            matmul.allow_tf32 = tf32


class PrototypeExplainer:
    """A model prepared for relevance maps; later changes of the model are not seen.

    Parameters
    ----------
    model : ProtoPNet in eval mode.
    rule : "published", or "separating" (γ rule in the add-on and the topmost stage, z+ below).
    l2_power : 2, or 4 as published before 2024.
    l2_eps : floor of the channel differences (method.md b.4); 1e-8 makes the weights at a source reproducible.
    precision : "float32"; "bf16" (Z and the pass back; the forward pass stays float32, and maps of one image that are
        combinations of others within bf16's rounding are not carried separately); "float64".

    Raises
    ------
    ValueError
        The model is in training mode, is not finite, has a layer without a rule, or a setting is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: str = "published",
        l2_power: int = 2,
        *,
        l2_eps: float = L2_EPS,
        precision: Precision = "float32",
    ) -> None:
        if rule not in RULE_SETS:
            raise ValueError(f"rule must be one of {', '.join(RULE_SETS)}, not {rule!r}")
        if precision not in _PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)}, not {precision!r}")
        if l2_power not in (2, 4):
            raise ValueError(f"l2_power must be 2 (current code) or 4 (before January 2024), not {l2_power}")
        if not 0 < l2_eps < float("inf"):
            raise ValueError(f"l2_eps must be positive and finite, not {l2_eps}")
        self.l2_power, self.l2_eps = l2_power, l2_eps
        self._rule_set, self._precision = RULE_SETS[rule], precision
        self._network = canonise(model, _PRECISIONS[precision][0])

    @cached_property
    def _rules(self) -> RuleNetwork:
        """The weights of the rules, made when the first input was found good."""
        _, dtype, tolerance = _PRECISIONS[self._precision]
        with _exact(self.device):
            return RuleNetwork(self._network, self._rule_set, dtype, tolerance)

    @property
    def device(self) -> torch.device:
        """Where the prepared weights are."""
        return self._network.prototypes.device

    @property
    def n_prototypes(self) -> int:
        """P."""
        return len(self._network.prototypes)

    def same_vector(self, first: int, second: int) -> bool:
        """Whether two prototypes are the same patch, bit for bit."""
        return bool(torch.equal(self._network.prototypes[first], self._network.prototypes[second]))

    def _check(self, images: Tensor, indices: Tensor) -> None:
        channels, stride = self._network.stem.weight.shape[1], self._network.stride
        if images.dim() != 4 or images.shape[1] != channels or not len(images):
            raise ValueError(f"images must be (N, {channels}, H, W) with N >= 1, not {tuple(images.shape)}")
        if min(images.shape[2:]) < stride:
            raise ValueError(f"images must be at least {stride} pixels wide and high, not {tuple(images.shape[2:])}")
        if not images.is_floating_point():
            raise ValueError(f"images must be normalised floating-point values, not {images.dtype}")
        if indices.dim() != 2 or len(indices) != len(images) or indices.shape[1] < 1:
            raise ValueError(
                f"prototypes must be (N, K) with K >= 1 and one row for each of {len(images)} images, "
                f"not {tuple(indices.shape)}"
            )
        if indices.dtype != torch.int64:
            raise ValueError(f"prototypes must be int64 indices, not {indices.dtype}")
        if images.device != self.device:
            raise ValueError(f"images must be on the model's device {self.device}, not {images.device}")
        if not bool(torch.isfinite(images).all()):
            raise ValueError("images must be finite: a pixel is NaN or infinite")
        if not 0 <= int(indices.min()) <= int(indices.max()) < self.n_prototypes:
            raise ValueError(f"prototypes must lie in 0..{self.n_prototypes - 1}")

    def _check_cells(self, images: Tensor, cells: Tensor, k: int) -> None:
        height, width = (-(-side // self._network.stride) for side in images.shape[2:])
        if cells.shape != (len(images), k, 2) or cells.dtype != torch.int64:
            raise ValueError(f"cells must be ({len(images)}, {k}, 2) int64, not {tuple(cells.shape)} {cells.dtype}")
        row, column = cells.unbind(2)
        if bool(((row < 0) | (row >= height) | (column < 0) | (column >= width)).any()):
            raise ValueError(f"cells must lie in the {height} x {width} feature grid")

    def _scores(self, tape: Tape, indices: Tensor, cells: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (N, K), flat cells (N, K; the arg-max unless given) and patches (N, K, D) of the chosen prototypes."""
        z = tape.features.flatten(2)  # N, D, h w
        chosen = self._network.prototypes[indices]  # N, K, D
        distances = (z.square().sum(1, keepdim=True) - 2 * (chosen @ z) + chosen.square().sum(2, keepdim=True)).relu()
        cells = distances.argmin(2) if cells is None else self._flat(tape, cells)  # N, K; the first on ties
        nearest = distances.gather(2, cells.unsqueeze(2)).squeeze(2)
        scores = log_similarity(nearest)
        patches = z.gather(2, cells.unsqueeze(1).expand(-1, z.shape[1], -1)).transpose(1, 2)
        return scores, cells, patches

    def _maps(self, tape: Tape, cells: Tensor, start: Tensor) -> Tensor:
        step = max(1, MAPS_AT_ONCE // len(cells))
        parts = [
            self._rules.relevance(tape, cells[:, i : i + step], start[:, i : i + step])
            for i in range(0, cells.shape[1], step)
        ]
        return torch.cat(parts, dim=1).to(self._network.prototypes.dtype)

    def _flat(self, tape: Tape, cells: Tensor) -> Tensor:
        """Row and column (N, K, 2) to positions (N, K) in the feature grid."""
        row, column = cells.to(self.device).unbind(2)
        return row * tape.features.shape[3] + column

    def __call__(
        self,
        images: Tensor,
        prototypes: Tensor,
        *,
        seed_values: Tensor | float = 1.0,
        cells: Tensor | None = None,
    ) -> Relevance:
        """Explain ``prototypes`` (N, K) in ``images`` (N, 3, H, W).

        ``seed_values`` broadcasts against (N, K).  ``cells`` (N, K, 2) explains the similarity at these cells of the
        feature grid in place of the arg-max cells.
        """
        prototypes = prototypes.to(self.device)
        self._check(images, prototypes)
        if cells is not None:
            self._check_cells(images, cells, prototypes.shape[1])
        seeds = torch.as_tensor(seed_values, dtype=self._network.prototypes.dtype, device=self.device)
        if not bool(torch.isfinite(seeds).all()):
            raise ValueError("seed values must be finite")
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        with _exact(self.device):
            seeds = seeds.expand(prototypes.shape)
            per_group = max(1, min(IMAGES_AT_ONCE, MAPS_AT_ONCE // prototypes.shape[1]))
            for i in range(0, len(images), per_group):
                group = slice(i, i + per_group)
                tape = self._rules.record(images[group])
                given = None if cells is None else cells[group]
                scores, flat, patches = self._scores(tape, prototypes[group], given)
                chosen = self._network.prototypes[prototypes[group]]
                start = similarity_start(patches, chosen, self.l2_power, self.l2_eps) * seeds[group].unsqueeze(2)
                width = tape.features.shape[3]
                grid = torch.stack([flat // width, flat % width], dim=2)
                parts.append((self._maps(tape, flat, start), scores, grid, start))
        return Relevance(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def from_features(self, images: Tensor, cells: Tensor, features: Tensor) -> Tensor:
        """Propagate given feature relevance to the pixels.

        Parameters
        ----------
        images : (N, 3, H, W).
        cells : (N, K, 2) row and column in the feature grid.
        features : (N, K, D) relevance of the channels at that cell.

        Returns
        -------
        (N, K, H, W) maps.
        """
        width = self._network.prototypes.shape[1]
        if features.dim() != 3 or features.shape[2] != width or not bool(torch.isfinite(features).all()):
            raise ValueError(f"features must be finite and (N, K, {width}), not {tuple(features.shape)}")
        self._check(images, torch.zeros(features.shape[:2], dtype=torch.int64, device=self.device))
        self._check_cells(images, cells, features.shape[1])
        maps: list[Tensor] = []
        with _exact(self.device):
            for i in range(len(images)):
                tape = self._rules.record(images[i : i + 1])
                maps.append(self._maps(tape, self._flat(tape, cells[i : i + 1]), features[i : i + 1]))
        return torch.cat(maps)


def prototype_relevance(
    model: nn.Module,
    images: Tensor,
    prototypes: Tensor,
    rule: str = "published",
    l2_power: int = 2,
    *,
    l2_eps: float = L2_EPS,
    precision: Precision = "float32",
    seed_values: Tensor | float = 1.0,
) -> Relevance:
    """Explain prototypes in images.

    Parameters
    ----------
    model : ProtoPNet in eval mode; it is only read.
    images : (N, 3, H, W), normalised.
    prototypes : (N, K) int64, the prototypes to explain in each image.
    rule, l2_power, l2_eps, precision : see ``PrototypeExplainer``.  The model is read anew in every call.
    seed_values : relevance of the scores, broadcast against (N, K); 1 as the published code.

    Returns
    -------
    Relevance : maps (N, K, H, W), scores (N, K), cells (N, K, 2), features (N, K, D).

    Raises
    ------
    ValueError
        Before any work, with the rule that was broken (model mode and finiteness, shapes, index range, settings).
    """
    explainer = PrototypeExplainer(model, rule, l2_power, l2_eps=l2_eps, precision=precision)
    return explainer(images, prototypes, seed_values=seed_values)
