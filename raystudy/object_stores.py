"""Where bytes lie: a local folder, an S3 bucket, or any other file system that pyarrow can open.

Each backend knows a few verbs (``Backend``) over keys with forward slashes, and turns what its service answers into
``FileNotFoundError`` (no such file), ``FileExistsError`` or a ``StudyError`` that names the remedy.
``raystudy.storage`` builds everything else on these verbs.  S3 is in ``raystudy.s3_bucket``, which alone needs obstore.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow.fs

from raystudy.errors import StudyError

ASIDE = re.compile(r"^\.[^/]*\.aside-[0-9a-f]+$")  # a file that is being written; never listed


@dataclass(frozen=True)
class FileStamp:
    """Size and version of one file: enough to see that it changed without reading it."""

    size: int
    version: str


class Backend(Protocol):
    """The verbs of a store; ``key`` is a relative path with forward slashes."""

    def read(self, key: str) -> bytes: ...
    def read_head(self, key: str, size: int) -> bytes: ...
    def write(self, key: str, data: bytes) -> None: ...
    def create(self, key: str, data: bytes) -> None: ...
    def exists(self, key: str) -> bool: ...
    def list(self, prefix: str) -> Iterator[str]: ...
    def stamps(self, folder: str) -> dict[str, FileStamp]: ...
    def delete(self, key: str) -> None: ...
    def delete_tree(self, prefix: str) -> None: ...
    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]: ...


class LocalFolder:
    """A folder of this machine.  Writes are aside, fsync, rename, fsync of the folder: never half-visible."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, key: str) -> bytes:
        with self._refusals(key):
            return (self.root / key).read_bytes()

    def read_head(self, key: str, size: int) -> bytes:
        with self._refusals(key), open(self.root / key, "rb") as file:
            return file.read(size)

    def write(self, key: str, data: bytes) -> None:
        with self._refusals(key, writing=True), self._aside(key, data) as (aside, target):
            os.replace(aside, target)

    def create(self, key: str, data: bytes) -> None:
        with self._refusals(key, writing=True), self._aside(key, data) as (aside, target):
            os.link(aside, target)  # fails when the target is there; the content is complete from its first moment

    def exists(self, key: str) -> bool:
        with self._refusals(key):
            return (self.root / key).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the files, also those behind links to folders; a link back ends there."""
        with self._refusals(prefix):
            start = len(os.path.join(self.root, ""))
            for folder, names in _walk(os.path.join(self.root, prefix) if prefix else str(self.root)):
                above = f"{folder}/"[start:]
                for name in names:
                    if not (name.startswith(".") and ASIDE.match(name)):
                        yield above + name

    def stamps(self, folder: str) -> dict[str, FileStamp]:
        found: dict[str, FileStamp] = {}
        with self._refusals(folder), _not_there():
            for entry in os.scandir(self.root / folder):
                with _not_there():
                    if entry.is_file():
                        status = entry.stat()
                        found[entry.name] = FileStamp(status.st_size, str(status.st_mtime_ns))
        return found

    def delete(self, key: str) -> None:
        with self._refusals(key):
            (self.root / key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        """Delete a folder; of a link in it only the link, never what it points to."""
        with self._refusals(prefix), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.root / prefix)

    def append(self, key: str, line: bytes) -> None:
        """Append one line in one write; a line torn by an earlier crash is closed first."""
        target = self.root / key
        with self._refusals(key, writing=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(target, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                size = os.fstat(handle).st_size
                torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
                os.write(handle, (b"\n" if torn else b"") + line)
            finally:
                os.close(handle)

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        return pyarrow.fs.LocalFileSystem(), str(self.root)

    @contextlib.contextmanager
    def _aside(self, key: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.parent / f".{target.name[:100]}.aside-{os.urandom(10).hex()}"
        try:
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield aside, target
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            aside.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _refusals(self, key: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, FileExistsError) as error:
            # While writing only link's own "exists" is an answer; others are about the folders above.
            if writing and not (isinstance(error, FileExistsError) and error.filename2 is not None):
                raise self._refusal(key, error) from error
            raise
        except IsADirectoryError as error:
            if writing:
                raise self._refusal(key, error) from error
            raise FileNotFoundError(f"{self.root / key} is a folder") from error
        except OSError as error:
            raise self._refusal(key, error) from error

    def _refusal(self, key: str, error: OSError) -> StudyError:
        no_folder = isinstance(error, FileExistsError | NotADirectoryError)
        return StudyError(
            f"the folder cannot be used: {'it is none' if no_folder else error.strerror or error}",
            where=str(self.root / key),
            remedy="give a folder that this user may read and write, with free space, as --storage",
        )


@contextlib.contextmanager
def _not_there() -> Iterator[None]:
    """Go on where a file or folder is not there, or cannot be: a link to itself, a name that is too long."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise


