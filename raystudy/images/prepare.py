"""Original films to the image store, with Ray Data (the one module of this room that imports Ray).

The driver lists the originals, finds by fingerprint which of them the store already holds, and cuts the rest into
blocks.  Each Ray Data task takes a few blocks: a small pool of threads fetches ahead while the task decodes, and every
finished block is written at once.  No pixel travels through Ray.  A prepare that was killed goes on with the blocks
that are there; each worker repeats at most the block it was in.

Ray itself repeats nothing here: it would start a task anew without end whose film kills every worker (a crash of the
decoder, or more memory than there is).  Tasks whose worker died are run again, as their machine may have gone away;
what then still fails is decoded film by film, and a film that ends its worker each time is quarantined.
"""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import pyarrow as pa
import ray
import ray.data
from ray.exceptions import OutOfMemoryError, RayError, WorkerCrashedError

from raystudy.errors import StudyError
from raystudy.images.decode import Unreadable, decode_film
from raystudy.images.originals import LARGEST_FILE, fingerprints, locate, read_original
from raystudy.images.settings import ImageSettings
from raystudy.images.store import (
    CATALOG,
    FOLDER,
    Film,
    pixels_key,
    read_catalog,
    study_key,
    write_block,
    write_catalog,
)
from raystudy.storage import Storage

BLOCK_FILMS = 64  # films of one store block: what a kill repeats per worker
TASK_BLOCKS = 2  # store blocks of one Ray task
FETCHERS = 4  # threads that fetch ahead in one task
AHEAD = 8  # films fetched ahead in one task; bounds its memory
TRIES = 3  # of what a worker died on
MOST_DEATHS = 20  # films that may end their worker each time; with more it is not the films
DIED = "its decoder died"
ANSWER = pa.schema(
    [
        ("first", pa.string()),
        ("films", pa.int64()),
        ("catalog", pa.list_(pa.struct(list(CATALOG)))),
        ("refusal", pa.list_(pa.string())),
    ]
)

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Prepared:
    """What prepare did.

    Parameters
    ----------
    key : names the study's films for ``load_pixels``.
    quarantine : image_id, uri, reason of every film that cannot be used; the caller fails or drops them.
    n_new, n_reused : films decoded now, and found in the store.
    seconds : wall time.
    """

    key: str
    quarantine: pd.DataFrame
    n_new: int
    n_reused: int
    seconds: float


def no_progress(done: int, total: int, images_per_second: float) -> None:
    """Report nothing."""


def prepare_images(
    table: pd.DataFrame, settings: ImageSettings, storage: Storage, progress: Progress = no_progress
) -> Prepared:
    """Decode the films of a canonical table into the image store.

    Parameters
    ----------
    table : columns image_id and uri; one row an image.
    settings : what decides about pixels; ``unreadable`` is the caller's business.
    storage : root of the studies.
    progress : called with (films done, films to do, films per second) after every task.

    Raises
    ------
    StudyError : a storage that cannot be reached or written; tasks that Ray cannot run.
    """
    started = time.monotonic()
    films, quarantine = _admitted(table)
    pixels = pixels_key(settings)
    catalog = read_catalog(storage, pixels)
    known, held = catalog.films, set(catalog.films["fingerprint"])
    todo = films[~films["fingerprint"].isin(held)].drop_duplicates("fingerprint").sort_values("uri")
    written, died = _decode_all(todo, settings, storage, pixels, progress)
    if catalog.loose or written.num_rows:
        before = pa.Table.from_pandas(known, schema=CATALOG, preserve_index=False)
        known = pa.concat_tables([before, written]).to_pandas().drop_duplicates("fingerprint")
        write_catalog(storage, pixels, known, replaced=catalog.files)

    placed = films.merge(known, on="fingerprint", how="left", validate="many_to_one")
    placed.loc[placed["block"].isna(), "reason"] = "missing"  # vanished after it was listed
    placed.loc[placed["fingerprint"].isin(died), "reason"] = DIED  # not in the store: the next prepare tries it again
    unread = placed[placed["reason"].notna()]
    quarantine = pd.concat([quarantine, unread[["image_id", "uri", "reason"]]], ignore_index=True).astype(str)
    originals = [*zip(films["image_id"], films["fingerprint"], strict=True), *_unread_originals(quarantine)]
    key = study_key(settings, originals)
    index = placed[placed["reason"].isna()][["image_id", "block", "row", "sha256"]]
    reasons = pa.Table.from_pandas(quarantine, preserve_index=False)
    storage.write_table(f"{FOLDER}/{key}/quarantine.parquet", reasons)
    storage.write_table(f"{FOLDER}/{key}/index.parquet", pa.Table.from_pandas(index, preserve_index=False))
    return Prepared(key, reasons.to_pandas(), len(todo), len(films) - len(todo), time.monotonic() - started)


