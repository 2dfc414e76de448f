"""Pictures of films and relevance: the panels like Fig. 4, 5 and 6 of the paper.

In: a trial's explanation files and the films' pixels.  Out: matplotlib figures, one panel a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import safetensors.numpy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raystudy.images.array import ImageArray
from raystudy.relevance import overlay_activation, overlay_relevance, upsample_activation
from raystudy.report.data import FinishedTrial
from raystudy.results import DONE

Array = NDArray[Any]


@dataclass(frozen=True)
class Explained:
    """The files of one trial's job "prototypes"."""

    trial: FinishedTrial
    unique: pd.DataFrame
    top: pd.DataFrame
    maps: Array  # U, S, S
    activation: Array  # U, h, w
    top_maps: Array  # U, k, S, S
    class_maps: dict[int, Array]
    superposition: str  # how its maps became class maps

    @property
    def image_ids(self) -> list[str]:
        """Films that its panels need."""
        return list(dict.fromkeys([*self.unique["image_id"], *self.top["image_id"]]))


def read_explained(trial: FinishedTrial) -> Explained | None:
    """Read a trial's prototype files, or None when it is not explained yet."""
    place = trial.prototypes
    if place is None:
        return None
    maps = safetensors.numpy.load(place.read_bytes("maps.safetensors"))
    classes = safetensors.numpy.load(place.read_bytes("class_maps.safetensors"))
    return Explained(
        trial,
        place.read_table("unique.parquet").to_pandas(),
        place.read_table("top_k.parquet").to_pandas(),
        maps["prp"],
        maps["activation"],
        safetensors.numpy.load(place.read_bytes("top_k_maps.safetensors"))["prp"],
        {int(name.rsplit("_", 1)[1]): values for name, values in classes.items()},
        str(place.read_json(DONE)["superposition"]),
    )


def mixture_name(share: int) -> str:
    return f"{share}H1-{100 - share}H2"


def class_map_grid(trials: Sequence[Explained], class_names: Sequence[str], title: str) -> Figure:
    """Fig. 5: global class maps, one column a mixture, one row a class."""
    figure = Figure(figsize=(max(4.0, 1.0 * len(trials) + 0.4), 2.9), layout="constrained")
    grid = figure.subplots(2, len(trials), squeeze=False)
    for column, trial in enumerate(trials):
        for label in (0, 1):
            axes = grid[label][column]
            axes.imshow(trial.class_maps[label], cmap="seismic", vmin=-1, vmax=1, interpolation="nearest")
            _bare(axes)
            if column == 0:
                axes.set_ylabel(class_names[label], fontsize=9)
        share = int(trial.trial.spec["h1_share"])
        grid[0][column].set_title(mixture_name(share).replace("-", "-\n"), fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def top_images_panel(trial: Explained, films: ImageArray, row: int, class_name: str) -> Figure:
    """Fig. 4: the training films that one prototype fires at most, film above, PRP map below."""
    prototype = int(trial.unique["prototype"].iloc[row])
    top = trial.top[trial.top["prototype"] == prototype].sort_values("rank")
    figure = Figure(figsize=(1.9 * len(top) + 0.4, 4.4), layout="constrained")
    grid = figure.subplots(2, len(top), squeeze=False)
    for column, (_, entry) in enumerate(top.iterrows()):
        image = films.take([str(entry["image_id"])])[0]
        grid[0][column].imshow(image, cmap="gray", vmin=0, vmax=255)
        _show_relevance(grid[1][column], image, trial.top_maps[row, column])
        source = " (its source)" if entry["is_source"] else ""
        hospital = str(entry["image_id"]).split("/", 1)[0]
        grid[0][column].set_title(f"{hospital}{source}\nscore {entry['similarity']:.2f}", fontsize=8)
        _bare(grid[0][column])
        _bare(grid[1][column])
    share = int(trial.trial.spec["h1_share"])
    figure.suptitle(f"prototype {prototype} of “{class_name}”, {mixture_name(share)}", x=0.01, ha="left", fontsize=9)
    return figure


def prototype_panel(
    chosen: Sequence[tuple[Explained, int]], films: ImageArray, class_names: Sequence[str], title: str
) -> Figure:
    """Fig. 6: prototypes in columns; film, ProtoPNet heat map and PRP map in rows."""
    figure = Figure(figsize=(1.75 * len(chosen) + 0.5, 5.6), layout="constrained")
    grid = figure.subplots(3, len(chosen), squeeze=False)
    for column, (trial, row) in enumerate(chosen):
        entry = trial.unique.iloc[row]
        image = films.take([str(entry["image_id"])])[0]
        grey = torch.from_numpy(image.astype(np.float32) / 255)
        heat = upsample_activation(torch.from_numpy(np.array(trial.activation[row])), (len(image), len(image)))
        grid[0][column].imshow(image, cmap="gray", vmin=0, vmax=255)
        grid[1][column].imshow(overlay_activation(grey, heat).clamp(0, 1).numpy())
        _show_relevance(grid[2][column], image, trial.maps[row])
        hospital = str(entry["image_id"]).split("/", 1)[0]
        name = class_names[int(entry["class"])]
        share = mixture_name(int(trial.trial.spec["h1_share"]))
        grid[0][column].set_title(f"{share}\n{name}\nfilm of {hospital}", fontsize=7.5)
        for line in range(3):
            _bare(grid[line][column])
    for line, word in enumerate(("film", "ProtoPNet", "PRP")):
        grid[line][0].set_ylabel(word, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def _show_relevance(axes: Axes, image: Array, relevance: Array) -> None:
    """Show a film under its map, or say that the map is zero, as where no unit of the prototype's cell is active."""
    grey = torch.from_numpy(image.astype(np.float32) / 255)
    shown = overlay_relevance(grey, torch.from_numpy(np.array(relevance, dtype=np.float32)))
    axes.imshow(shown.clamp(0, 1).numpy())
    if not relevance.any():
        axes.text(
            0.5, 0.5, "no relevance\nreaches the film", ha="center", va="center", fontsize=7, transform=axes.transAxes
        )


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
