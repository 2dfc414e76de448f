"""xH1-yH2: how many films of each class come from each hospital, and which ones.

One seeded order per (task, source, class, split); each mixture takes a prefix of it, so neighbouring mixtures share
films.  Of N films per class, n(positive, H1) = floor(x·N/100 + ½), the rest comes from H2, and the negatives are
mirrored, so that both classes always hold N films (paper 2.1.1; for 10 % of 1099 the paper does not say how it rounds).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pandas as pd

TEST_SETS: dict[str, int] = {"Test-100H1": 100, "Test-100H2": 0, "Test-50-50": 50}  # name -> H1's share of positives
Rounding = Literal["half_up", "floor_each_cell"]


def cell_sizes(h1_share: int, n: int, rounding: Rounding = "half_up") -> dict[tuple[int, int], int]:
    """Return the films of each (source 0 or 1, label 0 or 1) when a class holds n films.

    Examples
    --------
    >>> cell_sizes(10, 1099)
    {(0, 1): 110, (1, 1): 989, (0, 0): 989, (1, 0): 110}
    """
    if not 0 <= h1_share <= 100:
        raise ValueError(f"a mixture is a share of 0..100 %, got {h1_share}")
    if rounding == "floor_each_cell":
        first, second = h1_share * n // 100, (100 - h1_share) * n // 100
    else:
        first = (2 * h1_share * n + 100) // 200
        second = n - first
    return {(0, 1): first, (1, 1): second, (0, 0): second, (1, 0): first}


def largest_cells(h1_shares: Iterable[int], n: int, rounding: Rounding) -> dict[tuple[int, int], int]:
    """Return what each (source, label) must hold so that every mixture can be drawn."""
    sizes = [cell_sizes(share, n, rounding) for share in h1_shares]
    return {cell: max(size[cell] for size in sizes) for cell in sizes[0]}


def keep_per_patient(order: np.ndarray, patients: np.ndarray, limit: int) -> np.ndarray:
    """Return the order without a patient's films beyond the first ``limit``."""
    return order[pd.Series(patients[order]).groupby(patients[order]).cumcount().to_numpy() < limit]


def matched_orders(orders: Sequence[np.ndarray], views: np.ndarray) -> list[np.ndarray]:
    """Re-arrange orders so that prefixes of one length hold the same films of each view in every order.

    The shared pattern of views is proportional to what the poorest order holds of each view; films beyond it are left
    out.  Within a view each order keeps its own sequence.
    """
    kinds = sorted({str(v) for order in orders for v in np.unique(views[order])})
    held = [[order[views[order] == kind] for kind in kinds] for order in orders]
    common = np.array([min(len(h[k]) for h in held) for k in range(len(kinds))], dtype=np.int64)
    # Film j of a view with m films stands at (j + ½)/m of the pattern: the views are spread evenly.
    places = np.concatenate([(np.arange(m) + 0.5) / m for m in common if m] or [np.zeros(0)])
    kind_of = np.repeat(np.arange(len(kinds)), common)
    pattern = kind_of[np.lexsort((kind_of, places))]
    matched: list[np.ndarray] = []
    for h in held:
        taken = np.empty(len(pattern), dtype=np.int64)
        for k in range(len(kinds)):
            taken[pattern == k] = h[k][: common[k]]
        matched.append(taken)
    return matched
