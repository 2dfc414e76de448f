"""Reading original films from wherever the table's ``uri`` column points, and noticing when one has changed.

A uri is a local path, ``s3://bucket/key`` or another pyarrow.fs URI.  The fingerprint of an original is a hash of its
address, size and version (modification time or entity tag): the image store finds films by it without reading them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from raystudy.object_stores import FileStamp
from raystudy.storage import Storage, open_storage

LISTING_THREADS = 32
LARGEST_FILE = 1 << 30  # bytes; no film is larger, and a file is read whole


def locate(uri: str) -> tuple[Storage, str, str]:
    """Split the address of an original.

    Returns
    -------
    root : the storage to open (one per bucket), folder : below it, name : of the file.
    """
    if "://" in uri and not uri.startswith("file://"):
        scheme, _, rest = uri.partition("://")
        bucket, _, key = rest.partition("/")
        path = PurePosixPath(key)
        folder = "" if str(path.parent) == "." else str(path.parent)
        return open_storage(f"{scheme}://{bucket}"), folder, path.name
    path = PurePosixPath(open_storage(uri).uri)
    return open_storage("/"), str(path.parent).strip("/"), path.name


def read_original(uri: str) -> bytes:
    """Read one original; ``FileNotFoundError`` when it is missing."""
    root, folder, name = locate(uri)
    try:
        return root.read_bytes(f"{folder}/{name}" if folder else name)
    except ValueError as error:  # a path that leaves its root names no original
        raise FileNotFoundError(uri) from error


def fingerprints(uris: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Return fingerprint and size of every original that exists; the folders are listed, not the files asked.

    Raises
    ------
    StudyError : the storage cannot be reached.
    """
    wanted: dict[tuple[Storage, str], list[tuple[str, str]]] = defaultdict(list)
    for uri in dict.fromkeys(uris):
        root, folder, name = locate(uri)
        wanted[root, folder].append((name, uri))

    def stamps(place: tuple[Storage, str]) -> dict[str, FileStamp]:
        root, folder = place
        try:
            return root.stamps(folder)
        except ValueError:  # a folder outside the root holds no originals
            return {}

    found: dict[str, tuple[str, int]] = {}
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        for (place, files), listed in zip(wanted.items(), pool.map(stamps, wanted), strict=True):
            for name, uri in files:
                if name in listed:
                    address = f"{place[0].uri.rstrip('/')}/{place[1]}/{name}"
                    text = f"{address}\n{listed[name].size}\n{listed[name].version}"
                    found[uri] = hashlib.sha256(text.encode()).hexdigest()[:32], listed[name].size
    return found
