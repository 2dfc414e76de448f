"""The image store: decoded films in Parquet blocks, shared by all studies of one storage.

    _images/<pixels>/blocks/<block>.parquet    fingerprint, sha256 of the original, reason or pixels (S·S bytes)
    _images/<pixels>/catalog/<hash>.parquet    fingerprint -> block, row; what is not catalogued is read block by block
    _images/<key>/index.parquet                one study's image_id -> block, row, sha256
    _images/<key>/quarantine.parquet           one study's image_id, uri, reason

``<pixels>`` names the decode settings, ``<key>`` = ``<pixels>-<hash>`` adds the fingerprints of the study's originals.
A film is found by the fingerprint of its original, so a second study decodes only what the first did not have.  Every
file is written whole and never changed; blocks and catalogues are named by the checksum of their bytes, so that a
damaged one is known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raystudy.errors import DamagedFileError, StudyError
from raystudy.images.array import ImageArray
from raystudy.images.decode import DECODER_VERSION
from raystudy.images.settings import ImageSettings
from raystudy.storage import Storage

FOLDER = "_images"
STORE_VERSION = 2  # blocks are named by their bytes
READERS = 4  # threads that read blocks
CATALOG = pa.schema(
    [
        ("fingerprint", pa.string()),
        ("block", pa.string()),
        ("row", pa.int32()),
        ("sha256", pa.string()),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class Film:
    """One outcome of decoding: pixels, or the reason why there are none."""

    fingerprint: str
    sha256: str
    pixels: NDArray[np.uint8] | None
    reason: str | None


def pixels_key(settings: ImageSettings) -> str:
    """Name the settings that decide about pixels."""
    decides = {
        "version": DECODER_VERSION,
        "store": STORE_VERSION,
        "size": settings.size,
        "resize": settings.resize,
        "pixel_cap": settings.pixel_cap,
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return f"{settings.resize}{settings.size}-{digest[:8]}"


def study_key(settings: ImageSettings, originals: Iterable[tuple[str, str]]) -> str:
    """Name one study's films: decode settings and (image_id, fingerprint) of its originals."""
    digest = hashlib.sha256("\n".join(f"{i}\t{f}" for i, f in sorted(originals)).encode()).hexdigest()
    return f"{pixels_key(settings)}-{digest[:12]}"


def write_block(storage: Storage, pixels: str, films: Sequence[Film], size: int) -> pa.Table:
    """Write one block, its rows in the order of ``films``, and return what the catalogue will say of it."""
    values = [None if film.pixels is None else film.pixels.tobytes() for film in films]
    table = pa.table(
        {
            "fingerprint": pa.array([film.fingerprint for film in films], pa.string()),
            "sha256": pa.array([film.sha256 for film in films], pa.string()),
            "reason": pa.array([film.reason for film in films], pa.string()),
            "pixels": pa.array(values, pa.binary(size * size)),
        }
    )
    sink = pa.BufferOutputStream()
    # Films are noise to a byte compressor that has to be fast; reading back at memory speed is worth more.
    pq.write_table(table, sink, compression="lz4", use_dictionary=False, write_statistics=False)
    data = sink.getvalue().to_pybytes()
    block = _name(data)
    storage.write_bytes(f"{FOLDER}/{pixels}/blocks/{block}.parquet", data)
    return _catalogued(table, block)


class Catalog(NamedTuple):
    """Every film of the store.

    films : columns of ``CATALOG``, one row per fingerprint.  loose : number of blocks that no catalogue named.
    files : the catalogues that were read.
    """

    films: pd.DataFrame
    loose: int
    files: list[str]


def read_catalog(storage: Storage, pixels: str) -> Catalog:
    """Read the catalogues, and the blocks that none of them names; damaged catalogues do not count."""
    root = storage.child(FOLDER, pixels)
    files = root.list("catalog")
    with ThreadPoolExecutor(READERS) as pool:
        tables = [table for table in pool.map(lambda path: _if_there(root, path), files) if table]
        known = {block for table in tables for block in table["block"].unique().to_pylist()}
        names = [path.removeprefix("blocks/").removesuffix(".parquet") for path in root.list("blocks")]
        loose = [name for name in names if name not in known]
        tables += pool.map(lambda name: _catalog_of(root, name), loose)
    found = pa.concat_tables([CATALOG.empty_table(), *(table.cast(CATALOG) for table in tables)]).to_pandas()
    present = found[found["block"].isin(set(names))]  # a deleted block takes its catalogue rows along
    return Catalog(present.drop_duplicates("fingerprint").reset_index(drop=True), len(loose), files)


def _if_there(root: Storage, path: str) -> pa.Table | None:
    try:
        return _checked_table(root, path)
    except (FileNotFoundError, DamagedFileError):  # replaced by another prepare just now; blocks are found one by one
        return None


def _checked_table(root: Storage, path: str, columns: list[str] | None = None) -> pa.Table:
    """Return a file that is named by its bytes.

    Raises
    ------
    DamagedFileError : the bytes are others.
    """
    data = root.read_bytes(path)
    if _name(data) != path.rsplit("/", 1)[-1].removesuffix(".parquet"):
        what = "the file does not match the checksum that is its name"
        remedy = "delete this file and run again: its films are then decoded anew"
        raise DamagedFileError(what, where=root.address(path), remedy=remedy)
    return root.parse_table(path, data, columns)