def _admitted(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split the table into films that exist (image_id, uri, fingerprint) and the first quarantine."""
    rows = table[["image_id", "uri"]].astype(str)
    found = fingerprints(rows["uri"])
    reasons = [
        "missing" if uri not in found else f"too large: {found[uri][1]} bytes" if found[uri][1] > LARGEST_FILE else None
        for uri in rows["uri"]
    ]
    rows = rows.assign(
        fingerprint=[found.get(uri, ("", 0))[0] for uri in rows["uri"]], reason=pd.Series(reasons, rows.index, object)
    )
    twice = rows["image_id"].duplicated(keep=False)
    rows.loc[twice, "reason"] = "duplicated id"
    bad = rows["reason"].notna()
    return rows[~bad][["image_id", "uri", "fingerprint"]], rows[bad][["image_id", "uri", "reason"]]


def _unread_originals(quarantine: pd.DataFrame) -> Iterator[tuple[str, str]]:
    return zip(quarantine["image_id"], quarantine["reason"], strict=True)


def _decode_all(
    todo: pd.DataFrame, settings: ImageSettings, storage: Storage, pixels: str, progress: Progress
) -> tuple[pa.Table, set[str]]:
    """Decode the films that the store lacks.

    Returns
    -------
    the catalogue's rows of what was written, fingerprints of the films that end every worker.
    """
    written = [CATALOG.empty_table()]
    if todo.empty:
        return written[0], set()
    _prepare_ray_data()
    per_task = BLOCK_FILMS * TASK_BLOCKS
    parts = [
        pa.Table.from_pandas(todo.iloc[start : start + per_task][["uri", "fingerprint"]], preserve_index=False)
        for start in range(0, len(todo), per_task)
    ]
    decode = partial(decode_batch, settings=settings, storage=storage, pixels=pixels)
    done, started = 0, time.monotonic()

    def note(answer: pa.Table) -> None:
        nonlocal done
        for what, where, remedy in filter(None, answer["refusal"].to_pylist()):
            raise StudyError(what, where=where, remedy=remedy)
        written.extend(pa.Table.from_struct_array(rows.flatten()) for rows in answer["catalog"].chunks)
        done += sum(answer["films"].to_pylist())
        progress(done, len(todo), done / max(time.monotonic() - started, 1e-9))

    for _ in range(TRIES - 1):
        given = len(parts)
        parts = _unanswered(parts, decode, note)
        if len(parts) in (0, given):
            break
    died = _one_by_one(pa.concat_tables(parts), decode, note) if parts else set[str]()
    return pa.concat_tables(written), died


def _unanswered(parts: list[pa.Table], decode: partial[pa.Table], note: Callable[[pa.Table], None]) -> list[pa.Table]:
    """Decode parts, each in a task of Ray Data; return those whose task failed."""
    dataset = ray.data.from_arrow(parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray has no other way yet to bound its retries
        dataset = dataset.map_batches(decode, batch_size=None, batch_format="pyarrow", max_retries=0)
    answered: set[str] = set()
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            answer = pa.table(batch)
            answered.update(answer["first"].to_pylist())
            note(answer)
    except RayError as error:  # an answer that went with its machine; what is wrong with Ray itself comes again
        logging.getLogger(__name__).warning("a round of tasks was cut off: %s", error)
    return [part for part in parts if part["fingerprint"][0].as_py() not in answered]


def _one_by_one(films: pa.Table, decode: partial[pa.Table], note: Callable[[pa.Table], None]) -> set[str]:
    """Decode films, each in a task of its own; return the fingerprints of those that end their worker each time.

    Raises
    ------
    StudyError : more than ``MOST_DEATHS`` of them, or a task that fails in another way.
    """
    task: Any = ray.remote(max_retries=0)(decode.func)
    died: list[dict[str, str]] = []
    for row, film in enumerate(films.to_pylist()):
        failure = None
        for _ in range(TRIES):
            try:
                note(pa.table(ray.get(task.remote(films.slice(row, 1), **decode.keywords))))
            except RayError as error:
                failure = error
            else:
                failure = None
                break
        if failure is not None and not isinstance(failure, WorkerCrashedError | OutOfMemoryError):
            text = (str(failure).strip().splitlines() or [type(failure).__name__])[-1][:300]
            raise StudyError(
                f"Ray cannot run the task that decodes this film: {text}",
                where=film["uri"],
                remedy="look at the cluster with raystudy doctor and at Ray's logs; run the same command again",
            ) from failure
        if failure is not None:
            died.append(film)
        if len(died) > MOST_DEATHS:
            named = ", ".join(film["uri"] for film in died[:3])
            raise StudyError(
                f"the decoder's process died on {len(died)} films, {TRIES} times each: {named}, …",
                where="in Ray's workers",
                remedy="look for crashes or too little memory in Ray's logs; so many are hardly the films' fault",
            ) from failure
    return {film["fingerprint"] for film in died}


def decode_batch(batch: pa.Table, settings: ImageSettings, storage: Storage, pixels: str) -> pa.Table:
    """Decode one task's films and write their blocks.

    Returns
    -------
    one row: fingerprint of the task's first film, number of its films, what the catalogue will say of them, and refusal
    (what, where, remedy): a storage that refuses is an answer to the driver, not a failure of Ray.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # this process is Ray's worker; oddities become reasons
    uris, marks = batch["uri"].to_pylist(), batch["fingerprint"].to_pylist()
    written, refusal = [CATALOG.empty_table()], None
    try:
        originals = _fetched(uris)
        for start in range(0, len(uris), BLOCK_FILMS):
            part = slice(start, start + BLOCK_FILMS)
            fetched = zip(uris[part], marks[part], originals, strict=False)  # originals goes on in the next block
            films = [_film(uri, mark, data, settings) for uri, mark, data in fetched if data is not None]
            if films:
                written.append(write_block(storage, pixels, films, settings.size))
    except StudyError as error:
        refusal = [error.what, error.where, error.remedy]
    catalog = pa.concat_tables(written).to_pylist()
    answer = {"first": marks[0], "films": len(marks), "catalog": catalog, "refusal": refusal}
    return pa.Table.from_pylist([answer], schema=ANSWER)


def _film(uri: str, fingerprint: str, original: bytes, settings: ImageSettings) -> Film:
    digest = hashlib.sha256(original).hexdigest()
    try:
        return Film(fingerprint, digest, decode_film(original, locate(uri)[2], settings), None)
    except Unreadable as error:
        return Film(fingerprint, digest, None, error.reason)
    except StudyError as error:  # of the machine, not of the film: nothing may be remembered of it
        raise StudyError(error.what, where=uri, remedy=error.remedy) from error


def _fetched(uris: Iterable[str]) -> Iterator[bytes | None]:
    """Fetch originals in order, a bounded number ahead; None for one that has vanished since it was listed."""
    waiting: deque[Future[bytes | None]] = deque()
    with ThreadPoolExecutor(FETCHERS) as pool:
        for uri in uris:
            waiting.append(pool.submit(_fetch, uri))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _fetch(uri: str) -> bytes | None:
    try:
        return read_original(uri)
    except FileNotFoundError:
        return None


def _prepare_ray_data() -> None:
    """Let failed tasks be told by their absence; Ray Data's own bars and lines would tear the progress display."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray Data warns of its own defaults
        context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # no limit
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
