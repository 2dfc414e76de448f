"""A trial's films: who is trained on, validated on and tested on, and their pixels on the trial's device.

In flow a cohort's rows and the shared pixel array; out flow normalised batches.  Rows are put into the order of their
image ids, so that no result depends on the order in which a table arrived.  There are no loader workers: films are
grey bytes in memory and are normalised batch by batch (method.md a.1).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from raystudy.images.array import ImageArray
from raystudy.protopnet.normalise import normalise

COLUMNS = ("image_id", "patient_id", "source", "label")


class Films:
    """Rows of one role with their pixels.

    Parameters
    ----------
    rows : one row per film, columns image_id, patient_id, source, label.
    images : the study's pixels; on a GPU these rows are copied to it once, on a CPU they stay where they are, shared.

    Attributes
    ----------
    rows : the same rows by image_id.
    labels : (N,) int64 on the device.
    """

    def __init__(self, rows: pd.DataFrame, images: ImageArray, device: torch.device) -> None:
        self.rows = rows.sort_values("image_id", kind="stable").reset_index(drop=True)
        self.ids: list[str] = self.rows["image_id"].astype(str).tolist()
        self.labels = torch.tensor(self.rows["label"].to_numpy(np.int64), device=device)
        self._device = device
        self._places = images.rows(self.ids)
        self._shared = images.pixels
        self._resident = None if device.type == "cpu" else torch.from_numpy(images.take(self.ids)).to(device)

    def __len__(self) -> int:
        return len(self.ids)

    def grey(self, index: Tensor) -> Tensor:
        """Return films by position, (n, S, S) uint8 on the device; ``index`` lies on the device."""
        if self._resident is not None:
            return self._resident[index]
        return torch.from_numpy(self._shared[self._places[index.numpy()]])

    def batch(self, index: Tensor) -> Tensor:
        """Return films by position, normalised: (n, 3, S, S) float32, channels last in memory."""
        return normalise(self.grey(index)).contiguous(memory_format=torch.channels_last)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield all films in order, in chunks whose boundaries depend on ``size`` alone."""
        for start in range(0, len(self), size):
            yield self.batch(torch.arange(start, min(start + size, len(self)), device=self._device))


def check_films(cohort: pd.DataFrame, tests: pd.DataFrame, images: ImageArray, image_size: int) -> None:
    """Refuse rows and pixels that a trial cannot be made of.

    Raises
    ------
    ValueError : a column, film, class or role that is missing, a film twice in one role, a wrong label or image size.
    """
    if images.size != image_size:
        raise ValueError(f"the spec asks for images of {image_size} px, the image array holds {images.size} px")
    for name, frame, columns in (("cohort", cohort, (*COLUMNS, "role")), ("tests", tests, (*COLUMNS, "test_set"))):
        missing = [c for c in columns if c not in frame.columns]
        if missing:
            raise ValueError(f"the {name} table has no column {', '.join(missing)}")
        if not set(frame["label"].unique()) <= {0, 1}:
            raise ValueError(f"labels of the {name} table must be 0 or 1")
        twice = frame[frame.duplicated(["image_id"] if name == "cohort" else ["image_id", "test_set"])]
        if len(twice):
            raise ValueError(f"{len(twice)} images appear twice in the {name} table: {twice['image_id'].iloc[0]}, …")
        images.rows(frame["image_id"])
    if set(cohort["role"].unique()) - {"train", "val"}:
        raise ValueError("roles of the cohort table must be train or val")
    for role in ("train", "val"):
        labels = cohort.loc[cohort["role"] == role, "label"]
        for label in (0, 1):
            if not (labels == label).any():
                raise ValueError(f"class {label} has no image with role {role}: a prototype needs images of its class")
