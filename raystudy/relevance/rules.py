"""The relevance rules as small pure functions (method.md b.2).

``a`` is a layer's input, ``R`` the relevance of its output.  Every rule shares R in proportion to contributions, so
that ``R_in = a * g`` with ``g`` linear in R; the tape carries ``g`` and multiplies by precomputed factors.  Biases take
no part.  The slow form of each rule, by Jacobian, is in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from raystudy.relevance.canonise import Pool

RESIDUAL_EPS = 1e-6
BOX_EPS = 1e-6
L2_EPS = 1e-12
NORMALISER_EPS = 2e-12
BOX_LOW = -0.485 / 0.229  # one scalar for all three channels, as published
BOX_HIGH = (1 - 0.406) / 0.225


@dataclass(frozen=True)
class RuleSet:
    """Which rule a convolution gets.

    ``gammas`` counts residual stages from the top: its first entry is for the add-on, the second for the topmost stage,
    and so on.  A missing or infinite entry means z+.
    """

    gammas: tuple[float, ...] = ()

    def gamma(self, part: str, stages: tuple[str, ...]) -> float:
        """Return γ of a part of the network ("add_on" or a stage); infinity is z+."""
        depth = 0 if part == "add_on" else len(stages) - stages.index(part)
        return self.gammas[depth] if depth < len(self.gammas) else float("inf")


RULE_SETS: Mapping[str, RuleSet] = {
    "published": RuleSet(),
    "separating": RuleSet((0.02, 0.02)),
}


def stabilise(t: Tensor, eps: float) -> Tensor:
    """Return ``t + eps sign(t) + eps [t = 0]``: pushed away from zero, never across it."""
    return t + torch.where(t < 0, -eps, eps)


def divide(share: Tensor, z: Tensor) -> Tensor:
    """Return ``share / z``, and 0 where z = 0.

    The published rule divides by 1e-12 at Z = 0.  There every contribution is 0 too, so both hand on nothing, but a
    zero cannot overflow.
    """
    return torch.div(share, z).nan_to_num_(0.0, 0.0, 0.0)


def zplus_weights(weight: Tensor) -> Tensor:
    """Alpha1-beta0 for inputs >= 0: only w+ takes part, ``Z = conv(a, w+)``, ``R_in = a c^T(R/Z; w+)``."""
    return weight.clamp(min=0)


def gamma_weights(weight: Tensor, gamma: float) -> Tensor:
    """Stack the weights of the generalised γ rule, (2 O, I, k, k): ``w + γ w+``, then ``w + γ w-``.

    An output with a positive sum of contributions uses the first half, with a negative sum the second, so that Z keeps
    the sum's sign, never cancels and relevance is conserved for outputs of either sign (Montavon et al. 2019).
    """
    return torch.cat([weight + gamma * weight.clamp(min=0), weight + gamma * weight.clamp(max=0)])


def gamma_denominators(z: Tensor) -> Tensor:
    """Return Z for ``gamma_weights``, (N, 2 O, h, w): in each half 0 where the other half is in charge."""
    up, down = z.chunk(2, dim=1)
    # w = ((w + γ w+) + (w + γ w-)) / (2 + γ): the sum of both halves has the sign of the plain contribution.
    positive = up + down >= 0
    return torch.cat([torch.where(positive, up, 0.0), torch.where(positive, 0.0, down)], dim=1)


def residual_share(t: Tensor, eps: float = RESIDUAL_EPS) -> Tensor:
    """Return ``relu(t) / stabilised t`` of a residual sum ``t = u + v``.

    Multiplied by u or v and by ``g`` of ``relu(t)`` it is the eps rule: ``R_u = u R / (t + eps sign t + eps [t = 0])``.
    Units with t <= 0 hold no relevance because their successor's input is 0.
    """
    positive = t.clamp(min=0)
    return positive / (positive + eps)


def similarity_start(patch: Tensor, prototype: Tensor, power: int = 2, eps: float = L2_EPS) -> Tensor:
    """Share a seed of 1 among the feature channels of the arg-max cell.

    Log similarity, ReLU of the distance and squared L2 are one rule: inverse power of the difference.

    Parameters
    ----------
    patch, prototype : (..., D).
    power : 2 (published code since January 2024) or 4 (before).

    Returns
    -------
    (..., D): ``g / (sum g + 2e-12)``, ``g = 1 / (|patch - prototype|^power + eps)``.
    """
    if power not in (2, 4):
        raise ValueError(f"l2_power must be 2 (current code) or 4 (before January 2024), not {power}")
    square = (patch - prototype).square()
    g = 1 / ((square if power == 2 else square.square()) + eps)
    return g / (g.sum(-1, keepdim=True) + NORMALISER_EPS)


def box_weights(weight: Tensor) -> Tensor:
    """Fold the z^B rule's transposed convolutions into one.

    ``R_in = x c^T(S; w) - L c^T(S; w+) - H c^T(S; w-)``; L and H are the same for all channels, so the box part of the
    channel sum is one transposed convolution with ``sum_i (L w+ + H w-)``.

    Parameters
    ----------
    weight : (O, I, k, k).

    Returns
    -------
    (O, I + 1, k, k): w and the summed box part.
    """
    box = BOX_LOW * weight.clamp(min=0) + BOX_HIGH * weight.clamp(max=0)
    return torch.cat([weight, box.sum(1, keepdim=True)], dim=1)


def box_combine(x: Tensor, gradients: Tensor) -> Tensor:
    """Channel-summed pixel relevance from ``box_weights``' transposed convolution.

    Parameters
    ----------
    x : (N, 1, I, H, W) images.
    gradients : (N, K, I + 1, H, W).

    Returns
    -------
    (N, K, H, W).
    """
    channels = x.shape[2]
    return (x * gradients[:, :, :channels]).sum(2) - gradients[:, :, channels]


def scatter_to_winners(outer: Tensor, winners: Tensor, size: tuple[int, int], pool: Pool) -> Tensor:
    """Max pool, winner takes all: each window's value goes to its first maximum; shared winners add.

    Parameters
    ----------
    outer : (N K, C, h, w).
    winners : (N, C, h, w) flat positions in ``size``, as ``max_pool2d(return_indices=True)`` gives them.
    pool : kernel, stride and padding.

    Returns
    -------
    (N K, C, H, W) for ``size`` = (H, W), channels-last.
    """
    pairs, channels = outer.shape[:2]
    index = winners.unsqueeze(1).expand(-1, pairs // len(winners), -1, -1, -1).reshape(outer.shape)
    index = index.contiguous(memory_format=torch.channels_last)
    like = outer.new_empty(pairs, channels, *size).to(memory_format=torch.channels_last)  # read for its size only
    square = ([pool.kernel] * 2, [pool.stride] * 2, [pool.padding] * 2, [1, 1], False)
    outer = outer.contiguous(memory_format=torch.channels_last)
    return cast(Tensor, torch.ops.aten.max_pool2d_with_indices_backward(outer, like, *square, index))