def _name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:20]


def _catalog_of(root: Storage, block: str) -> pa.Table:
    return _catalogued(_checked_table(root, f"blocks/{block}.parquet", ["fingerprint", "sha256", "reason"]), block)


def _catalogued(table: pa.Table, block: str) -> pa.Table:
    table = table.append_column("block", pa.array([block] * table.num_rows, pa.string()))
    return table.append_column("row", pa.array(range(table.num_rows), pa.int32())).select(CATALOG.names)


def write_catalog(storage: Storage, pixels: str, films: pd.DataFrame, replaced: Iterable[str]) -> None:
    """Write one catalogue of everything, then drop those that it replaces; one of another prepare stays."""
    root = storage.child(FOLDER, pixels)
    table = pa.Table.from_pandas(films.sort_values("fingerprint"), schema=CATALOG, preserve_index=False)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    name = f"catalog/{_name(data)}.parquet"
    root.write_bytes(name, data)
    for path in replaced:
        if path != name:
            root.delete(path)


def load_index(storage: Storage, key: str) -> pd.DataFrame:
    """Return one study's index: image_id, block, row, sha256."""
    try:
        return storage.read_table(f"{FOLDER}/{key}/index.parquet").to_pandas()
    except FileNotFoundError as error:
        raise StudyError(
            "the films of this study have not been prepared", where=key, remedy="run raystudy prepare EXPERIMENT"
        ) from error


def load_quarantine(storage: Storage, key: str) -> pd.DataFrame:
    """Return one study's quarantine: image_id, uri, reason."""
    return storage.read_table(f"{FOLDER}/{key}/quarantine.parquet").to_pandas()


@dataclass
class BlockReads:
    """What is wanted of one block: its rows, where they go in the array, and the checksums of their originals."""

    rows: list[int] = field(default_factory=list[int])
    targets: list[int] = field(default_factory=list[int])
    sums: list[str] = field(default_factory=list[str])


def plan_reads(storage: Storage, key: str, image_ids: Sequence[str]) -> dict[str, BlockReads]:
    """Group the wanted films by block.

    Raises
    ------
    StudyError : an image that the store does not hold, named.
    """
    index = load_index(storage, key).set_index("image_id")
    places = index.reindex(pd.Index(image_ids))
    missing = places.index[places["block"].isna()]
    if len(missing):
        raise StudyError(
            f"{len(missing)} films are not in the image store: {', '.join(map(str, missing[:3]))}",
            where=storage.address(f"{FOLDER}/{key}"),
            remedy="run raystudy prepare; quarantine.parquet there names films that could not be read",
        )
    plan: dict[str, BlockReads] = {}
    wanted = zip(places["block"], places["row"].astype(int), places["sha256"], strict=True)
    for target, (block, row, sha256) in enumerate(wanted):
        reads = plan.setdefault(str(block), BlockReads())
        reads.rows.append(int(row))
        reads.targets.append(target)
        reads.sums.append(str(sha256))
    return plan


def read_pixels(storage: Storage, key: str, image_ids: Sequence[str], out: NDArray[np.uint8]) -> None:
    """Read films into ``out`` (N, S, S) uint8, in the order of ``image_ids``."""
    blocks = storage.child(FOLDER, key.rsplit("-", 1)[0], "blocks")

    def read(item: tuple[str, BlockReads]) -> None:
        block, reads = item
        table = _checked_table(blocks, f"{block}.parquet", ["pixels", "sha256"])
        sums = table["sha256"].to_pylist()
        if [sums[row] if row < len(sums) else "" for row in reads.rows] != reads.sums:
            where, remedy = storage.address(f"{FOLDER}/{key}/index.parquet"), "run again: it is then written anew"
            raise DamagedFileError("the index does not fit its blocks", where=where, remedy=remedy)
        column = table["pixels"].combine_chunks()
        size = out.shape[1]
        values = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, size, size)[column.offset :]
        out[reads.targets] = values[reads.rows]

    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(read, plan_reads(storage, key, image_ids).items()):
            pass


def load_pixels(storage: Storage, key: str, image_ids: Iterable[str]) -> ImageArray:
    """Return the films of a prepared study.

    Parameters
    ----------
    storage : root of the studies. key : of ``prepare_images``. image_ids : unique, in the wanted order.
    """
    ids = tuple(image_ids)
    pixels = np.empty((len(ids), size_of(key), size_of(key)), np.uint8)
    read_pixels(storage, key, ids, pixels)
    pixels.flags.writeable = False
    return ImageArray(ids, pixels)


def form_of(key: str) -> str:
    """Return how films are resized, and to which edge length, as a store's key names it: ``squash224``."""
    return key.split("-", 1)[0]


def size_of(key: str) -> int:
    """Return the edge length that a store's key names."""
    return int("".join(c for c in form_of(key) if c.isdigit()))
