"""Fewer maps on the way down: maps that are combinations of others need no pass of their own.

The pass back is linear.  Prototypes that are one patch have one map, and z+ makes the maps of prototypes that share a
cell more and more alike (method.md, point 5), so that K maps soon span fewer than K dimensions.  Pivoted Cholesky of
their Gram matrix picks maps that span the rest within a tolerance, and the combinations give the others at the pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def condense(relevance: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """Pick a basis among the maps of each image.

    Parameters
    ----------
    relevance : (N, K, ...) relevance of K maps at some layer.
    tolerance : largest Euclidean error of a map, relative to its norm.

    Returns
    -------
    chosen (N, r) and coefficients (N, K, r) in float64 with ``relevance = coefficients @ relevance[chosen]`` within the
    tolerance; None where all K maps are needed.
    """
    rows = relevance.flatten(2).double()
    norms = rows.square().sum(2).sqrt()  # N, K
    rows = rows / torch.where(norms == 0, 1.0, norms).unsqueeze(2)
    gram = rows @ rows.transpose(1, 2)  # N, K, K
    n, k = norms.shape
    rest = gram.diagonal(dim1=1, dim2=2).clone()  # squared error of each map
    factor = gram.new_zeros(n, k, k)
    chosen = torch.zeros(n, k, dtype=torch.int64, device=relevance.device)
    each = torch.arange(n, device=relevance.device)
    rank = 0
    while rank < k and bool((rest.amax(1) > tolerance**2).any()):
        error, pivot = rest.max(1)
        needed = error > tolerance**2  # images with fewer dimensions get empty columns
        column = gram[each, :, pivot] - (factor * factor[each, pivot].unsqueeze(1)).sum(2)
        column = column / torch.where(needed, error, 1.0).sqrt().unsqueeze(1)
        factor[:, :, rank] = torch.where(needed.unsqueeze(1), column, 0.0)
        chosen[:, rank] = pivot
        rest = rest - factor[:, :, rank].square()
        rank += 1
    if rank == k:
        return None
    rank = max(rank, 1)
    chosen, factor = chosen[:, :rank], factor[:, :, :rank]
    basis = factor.gather(1, chosen.unsqueeze(2).expand(-1, -1, rank))  # N, r, r, lower triangular
    empty = basis.diagonal(dim1=1, dim2=2) == 0
    basis = basis.tril() + torch.diag_embed(empty.double())
    coefficients = factor @ torch.inverse(basis) * norms.unsqueeze(2)
    own = norms.gather(1, chosen)
    return chosen, coefficients / torch.where(own == 0, 1.0, own).unsqueeze(1)
