"""`raystudy explain`: why a finished trial says what it says about single films, one picture each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raystudy.errors import StudyError
from raystudy.explanation_settings import ExplainSettings
from raystudy.images.decode import Unreadable, decode_film
from raystudy.images.settings import ImageSettings
from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.model import log_similarity
from raystudy.protopnet.normalise import normalise
from raystudy.relevance import overlay_activation, overlay_relevance, prototype_relevance, upsample_activation
from raystudy.report.figures import png
from raystudy.results import PROTOTYPES, sealed
from raystudy.study import Study
from raystudy.trial import load_model
from raystudy.trial_files import read_spec
from raystudy.trial_spec import TrialSpec

SHOWN = 3  # prototypes of the predicted class with different sources


def explain_images(
    study: Study, trial: str, images: list[str], settings: ExplainSettings, image_settings: ImageSettings
) -> Iterator[str]:
    """Write a picture for every film and yield where it lies.

    Parameters
    ----------
    trial : id of a finished trial, or a beginning that only one trial has.
    images : image ids of the study, or PNG/JPEG files.

    Raises
    ------
    StudyError : no such trial, or a film that is neither in the study nor readable.
    """
    trial_id = _find_trial(study, trial)
    directory = study.trial(trial_id)
    spec = read_spec(directory)
    model = load_model(directory)
    sources = sealed(directory).read_table(PROTOTYPES).to_pandas()
    resize = spec.axes.get("images.resize", image_settings.resize)
    image_settings = replace(image_settings, size=spec.image_size, resize=resize)
    written: set[str] = set()
    for name in images:
        film = _film(study, name, spec, image_settings)
        figure = _panel(model, film, spec.class_names, sources["image_id"].astype(str).tolist(), settings, name)
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        path = f"explain/images/{safe}.png"
        if path in written:  # a/b.png and a_b.png
            path = f"explain/images/{safe}-{len(written)}.png"
        written.add(path)
        directory.write_bytes(path, png(figure))
        yield directory.address(path)


def _find_trial(study: Study, trial: str) -> str:
    files = study.files()
    matches = [t for t in study.trial_ids() if t == trial or t.startswith(trial)]
    exact = [t for t in matches if t == trial] or matches
    if len(exact) != 1:
        what = "no trial" if not exact else f"{len(exact)} trials"
        raise StudyError(
            f"{what} of this study begin with {trial!r}",
            where=study.storage.uri,
            remedy="`raystudy status EXPERIMENT` lists the trials",
        )
    if "model.safetensors" not in files.get(exact[0], set()) or "result.json" not in files[exact[0]]:
        raise StudyError(f"{exact[0]} is not finished", where=study.storage.uri, remedy="`raystudy run EXPERIMENT`")
    return exact[0]


def _film(study: Study, name: str, spec: TrialSpec, settings: ImageSettings) -> NDArray[np.uint8]:
    file = Path(name)
    try:
        if file.is_file():
            return decode_film(file.read_bytes(), name, settings)
    except (Unreadable, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StudyError(f"the film cannot be read: {reason}", where=name, remedy="give a PNG or JPEG film") from None
    try:
        return study.films([name], spec.image_size, spec.axes).pixels[0]
    except (KeyError, FileNotFoundError, StudyError):
        raise StudyError(
            f"{name!r} is neither an image id of this study nor a file",
            where=study.storage.uri,
            remedy="image ids stand in cohorts/*.parquet, for example H1/00000001_000.png",
        ) from None


def _panel(
    model: ProtoPNet,
    film: NDArray[np.uint8],
    class_names: tuple[str, str],
    source_ids: list[str],
    settings: ExplainSettings,
    name: str,
) -> Figure:
    images = normalise(torch.from_numpy(np.array(film))[None])  # 1, 3, S, S
    with torch.no_grad():
        output = model(images)
    predicted = int(output.logits[0].argmax())
    share = float(output.logits[0].softmax(0)[predicted])
    own = (model.prototype_class == predicted).nonzero().flatten()
    ranked = own[output.similarities[0, own].argsort(descending=True, stable=True)].numpy()
    chosen = list({source_ids[int(j)]: int(j) for j in reversed(ranked)}.values())[::-1][:SHOWN]
    relevance = prototype_relevance(
        model, images, torch.tensor([chosen]), settings.rule, settings.l2_power, l2_eps=settings.l2_eps
    )
    grey = torch.from_numpy(film.astype(np.float32) / 255)
    figure = Figure(figsize=(2.4 * (len(chosen) + 1), 5.4), layout="constrained")
    grid = figure.subplots(2, len(chosen) + 1, squeeze=False)
    grid[0][0].imshow(film, cmap="gray", vmin=0, vmax=255)
    grid[0][0].set_title(f"{class_names[predicted]}\n{100 * share:.0f} % (softmax)", fontsize=9)
    for axes in grid.flat:
        axes.set_axis_off()
    for column, j in enumerate(chosen, start=1):
        heat = upsample_activation(log_similarity(output.distances[0, j]), film.shape, settings.upsampling)
        grid[0][column].imshow(overlay_activation(grey, heat).clamp(0, 1).numpy())
        grid[1][column].imshow(overlay_relevance(grey, relevance.maps[0, column - 1]).clamp(0, 1).numpy())
        score = float(output.similarities[0, j])
        grid[0][column].set_title(f"prototype {j}, score {score:.2f}\nfrom {source_ids[j]}", fontsize=7)
    grid[1][0].text(0.5, 0.5, "above: ProtoPNet\nbelow: PRP", ha="center", va="center", fontsize=9)
    figure.suptitle(name, x=0.01, ha="left", fontsize=9)
    return figure
