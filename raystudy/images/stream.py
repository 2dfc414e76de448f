"""Films of a study on one node: in memory, or streamed from a file of the node when they would take too much of it.

Both are an ``ImageArray`` in the same order with the same bytes, so a trial sees no difference.  Streaming is a memory
map: one raw uint8 file per node and study, built block by block from the image store, of which the operating system
keeps in memory what is being read and drops what is not.  The first trial on a node builds it, the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raystudy.errors import StudyError
from raystudy.images.array import ImageArray
from raystudy.images.store import load_pixels, read_pixels, size_of
from raystudy.storage import Storage

KEPT_DAYS = 14  # an unused file is removed when another study builds its own


@dataclass(frozen=True)
class StreamedArray(ImageArray):
    """Films in a file of this node.  What travels to another process or node is the way to them, not the pixels."""

    storage: Storage
    key: str
    folder: Path | None

    def __reduce__(self) -> tuple[object, ...]:
        return map_pixels, (self.storage, self.key, self.image_ids, self.folder)


def node_memory() -> int:
    """Return the bytes of memory this process may use: the machine's, or its container's limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [machine]
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def streams(n_images: int, size: int, node_memory_share: float) -> bool:
    """True when the films would take more than the given share of this node's memory."""
    return n_images * size * size > node_memory_share * node_memory()


def open_pixels(
    storage: Storage,
    key: str,
    image_ids: Iterable[str],
    node_memory_share: float,
    folder: Path | None = None,
) -> ImageArray:
    """Return the films of a prepared study, loaded or streamed by their size.

    Parameters
    ----------
    storage, key : root of the studies and ``Prepared.key``.
    image_ids : unique, in the wanted order.
    node_memory_share : of ``ImageSettings``.
    folder : of the node's files; the system's folder for temporary files when not given.
    """
    ids = tuple(image_ids)
    if streams(len(ids), size_of(key), node_memory_share):
        return map_pixels(storage, key, ids, folder)
    return load_pixels(storage, key, ids)


def map_pixels(storage: Storage, key: str, image_ids: Sequence[str], folder: Path | None = None) -> StreamedArray:
    """Return the films as a read-only memory map of a file on this node, built when it is not there or not whole.

    Raises
    ------
    StudyError : no room for the file, or a folder that another user made or may write to.
    """
    place = folder or Path(tempfile.gettempdir()) / f"raystudy-films-{os.getuid()}"
    _make_own(place)
    ids, size = tuple(image_ids), size_of(key)
    digest = hashlib.sha256("\n".join((storage.uri, key, *ids)).encode()).hexdigest()[:16]
    target = place / f"{key}-{digest}.u8"
    with (place / f"{key}-{digest}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first trial on the node builds
        if not target.exists() or target.stat().st_size != len(ids) * size * size:
            _build(storage, key, ids, target, size)
    os.utime(target)
    pixels: NDArray[np.uint8] = np.memmap(target, np.uint8, mode="r", shape=(len(ids), size, size))
    return StreamedArray(ids, pixels, storage, key, folder)


def _make_own(folder: Path) -> None:
    """Make a folder for this user alone; in a folder for all, another could have made it first and fill in films."""
    with contextlib.suppress(FileExistsError):  # a file, or a link to nowhere: refused below
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise StudyError(
            "films are not streamed from this folder: it is a link, another user's, or others may write to it",
            where=str(folder),
            remedy="remove it, or set TMPDIR to a folder of your own on the node",
        )
    folder.chmod(0o700)


def _build(storage: Storage, key: str, ids: tuple[str, ...], target: Path, size: int) -> None:
    _remove_unused(target.parent)
    needed, free = len(ids) * size * size, shutil.disk_usage(target.parent).free
    if needed > free:
        raise StudyError(
            f"streaming the films needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            where=str(target.parent),
            remedy="set TMPDIR to a larger disk of the node, or raise images.node_memory_share",
        )
    aside = target.with_suffix(".aside")
    pixels = np.memmap(aside, np.uint8, mode="w+", shape=(len(ids), size, size))
    read_pixels(storage, key, ids, pixels)
    pixels.flush()
    del pixels
    os.replace(aside, target)


def _remove_unused(folder: Path) -> None:
    for path in (*folder.glob("*.u8"), *folder.glob("*.aside")):
        if time.time() - path.stat().st_mtime > KEPT_DAYS * 86400:
            path.unlink(missing_ok=True)
