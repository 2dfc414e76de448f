"""The study's pixels in memory: one grey uint8 array and the identifiers of its rows.

The array is shared by all trials of a node (Ray's object store hands it out read-only); everybody addresses films by
image id, never by position.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ImageArray:
    """Films by image id.

    Parameters
    ----------
    image_ids : N unique identifiers, one per row of ``pixels``.
    pixels : (N, S, S) uint8 grey, may be read-only.
    """

    image_ids: tuple[str, ...]
    pixels: NDArray[np.uint8]

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or shape[1] != shape[2]:
            raise ValueError(f"pixels must be (N, S, S) uint8, not {shape} {self.pixels.dtype}")
        if len(self.image_ids) != shape[0]:
            raise ValueError(f"{len(self.image_ids)} image ids for {shape[0]} films")
        if len(self._row_of) != shape[0]:
            raise ValueError("image ids must be unique")

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {image_id: row for row, image_id in enumerate(self.image_ids)}

    @property
    def size(self) -> int:
        """Edge length S in pixels."""
        return int(self.pixels.shape[1])

    def rows(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """Return the row of each id, (n,) int64.  Unknown ids raise ValueError and are named."""
        ids = [str(i) for i in ids]
        missing = [i for i in ids if i not in self._row_of]
        if missing:
            shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            raise ValueError(f"{len(missing)} of {len(ids)} images are not in the image array: {shown}")
        return np.array([self._row_of[i] for i in ids], dtype=np.int64)

    def take(self, ids: Iterable[str]) -> NDArray[np.uint8]:
        """Return the films of these ids in their order, a writable (n, S, S) uint8 copy."""
        return self.pixels[self.rows(ids)]