def _walk(top: str, way: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder at ``top`` and below, also through links, with its files.

    A link to a folder that the way to it passes through, or to one above that, would never end and is left out.

    Parameters
    ----------
    way : the resolved folders from which links led here.
    """
    for folder, below, names in os.walk(top):
        yield folder, names
        for link in (path for path in (os.path.join(folder, name) for name in below) if os.path.islink(path)):
            target, passed = os.path.realpath(link), (*way, os.path.realpath(folder))
            if not any(os.path.commonpath((target, place)) == target for place in passed):
                yield from _walk(link, passed)


class ArrowFolder:
    """Any other file system that pyarrow opens by URI (gs://, abfs://, hdfs://).  No exclusive creation.

    A file is written in place: when it can be seen is the service's business (``Storage.write_bytes``).
    """

    def __init__(self, file_system: pyarrow.fs.FileSystem, root: str, uri: str) -> None:
        self.file_system, self.root, self.uri = file_system, root.rstrip("/"), uri

    def read(self, key: str) -> bytes:
        with self._refusals(key), self.file_system.open_input_stream(self._path(key)) as file:
            return file.read()

    def read_head(self, key: str, size: int) -> bytes:
        with self._refusals(key), self.file_system.open_input_stream(self._path(key)) as file:
            return file.read(size)

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._refusals(key, writing=True):
            self.file_system.create_dir(path.rsplit("/", 1)[0], recursive=True)
            with self.file_system.open_output_stream(path) as file:
                file.write(data)

    def create(self, key: str, data: bytes) -> None:
        raise StudyError(
            "this storage has no exclusive creation, which a study's lock needs",
            where=f"{self.uri}/{key}",
            remedy="keep studies on a local folder or s3://; originals may stay where they are",
        )

    def exists(self, key: str) -> bool:
        with self._refusals(key):
            return self.file_system.get_file_info(self._path(key)).type == pyarrow.fs.FileType.File

    def list(self, prefix: str) -> Iterator[str]:
        found = self._infos(prefix, recursive=True)
        return (info.path[len(self.root) :].lstrip("/") for info in found)

    def stamps(self, folder: str) -> dict[str, FileStamp]:
        return {
            info.base_name: FileStamp(info.size, str(info.mtime_ns)) for info in self._infos(folder, recursive=False)
        }

    def delete(self, key: str) -> None:
        with self._refusals(key), contextlib.suppress(FileNotFoundError):
            self.file_system.delete_file(self._path(key))

    def delete_tree(self, prefix: str) -> None:
        with self._refusals(prefix), contextlib.suppress(FileNotFoundError):
            self.file_system.delete_dir(self._path(prefix))

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        return self.file_system, self.root

    def _infos(self, prefix: str, *, recursive: bool) -> list[pyarrow.fs.FileInfo]:
        selector = pyarrow.fs.FileSelector(self._path(prefix), allow_not_found=True, recursive=recursive)
        with self._refusals(prefix):
            return [info for info in self.file_system.get_file_info(selector) if info.is_file]

    def _path(self, key: str) -> str:
        return "/".join(part for part in (self.root, key) if part)

    @contextlib.contextmanager
    def _refusals(self, key: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not writing:
                raise
            raise StudyError(
                f"the storage does not answer as it should: {str(error)[:300]}",
                where=f"{self.uri}/{key}",
                remedy="check the address and the credentials in the environment",
            ) from error
