"""The study directory and every other place that holds files: a local path, ``s3://…``, or a pyarrow.fs URI.

A ``Storage`` is an address (it can be pickled, forked and compared); the connection behind it is opened on first use in
each process.  Paths are relative, with forward slashes, and may not leave the root.  Whole files appear at once or not
at all (``write_bytes`` says where not quite); a missing file is a ``FileNotFoundError``, everything else that goes
wrong is a ``StudyError`` with its remedy.
"""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from raystudy.errors import DamagedFileError, StudyError
from raystudy.object_stores import ArrowFolder, Backend, FileStamp, LocalFolder

RETRY_SECONDS = 60.0
UNREACHABLE_SECONDS = 20.0  # Google's client would go on for 15 minutes
REMEDY = "delete this file and run the same command again"
FIRST_EVENT_BYTES = 65536  # no first event is longer
EVENT_READERS = 16  # concurrent requests when events are read from object storage

_AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION")
_NAMES_NO_USER = ("s3", "gs", "gcs", "http", "https")  # where the part before @ is a key; elsewhere a container or user
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


@dataclass(frozen=True)
class Storage:
    """A root address and what can be done below it.

    Parameters
    ----------
    uri : normalised by ``open_storage``: an absolute local path, ``s3://bucket/prefix`` or another pyarrow.fs URI.
    retry_seconds : how long a request waits for a server that is away before it gives up.
    """

    uri: str
    retry_seconds: float = RETRY_SECONDS

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def child(self, *parts: str) -> Storage:
        """Return the storage of a folder below this one."""
        return Storage("/".join([self.uri.rstrip("/"), *(_checked(part) for part in parts)]), self.retry_seconds)

    def address(self, path: str = "") -> str:
        """Return the full address of a file, for messages."""
        return f"{self.uri.rstrip('/')}/{path}" if path else self.uri

    def read_bytes(self, path: str) -> bytes:
        return self._backend.read(_checked(path))

    def read_head(self, path: str, size: int) -> bytes:
        """Return the first ``size`` bytes of a file, or all of a shorter one."""
        return self._backend.read_head(_checked(path), size)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a whole file: it is seen complete or not at all, also after a crash.

        On pyarrow's other file systems (which can hold originals but no study, for want of a lock) this is as good as
        the service: gs:// publishes an object when it is closed, abfs:// and hdfs:// may show a shorter one until then.
        """
        self._backend.write(_checked(path), data)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Write a file unless it is there; of several callers exactly one gets True."""
        try:
            self._backend.create(_checked(path), data)
        except FileExistsError:
            return False
        return True

    def exists(self, path: str) -> bool:
        """True for a file; a folder does not exist."""
        return self._backend.exists(_checked(path))

    def list(self, prefix: str = "") -> list[str]:
        """Return the paths of all files in the folder ``prefix`` and below, relative to this storage, sorted.

        Links of a local folder are followed; one that leads back to where it came from ends there.
        """
        return sorted(self._backend.list(_checked(prefix) if prefix else ""))

    def stamps(self, folder: str = "") -> dict[str, FileStamp]:
        """Return size and version of each file directly in ``folder``; empty when there is no such folder."""
        return self._backend.stamps(_checked(folder) if folder else "")

    def delete(self, path: str) -> None:
        """Delete a file; one that is not there is no error."""
        self._backend.delete(_checked(path))

    def delete_tree(self, path: str = "") -> None:
        """Delete a folder with everything in it; one that is not there is no error."""
        self._backend.delete_tree(_checked(path) if path else "")

    def read_json(self, path: str) -> Any:
        """Read a JSON file.

        Raises
        ------
        DamagedFileError : it is none.
        """
        data = self.read_bytes(path)
        try:
            return json.loads(data)
        except ValueError as error:
            raise self._damage(path, error) from error

    def write_json(self, path: str, value: object) -> None:
        """Write JSON with sorted keys, so that equal values are equal bytes."""
        self.write_bytes(path, json_bytes(value))

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """Read a Parquet file.

        Raises
        ------
        DamagedFileError : it is none.
        """
        return self.parse_table(path, self.read_bytes(path), columns)

    def parse_table(self, path: str, data: bytes, columns: list[str] | None = None) -> pa.Table:
        """Return the table of a Parquet file that was read already."""
        try:
            return pq.read_table(pa.BufferReader(data), columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise self._damage(path, error) from error

    def write_table(self, path: str, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self.write_bytes(path, sink.getvalue())

    def append_event(self, path: str, event: Mapping[str, object]) -> None:
        """Append one event: a JSON line of a local file, the next numbered object on object storage."""
        line = _event_line(event)
        backend = self._backend
        if isinstance(backend, LocalFolder):
            backend.append(_checked(path), line)
            return
        number = _last_event.get((self.uri, path)) or max(_numbers(self.list(path)), default=0)
        while not self.create_exclusive(f"{path}/{number + 1:08d}.json", line):
            number += 1
        _last_event[self.uri, path] = number + 1

    def read_events(self, path: str, start: int = 0) -> list[dict[str, Any]]:
        """Return the events from number ``start`` on; a line that a crash cut off, or that is damaged, is left out."""
        if isinstance(self._backend, LocalFolder):
            if not self.exists(path):
                return []
            lines = self.read_bytes(path).split(b"\n")[:-1]  # what follows the last newline is torn
            return [event for event in map(_parsed, lines) if event is not None][start:]
        keys = [f"{path}/{number:08d}.json" for number in sorted(_numbers(self.list(path)))[start:]]
        with ThreadPoolExecutor(EVENT_READERS) as pool:
            return [event for event in map(_parsed, pool.map(self.read_bytes, keys)) if event is not None]

    def first_event(self, path: str) -> dict[str, Any] | None:
        """Return the event that was written first; None when there is none, or when it is damaged."""
        if isinstance(self._backend, LocalFolder):
            if not self.exists(path):
                return None
            line, newline, _ = self.read_head(path, FIRST_EVENT_BYTES).partition(b"\n")
            return _parsed(line) if newline else None
        numbers = _numbers(self.list(path))
        return _parsed(self.read_bytes(f"{path}/{min(numbers):08d}.json")) if numbers else None

    def check_writable(self) -> None:
        """Write, read and delete a small file, so that a storage that cannot be used is refused at the start."""
        quick = Storage(self.uri, min(self.retry_seconds, 10.0))
        probe = f".raystudy-probe-{os.getpid()}-{os.urandom(4).hex()}"
        quick.write_bytes(probe, b"probe")
        try:
            kept = quick.read_bytes(probe) == b"probe"
        except FileNotFoundError:
            kept = False
        if not kept:
            raise StudyError(
                "the storage does not keep what is written",
                where=quick.address(probe),
                remedy="name a local folder or a server of object storage (AWS_ENDPOINT_URL); this is none",
            )
        quick.delete(probe)

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return pyarrow's file system and the root's path in it."""
        return self._backend.filesystem()

    def _damage(self, path: str, error: BaseException) -> DamagedFileError:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return DamagedFileError(f"the file is damaged: {reason}", where=self.address(path), remedy=REMEDY)

    @property
    def _backend(self) -> Backend:
        environment = tuple(os.environ.get(name) for name in (*_AWS, *_ENDPOINTS)) if not self.is_local else ()
        return _connect(self.uri, self.retry_seconds, os.getpid(), environment)


def open_storage(uri: str | os.PathLike[str], *, retry_seconds: float | None = None) -> Storage:
    """Return the storage of a local path (relative ones from the current folder), ``s3://…`` or a pyarrow.fs URI.

    ``gs://anonymous@bucket/…`` is a public bucket, which is asked without credentials.

    Raises
    ------
    StudyError : an address that cannot be understood, or one that carries credentials.
    """
    text = os.fspath(uri)
    retry_seconds = RETRY_SECONDS if retry_seconds is None else retry_seconds
    if not text or "\0" in text:
        raise StudyError("the storage address is empty", remedy="a path or s3://bucket/prefix")
    if short := re.match(r"((s3|gs|gcs)(?=:)|[a-z][a-z0-9+.-]+(?=:/)):(?!//)/?", text, re.IGNORECASE):
        scheme, (host, slash, path) = short[1].lower(), text[short.end() :].partition("?")[0].partition("/")
        raise StudyError(
            f"{scheme}: takes two slashes; a folder of that name begins with ./",
            remedy=f"{scheme}://{'/' if scheme == 'file' else ''}{host.rpartition('@')[2]}{slash}{path}",  # no secret
        )
    if "://" not in text:
        return Storage(os.path.abspath(Path(text).expanduser()), retry_seconds)  # no ".." is left in it
    parts = urlsplit(text)
    text = parts.scheme + text[len(parts.scheme) :]  # S3://bucket is s3://bucket
    public = parts.scheme in ("gs", "gcs") and parts.netloc.startswith("anonymous@")  # pyarrow's form, no secret
    if parts.password or parts.query or (parts.username and parts.scheme in _NAMES_NO_USER and not public):
        raise StudyError(
            "a storage address may hold no credentials and no options",
            where=f"{parts.scheme}://…@{parts.hostname}{parts.path}",
            remedy="give them in the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL",
        )
    if parts.scheme == "file":
        return Storage(os.path.abspath(unquote(parts.path)), retry_seconds)
    if parts.scheme == "s3" and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", parts.netloc):
        raise StudyError(f"{parts.netloc!r} is not a bucket's name", where=text, remedy="s3://bucket/prefix")
    return Storage(text.rstrip("/"), retry_seconds)


def json_bytes(value: object) -> bytes:
    """Return the bytes that ``write_json`` writes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


_last_event: dict[
    tuple[str, str], int
] = {}  # where this process wrote last; only a first guess, another writer may be ahead


@lru_cache(maxsize=64)
def _connect(uri: str, retry_seconds: float, pid: int, environment: tuple[str | None, ...]) -> Backend:
    # pid and environment are in the key: a forked child and a changed credential get their own connection.
    if "://" not in uri:
        return LocalFolder(Path(uri))
    scheme, _, rest = uri.partition("://")
    if scheme == "s3":
        from raystudy.s3_bucket import S3Bucket  # a bare torch machine has no obstore

        bucket, _, prefix = rest.partition("/")
        return S3Bucket(bucket, prefix.strip("/"), retry_seconds)
    limit = f"?retry_limit_seconds={min(retry_seconds, UNREACHABLE_SECONDS):g}" if scheme in ("gs", "gcs") else ""
    try:
        file_system, root = pyarrow.fs.FileSystem.from_uri(uri + limit)
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise StudyError(
            f"this kind of storage cannot be opened: {str(error)[:200]}",
            where=uri,
            remedy="a path, s3://bucket/prefix or gs://bucket/prefix",
        ) from error
    return ArrowFolder(file_system, root, uri)


def _checked(path: str) -> str:
    parts = path.split("/")
    if "\0" in path or "\\" in path or any(part in {"", ".", ".."} for part in parts):
        raise ValueError(f"a path must be relative, with forward slashes, below its root: {path!r}")
    return path


def _numbers(keys: list[str]) -> list[int]:
    found = (re.search(r"/(\d{8})\.json$", key) for key in keys)
    return [int(match.group(1)) for match in found if match]


def _event_line(event: Mapping[str, object]) -> bytes:
    """Return an event as one line that ends with the checksum of the rest."""
    text = json.dumps(event, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    return text[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(text)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return an event without its checksum, or None when the line is torn or damaged; it may have no checksum."""
    match = re.search(rb',"crc":"([0-9a-f]{8})"\}\s*$', line)
    if match:
        line, told = line[: match.start()] + b"}", int(match.group(1), 16)
        if zlib.crc32(line) != told:
            return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
