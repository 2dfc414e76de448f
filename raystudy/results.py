"""What a finished trial or explanation left, read only with its checksums; light, without torch.

result.json and done.json are sealed: they carry the SHA-256 of the files beside them and of themselves, so that a torn
tail or a flipped bit is named and never believed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raystudy.errors import DamagedFileError, StudyError
from raystudy.storage import Storage, json_bytes

RESULT_SCHEMA = 1
SPEC, RESULT, DONE = "spec.json", "result.json", "done.json"
MODEL, PROTOTYPES, PREDICTIONS = "model.safetensors", "prototypes.parquet", "predictions.parquet"
REMEDIES = {
    RESULT: "delete result.json of this trial and run again: the trial is then trained anew",
    DONE: "run the study again: the explanation is then made anew",
}


def write_sealed(storage: Storage, path: str, body: Mapping[str, Any], files: Iterable[str]) -> None:
    """Write a JSON file that carries the checksums of ``files`` beside it and of itself."""
    sums = {name: hashlib.sha256(storage.read_bytes(name)).hexdigest() for name in files}
    storage.write_json(path, _with_checksum({**body, "sha256": sums}))


def create_sealed(storage: Storage, path: str, body: Mapping[str, Any]) -> bool:
    """Write a sealed file that speaks of no others unless it is there; of several callers exactly one gets True."""
    return storage.create_exclusive(path, json_bytes(_with_checksum({**body, "sha256": {}})))


def read_sealed(storage: Storage, path: str) -> dict[str, Any] | None:
    """Return a sealed file with its checksum, or None when there is none.

    Raises
    ------
    DamagedFileError : it is damaged.
    """
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        return open_sealed(data)
    except ValueError as error:
        made = "the trial is then trained" if path == RESULT else "it is then made"
        remedy = f"delete this file and run again: {made} anew"
        raise DamagedFileError(f"the result is damaged: {error}", where=storage.address(path), remedy=remedy) from error


def open_sealed(data: bytes) -> dict[str, Any]:
    """Return the content of a sealed file, its checksum included.

    Raises
    ------
    ValueError : it is not what was written.
    """
    try:
        body = json.loads(data)
        checksum = body.pop("checksum")
        whole = checksum == _checksum(body) and data == json_bytes({**body, "checksum": checksum})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no sealed file ({error})") from error
    if not whole:
        raise ValueError("it does not match its checksum")
    return {**body, "checksum": checksum}


def read_result(storage: Storage) -> dict[str, Any] | None:
    """Return result.json of a trial's directory, or None when the trial is not finished.

    Raises
    ------
    StudyError : the file is damaged, or from a newer raystudy.
    """
    result = read_sealed(storage, RESULT)
    if result is not None and int(result["schema"]) > RESULT_SCHEMA:
        raise StudyError(
            "this result was written by a newer raystudy",
            where=storage.address(RESULT),
            remedy="install the newer raystudy",
        )
    return result


@dataclass(frozen=True)
class SealedStorage(Storage):
    """The directory of a finished trial or explanation: what it hands out are the bytes that were written."""

    seal: str = RESULT

    @cached_property
    def _sums(self) -> dict[str, str]:
        sealed = read_sealed(self, self.seal)
        return dict(sealed["sha256"]) if sealed else {}

    def read_bytes(self, path: str) -> bytes:
        """Read a file.

        Raises
        ------
        DamagedFileError : it does not match its checksum.
        """
        data = super().read_bytes(path)
        if path == self.seal or path not in self._sums:
            return data
        if hashlib.sha256(data).hexdigest() != self._sums[path]:
            what = "the file does not match its checksum"
            raise DamagedFileError(what, where=self.address(path), remedy=REMEDIES[self.seal])
        return data


def sealed(storage: Storage, seal: str = RESULT) -> SealedStorage:
    """Return a finished directory whose files are checked when they are read."""
    return SealedStorage(storage.uri, storage.retry_seconds, seal)


def damaged_files(storage: Storage, seal: str = RESULT, left_out: Iterable[str] = ()) -> list[str]:
    """Return the files that are missing or do not match the seal beside them."""
    damaged: list[str] = []
    for name, sha256 in (read_sealed(storage, seal) or {"sha256": {}})["sha256"].items():
        if name in left_out:
            continue
        try:
            whole = hashlib.sha256(storage.read_bytes(name)).hexdigest() == sha256
        except FileNotFoundError:
            whole = False
        if not whole:
            damaged.append(name)
    return damaged


def _with_checksum(body: Mapping[str, Any]) -> dict[str, Any]:
    return {**body, "checksum": _checksum(body)}


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()
