"""A bucket of object storage, through obstore.

S3 goes through obstore: one request a read, one PUT a write, and the conditional PUT that pyarrow.fs does not have.
Requests that fail because the server is away are repeated for ``retry_seconds``; the loop is in Python so that Ctrl-C
works while the server is gone.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import obstore
import pyarrow.fs
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import HTTPStore, S3Store

from raystudy.errors import StudyError
from raystudy.object_stores import FileStamp

T = TypeVar("T")
SINGLE_PUT_BYTES = 64 * 1024 * 1024
SERVER = re.compile(r"https?://([\w-]{1,63}(\.[\w-]{1,63})*\.?|\[[\da-fA-F:.]+\])(:\d+)?(/[\w./~%@:-]*)?", re.ASCII)
REGION = re.compile(r"[\w.-]{1,63}", re.ASCII)

_opened_by: dict[str, int] = {}  # obstore's threads do not survive a fork: the child would wait for ever


class S3Bucket:
    """A bucket and a prefix; endpoint, region and credentials come from the environment (AWS_*)."""

    def __init__(self, bucket: str, prefix: str, retry_seconds: float) -> None:
        self.bucket, self.prefix, self.retry_seconds = bucket, prefix, retry_seconds
        _check_environment(self._uri(""))
        self.endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        self.region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        if self.endpoint and not os.environ.get("AWS_ACCESS_KEY_ID"):
            raise StudyError(
                "there are no credentials for the object storage",
                where=self._uri(""),
                remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment of raystudy and of Ray",
            )
        options: dict[str, object] = {"region": self.region}
        if self.endpoint:
            options["endpoint"] = self.endpoint
        self.store = S3Store(
            bucket,
            config=options,  # pyright: ignore[reportArgumentType]
            client_options={
                "allow_http": (self.endpoint or "").startswith("http://"),
                "connect_timeout": "5s",
                "read_timeout": "60s",
                "timeout": "900s",
            },
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
        )

    def read(self, key: str) -> bytes:
        return self._ask(key, lambda path: bytes(obstore.get(self.store, path).bytes()))

    def read_head(self, key: str, size: int) -> bytes:
        def get(path: str) -> bytes:
            try:
                return bytes(obstore.get(self.store, path, options={"range": (0, size)}).bytes())
            except BaseError as error:
                if "416" not in str(error) or obstore.head(self.store, path)["size"]:
                    raise
                return b""  # of an empty object no range can be had

        return self._ask(key, get)

    def write(self, key: str, data: bytes) -> None:
        self._ask(key, lambda path: self._put(path, data, "overwrite"), writing=True)

    def create(self, key: str, data: bytes) -> None:
        tries = 0

        def put(path: str) -> None:
            nonlocal tries
            tries += 1
            try:
                self._put(path, data, "create")
            except AlreadyExistsError:
                # After a lost answer the object may be our own; its content tells.
                if tries == 1 or bytes(obstore.get(self.store, path).bytes()) != data:
                    raise

        self._ask(key, put, writing=True)

    def exists(self, key: str) -> bool:
        try:
            self._ask(key, lambda path: obstore.head(self.store, path))
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Iterator[str]:
        found = self._ask(prefix, lambda path: obstore.list(self.store, path or None).collect())
        start = len(self.prefix) + 1 if self.prefix else 0
        folders = {self._path(prefix), *_folders(entry["path"] for entry in found)}
        # An empty object in a folder's place is the mark by which consoles make a folder.
        return (entry["path"][start:] for entry in found if entry["size"] or entry["path"] not in folders)

    def stamps(self, folder: str) -> dict[str, FileStamp]:
        found = self._ask(folder, lambda path: obstore.list_with_delimiter(self.store, path or None))["objects"]
        return {
            str(entry["path"]).rsplit("/", 1)[-1]: FileStamp(int(entry["size"]), str(entry["e_tag"])) for entry in found
        }

    def delete(self, key: str) -> None:
        self._ask(key, lambda path: obstore.delete(self.store, path), writing=True)

    def delete_tree(self, prefix: str) -> None:
        keys = [self._path(key) for key in self.list(prefix)]
        for start in range(0, len(keys), 1000):
            part = keys[start : start + 1000]
            self._ask(prefix, lambda _, part=part: obstore.delete(self.store, part), writing=True)

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        options: dict[str, object] = {}
        if self.endpoint:
            scheme, _, host = self.endpoint.rstrip("/").rpartition("://")
            options = {"endpoint_override": host, "scheme": scheme or "https"}
        file_system = pyarrow.fs.S3FileSystem(region=self.region, connect_timeout=5, request_timeout=120, **options)
        return file_system, f"{self.bucket}/{self.prefix}".rstrip("/")

    def _path(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key) if part)

    def _uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._path(key) if key else self.prefix}".rstrip("/")

    def _put(self, path: str, data: bytes, mode: str) -> None:
        large = len(data) > SINGLE_PUT_BYTES and mode == "overwrite"
        obstore.put(self.store, path, data, mode=mode, use_multipart=large)  # pyright: ignore[reportArgumentType]

    def _ask(self, key: str, request: Callable[[str], T], *, writing: bool = False) -> T:
        """Send one request; repeat it while the server is away, at most ``retry_seconds``.

        Parameters
        ----------
        writing : it needs no object: "not found" then is said by no object storage, or of its bucket.
        """
        if _opened_by.setdefault("pid", os.getpid()) != os.getpid():
            raise RuntimeError("object storage was opened before this process was forked; start processes with spawn")
        path, pause, deadline = self._path(key), 0.1, time.monotonic() + self.retry_seconds
        while True:
            try:
                return request(path)
            except AlreadyExistsError as error:
                raise FileExistsError(self._uri(key)) from error
            except FileNotFoundError as error:
                if writing or "NoSuchBucket" in str(error):
                    raise self._refusal(key, str(error)) from None
                raise FileNotFoundError(self._uri(key)) from None
            except BaseError as error:
                text = str(error)
                here = isinstance(error, PermissionDeniedError | UnauthenticatedError | InvalidPathError)
                away = not here and not re.search(r"status code: (3|4(?!29|08))|\(code: ", text)
                if not away or time.monotonic() + pause > deadline:
                    raise self._refusal(key, text) from error
            except BaseException as error:
                if type(error).__name__ != "PanicException":  # of obstore; it is no Exception and has no module
                    raise
                raise StudyError(
                    f"no request can be made of what the environment says: {error}",
                    where=self._uri(key),
                    remedy="look at its AWS_ variables: one holds what is no address, path or name",
                ) from None
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def _refusal(self, key: str, text: str) -> StudyError:
        server = self.endpoint or "AWS"
        code = (
            re.search(r"<Code>(\w+)</Code>|\(code: (\w+)\)", text) or re.search(r"status code: (\d+)", text)
        ) or None
        answer = next(group for group in code.groups() if group) if code else ""
        if answer in {"SignatureDoesNotMatch", "InvalidAccessKeyId", "401", "ExpiredToken", "InvalidToken"}:
            what = f"the object storage refuses the credentials ({answer})"
            remedy = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN)"
        elif answer == "NoSuchBucket":
            what = f"there is no bucket {self.bucket!r} on {server}"
            remedy = "create the bucket, or correct its name or AWS_ENDPOINT_URL"
        elif answer in {"AccessDenied", "403"}:
            what = f"the object storage denies the access ({answer})"
            remedy = f"check the secret, and that the key may read and write in the bucket {self.bucket!r}"
        elif answer in {"InternalError", "SlowDown", "ServiceUnavailable"} or answer.startswith("5"):
            what = f"the object storage fails ({answer}), also after {self.retry_seconds:.0f} s"
            remedy = "look at the server (full disk, overload); nothing is lost, run the same command again"
        elif no_path := re.search(r'invalid path: .*?Path "(.*?)"', text):
            what = f"an object here has a name that is no path: {no_path.group(1)[:200]!r}"
            remedy = "rename or delete this object, or give a folder without it"
        elif answer:
            what = f"the object storage refuses the request ({answer})"
            remedy = "check the bucket's name, AWS_REGION and AWS_ENDPOINT_URL"
        else:
            what = f"no answer from {server} within {self.retry_seconds:.0f} s"
            remedy = "start the server or correct AWS_ENDPOINT_URL; nothing is lost, run the same command again"
        return StudyError(what, where=self._uri(key), remedy=remedy)


def _check_environment(where: str) -> None:
    """Refuse what no request can be made of: obstore would panic, which is no Exception.

    Raises
    ------
    StudyError : names the variable; its value only where it holds no secret.
    """
    if os.environ.get("AWS_ENDPOINT_URL_S3") == "":  # which obstore would take, as no other variable
        raise StudyError("AWS_ENDPOINT_URL_S3 is set, but empty", where=where, remedy="unset AWS_ENDPOINT_URL_S3")
    name, server = _first_set("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")  # obstore reads the last one
    if server and not _is_server(server):
        shown = "" if "@" in server or "?" in server else f" {server!r}"
        remedy = f"{name}=http://HOST:PORT or https://HOST, without a name and a password"
        raise StudyError(f"{name}{shown} is no address of a server", where=where, remedy=remedy)
    name, region = _first_set("AWS_REGION", "AWS_DEFAULT_REGION")
    if region and not REGION.fullmatch(region):
        remedy = f"{name}=us-east-1, or what the server calls its region"
        raise StudyError(f"{name} {region!r} is no name of a region", where=where, remedy=remedy)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"):
        if any(ord(c) < 32 or ord(c) == 127 for c in os.environ.get(name, "")):
            raise StudyError(
                f"{name} holds a line break or another control character",
                where=where,
                remedy=f"set {name} again without it; it often comes along when a file is copied",
            )


def _first_set(*names: str) -> tuple[str, str]:
    """Return the variable that counts, and its value: the first one that is set."""
    return next(((name, os.environ[name]) for name in names if os.environ.get(name)), (names[0], ""))


def _is_server(server: str) -> bool:
    try:
        return bool(SERVER.fullmatch(server)) and bool(HTTPStore(server))  # it parses as the requests do, and says so
    except ValueError:
        return False


def _folders(keys: Iterable[str]) -> set[str]:
    """Return every folder that one of the keys lies in."""
    found: set[str] = set()
    for key in keys:
        while (key := key.rpartition("/")[0]) and key not in found:
            found.add(key)
    return found
