"""The synthetic hospitals: settings in; canonical rows, PNG originals on the storage URI and planted truth out.

A patient's anatomy and finding come from the stream of the patient, a film's pose, signs, marks and noise from the
stream of the film, so that a film depends on its settings, source and id alone: any subset can be rendered, in any
order, by any number of processes.  Films lie in ``<storage>/_phantoms/<key>/``, where the key stands for the settings;
each appears whole or not at all, so a second run writes only what is missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from raystudy.cohorts.phantom_film import Anatomy, Film, Marks, Pose, Sign, render
from raystudy.cohorts.phantom_settings import NO_FINDING, SIGNS, PhantomSettings
from raystudy.errors import StudyError
from raystudy.interruption import ctrl_c_kept
from raystudy.storage import Storage
from raystudy.streams import stream

RENDER_VERSION = 3  # raised when a change of the drawing changes pixels
CHUNK = 64  # films a task
FEW = 256  # fewer films than this are not worth a second process
OTHERS = tuple(s for s in SIGNS if s != "Pneumonia")


@dataclass(frozen=True)
class Masks:
    """Ground truth of one film, (size, size) bool each."""

    sign: NDArray[np.bool_]
    tag: NDArray[np.bool_]


def phantom_table(settings: PhantomSettings, source: str, storage: Storage) -> pd.DataFrame:
    """Return the hospital's canonical image table; nothing is rendered.

    Parameters
    ----------
    source : the YAML key; part of every id and of every stream.
    storage : the storage root of the studies; originals are addressed below it whether or not they are written yet.
    """
    home = films_storage(settings, source, storage)
    rows: list[dict[str, object]] = []
    for number in range(settings.patients):
        patient = _patient(settings, source, number)
        for film in range(patient.films):
            name = film_name(number, film)
            finding = _finding(settings, source, number, film)
            rows.append(
                {
                    "image_id": f"{source}/{name}",
                    "source": source,
                    "patient_id": f"{source}:p{number:05d}",
                    "uri": home.address(name),
                    "view": "PA",
                    "findings": [finding],
                    "uncertain": [],
                    "split": "",
                }
            )
    return pd.DataFrame(rows)


def films_storage(settings: PhantomSettings, source: str, storage: Storage) -> Storage:
    """Return the folder of the hospital's originals."""
    text = json.dumps([RENDER_VERSION, source, asdict(settings)], sort_keys=True)
    return storage.child("_phantoms", f"{source}-{hashlib.sha256(text.encode()).hexdigest()[:12]}")


def film_name(patient: int, film: int) -> str:
    return f"p{patient:05d}_{film:02d}.png"


def missing_films(settings: PhantomSettings, source: str, storage: Storage, image_ids: Iterable[str]) -> list[str]:
    """Return those image ids whose original is not written yet, in the given order."""
    there = set(films_storage(settings, source, storage).list())
    return [i for i in image_ids if i.removeprefix(f"{source}/") not in there]


