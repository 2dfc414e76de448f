"""Planted truth: the masks of tag and sign of a study's phantom films, drawn anew when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from raystudy.cohorts.phantom_settings import PhantomSettings
from raystudy.study import Study

COVERED = 64  # of 255: a shrunken pixel belongs to the mask when a quarter of it does

FilmMasks = dict[str, NDArray[np.bool_]]


class PhantomMasks(Mapping[str, FilmMasks]):
    """Masks by image id, for the films of the phantom sources.

    Parameters
    ----------
    hospitals : settings by source.
    size : pixels a side of the films that the network sees.
    """

    def __init__(self, hospitals: dict[str, PhantomSettings], size: int) -> None:
        self._hospitals, self._size = hospitals, size

    def __getitem__(self, image_id: str) -> FilmMasks:
        from raystudy.cohorts.phantom import masks  # scipy's filters: only where there is something to draw

        source = image_id.split("/", 1)[0]
        truth = masks(self._hospitals[source], source, image_id)
        return {"sign": self._shrunk(truth.sign), "tag": self._shrunk(truth.tag)}

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, str) and image_id.split("/", 1)[0] in self._hospitals

    def __iter__(self) -> Iterator[str]:
        return iter(())  # films are known by id only

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True

    def _shrunk(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        grey = Image.fromarray(mask.astype(np.uint8) * 255)
        return np.asarray(grey.resize((self._size, self._size), Image.Resampling.BOX)) >= COVERED


def planted_truth(study: Study, size: int) -> PhantomMasks | None:
    """Return the masks of a study whose sources are all phantoms, or None."""
    sources = yaml.safe_load(study.storage.read_bytes("experiment.yaml"))["sources"]
    if any(source["kind"] != "phantom" for source in sources.values()):
        return None
    return PhantomMasks({name: PhantomSettings(**source["settings"]) for name, source in sources.items()}, size)