def write_films(
    settings: PhantomSettings,
    source: str,
    storage: Storage,
    image_ids: Sequence[str] | None = None,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the originals that are missing and return how many were written.

    Parameters
    ----------
    image_ids : the films that are wanted; None for the whole hospital.
    workers : processes; films do not depend on it.
    progress : called with (written, to write).
    """
    wanted = list(phantom_table(settings, source, storage)["image_id"]) if image_ids is None else list(image_ids)
    todo = missing_films(settings, source, storage, wanted)
    chunks = [todo[i : i + CHUNK] for i in range(0, len(todo), CHUNK)]
    done = 0
    if workers <= 1 or len(todo) < FEW:
        for chunk in chunks:
            done += write_chunk(settings, source, storage, chunk)
            if progress:
                progress(done, len(todo))
        return done
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            with _ctrl_c_for_this_process():  # workers start as tasks are submitted
                tasks = [pool.submit(write_chunk, settings, source, storage, chunk) for chunk in chunks]
            for task in as_completed(tasks):
                done += task.result()
                if progress:
                    progress(done, len(todo))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return done


@contextmanager
def _ctrl_c_for_this_process() -> Iterator[None]:
    """Start processes that never see Ctrl-C: a terminal sends it to all, and only this one is to answer it.

    They inherit this thread's mask.  Here another thread may still take the signal (Ray has many), and a process must
    not be left half started, so that it is answered at the end.
    """
    with ctrl_c_kept(at_once=False):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write_chunk(settings: PhantomSettings, source: str, storage: Storage, image_ids: Sequence[str]) -> int:
    """Render and write films, whether or not they are there; one unit of parallel work."""
    home = films_storage(settings, source, storage)
    for image_id in image_ids:
        sink = io.BytesIO()
        film = draw_film(settings, source, image_id)
        Image.fromarray(film.pixels).save(sink, format="PNG", compress_level=1)
        home.write_bytes(image_id.removeprefix(f"{source}/"), sink.getvalue())
    return len(image_ids)


def masks(settings: PhantomSettings, source: str, image_id: str) -> Masks:
    """Return where the film's disease signs and its text lie; the film need not be written."""
    film = draw_film(settings, source, image_id)
    return Masks(film.sign, film.tag)


def draw_film(settings: PhantomSettings, source: str, image_id: str) -> Film:
    """Render one film from its id.

    Raises
    ------
    StudyError : an id that this hospital does not have.
    """
    number, film = _parse(settings, source, image_id)
    patient = _patient(settings, source, number)
    finding = _finding(settings, source, number, film)
    rng = stream(settings.seed, "phantom", "film", source, number, film)
    pose = Pose(
        shift=(float(rng.normal(0, 0.025)), float(rng.normal(0, 0.025))),
        turn=float(rng.normal(0, 0.02)),
        zoom=float(rng.normal(0.98, 0.025)),
        breath=float(rng.normal(0, 0.03)),
        exposure=float(np.clip(rng.normal(1, 0.03), 0.9, 1.1)),
    )
    signs = _signs(finding, settings.sign_strength, rng)
    noise_seed = int(rng.integers(2**63))
    marks = _marks(settings, finding, rng)
    return render(settings.size, patient.anatomy, pose, signs, marks, noise_seed)


def _parse(settings: PhantomSettings, source: str, image_id: str) -> tuple[int, int]:
    name = image_id.removeprefix(f"{source}/")
    number, _, film = name.removeprefix("p").removesuffix(".png").partition("_")
    if not (number.isdecimal() and film.isdecimal() and name == film_name(int(number), int(film))):
        raise StudyError(
            f"{image_id!r} is not a film of a phantom hospital", remedy=f"for example {source}/p00000_00.png"
        )
    at = int(number), int(film)
    if at[0] >= settings.patients or at[1] >= _patient(settings, source, at[0]).films:
        raise StudyError(f"the phantom hospital {source} has no film {image_id!r}", remedy="name one of its table")
    return at


@dataclass(frozen=True)
class _Patient:
    films: int
    finding: str
    anatomy: Anatomy


@lru_cache(maxsize=4096)
def _patient(settings: PhantomSettings, source: str, number: int) -> _Patient:
    rng = stream(settings.seed, "phantom", "patient", source, number)
    films = int(rng.integers(1, settings.films_per_patient + 1))
    kind = rng.random()
    other = OTHERS[int(rng.integers(len(OTHERS)))]
    sick = "Pneumonia" if kind < settings.pneumonia_share else other
    healthy = kind >= 1 - settings.healthy_share
    anatomy = Anatomy(
        width=float(np.clip(rng.normal(0.98, 0.045), 0.88, 1.08)),
        apex=float(rng.normal(-0.80, 0.025)),
        dome=float(rng.normal(0.50, 0.045)),
        heart=float(np.clip(rng.normal(0.98, 0.05), 0.86, 1.10)),
        heart_tilt=float(rng.normal(0.5, 0.08)),
        knob=float(np.clip(rng.normal(0.10, 0.02), 0.06, 0.15)),
        rib_start=float(rng.uniform(0, 6)),
        rib_gap=float(np.clip(rng.normal(0.165, 0.01), 0.14, 0.19)),
        rib_slope=float(rng.normal(0.20, 0.04)),
        bone=float(np.clip(rng.normal(1, 0.12), 0.7, 1.3)),
        fat=float(np.clip(rng.normal(0.05, 0.06), -0.05, 0.25)),
        breast=float(max(0.0, rng.normal(0.5, 0.3))) if rng.random() < 0.5 else 0.0,
        gas=float(rng.uniform(0, 0.6)),
        vessels=_vessels(rng),
        texture_seed=int(rng.integers(2**63)),
    )
    return _Patient(films, NO_FINDING if healthy else sick, anatomy)


def _finding(settings: PhantomSettings, source: str, number: int, film: int) -> str:
    """Return what a film is labelled with: the patient's finding, on every film."""
    del film
    return _patient(settings, source, number).finding


def _vessels(rng: np.random.Generator) -> NDArray[np.float32]:
    """Branching strokes from both hila into the lungs, thinner towards the edge; (V, 5)."""
    strokes: list[tuple[float, float, float, float, float]] = []
    for side in (-1.0, 1.0):
        for angle in np.linspace(-1.35, 1.35, 11) + rng.normal(0, 0.10, 11):
            ends = [(0.17, 0.02 + 0.10 * angle, float(angle), 0.022)]
            for _ in range(3):
                nearer = ends
                ends = []
                for x, y, course, calibre in nearer:
                    for _ in range(1 if calibre > 0.02 or rng.random() < 0.25 else 2):
                        bent = course + rng.normal(0, 0.28)
                        length = rng.uniform(0.09, 0.17)
                        to = (x + length * np.cos(bent), y + length * np.sin(bent))
                        strokes.append((side * x, y, side * to[0], to[1], calibre))
                        ends.append((to[0], to[1], bent, calibre * 0.62))
    return np.asarray(strokes, np.float32)


def _signs(finding: str, strength: float, rng: np.random.Generator) -> tuple[Sign, ...]:
    # The same numbers are drawn whatever the finding: films of a patient differ by the sign alone.
    side = 1.0 if rng.random() < 0.5 else -1.0
    u = rng.random(16)
    seed = int(rng.integers(2**63))
    if finding == NO_FINDING or strength == 0:
        return ()
    if finding == "Cardiomegaly":
        return (Sign(finding, ((0.0, 0.0, 0.0, 0.0, strength * (0.42 + 0.16 * u[0])),)),)
    if finding == "Effusion":
        return (Sign(finding, ((side * 0.6, -0.10 - 0.16 * u[0], 0.0, 0.0, strength * (0.85 + 0.3 * u[1])),)),)
    if finding == "Consolidation":
        return (Sign(finding, ((side * 0.4, -0.22 + 0.10 * u[0], 0.0, 0.0, strength * (0.8 + 0.4 * u[1])),)),)
    if finding == "Nodule":
        count = 2 + int(u[0] * 3)
        places = [
            (
                side * (1 if i < 2 else -1) * (0.30 + 0.32 * u[1 + 3 * i]),
                -0.45 + 0.75 * u[2 + 3 * i],
                *(2 * (0.070 + 0.04 * u[3 + 3 * i],)),
                strength,
            )
            for i in range(count)
        ]
        return (Sign(finding, tuple(places)),)
    places = [(side * (0.36 + 0.18 * u[0]), -0.02 + 0.30 * u[1], 0.17 + 0.08 * u[2], 0.16 + 0.09 * u[3], strength)]
    if u[4] < 0.4:  # both lungs
        places.append(
            (-side * (0.36 + 0.18 * u[5]), -0.05 + 0.30 * u[6], 0.13 + 0.07 * u[7], 0.12 + 0.07 * u[8], strength)
        )
    return (Sign(finding, tuple(places), seed),)


def _marks(settings: PhantomSettings, finding: str, rng: np.random.Generator) -> Marks:
    with_finding = 0.5 if finding == settings.tag_finding else -0.5
    tagged = rng.random() < settings.tag_share + with_finding * settings.tag_association
    north = settings.look == "north"
    text, corner, letter, ring = _north_tag(rng) if north else _south_tag(rng)
    jitter = rng.normal(0, 0.008, 2)
    border = rng.uniform(0.4, 1.0, 4) * settings.collimation
    shape = np.array([0.020, 0.006, 0.020, 0.006]) if north else np.array([0.006, 0.018, 0.006, 0.022])
    tilt = float(rng.normal(0, 0.004 if north else 0.012)) * settings.collimation
    gamma, contrast, black = (1.05, 1.02, 0.0) if north else (0.96, 0.98, 0.01)
    drift = rng.normal(0, 0.02, 2)
    return Marks(
        text=text if tagged else (),
        corner=(float(corner[0] + jitter[0]), float(corner[1] + jitter[1])),
        letter=letter,
        ring=ring,
        visibility=settings.tag_visibility * float(rng.uniform(0.85, 1.0)),
        borders=tuple((border * shape).tolist()),  # pyright: ignore[reportArgumentType]
        border_tilt=tilt,
        gamma=float(np.exp(settings.gain * np.log(gamma) + drift[0])),
        contrast=1 + settings.gain * (contrast - 1) + float(drift[1]),
        black=settings.gain * black,
        noise=settings.noise,
    )


Tag = tuple[tuple[str, ...], tuple[float, float], float, bool]


def _north_tag(rng: np.random.Generator) -> Tag:
    """A lead marker in its holder, or a stamp, on the right edge of the image."""
    kind, place = rng.random(), rng.random()
    corner = (0.945, 0.06) if place < 0.7 else (0.975, 0.30)
    if kind < 0.6:
        return ("L",), corner, 0.105, True
    if kind < 0.85:
        return ("PORTABLE", "L"), corner, 0.070, False
    return ("L", "ERECT"), corner, 0.085, False


def _south_tag(rng: np.random.Generator) -> Tag:
    """View and time of day, typed by the machine, on the left edge of the image."""
    kind, place = rng.random(), rng.random()
    clock = f"{int(rng.integers(24)):02d}:{int(rng.integers(60)):02d}"
    corner = (0.035, 0.07) if place < 0.7 else (0.035, 0.90)
    if kind < 0.6:
        return ("AP", clock), corner, 0.090, False
    if kind < 0.85:
        return ("SUPINE", clock), corner, 0.080, False
    return (f"R  {clock}",), corner, 0.090, False
