"""Reading a study directory: which trials there are, what state each is in, what came out.

The study directory is the truth (DESIGN.md rule 1).  Status, report and the MLflow mirror all read it through this
module; nothing here needs Ray, MLflow or torch.  Layout::

    experiment.yaml  plan.json  lock.json  cohorts/…  trials/<trial_id>/…  report/…
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from raystudy.errors import DamagedFileError, NewerStudyError, StudyError
from raystudy.images.array import ImageArray
from raystudy.images.store import FOLDER, form_of, load_pixels
from raystudy.lock import DRIVER, gone_from_here
from raystudy.results import open_sealed, read_result, read_sealed, write_sealed
from raystudy.storage import Storage, open_storage

# A trial that a search ended early is stopped.
State = Literal["waiting", "running", "interrupted", "failed", "diverged", "stopped", "finished"]
STATES: tuple[State, ...] = ("waiting", "running", "interrupted", "failed", "diverged", "stopped", "finished")
PLAN = "plan.json"
IMAGES = "images.json"
FORMAT_VERSION = 1  # of the study directory; raised when an older raystudy could no longer read it
SECTIONS = ("study_seed", "sources", "images", "model", "training", "explain", "notes")  # of experiment.yaml, as read
Lock = dict[str, Any] | None  # the record of a living driver's lock
HEARTBEAT_SECONDS = 60  # a driver that has not touched its lock for so long is taken for dead by `status` and `report`


@dataclass(frozen=True)
class TrialStatus:
    """Where one trial stands, from its files alone."""

    trial_id: str
    state: State
    stage: str = ""
    epoch: int = 0
    epochs: int = 0
    images_per_second: float | None = None
    seconds_left: float | None = None
    val_accuracy: float | None = None
    message: str = ""
    explained: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudyStatus:
    """All trials of a study; ``driver`` is the lock's record when a driver is alive."""

    study: str
    uri: str
    trials: tuple[TrialStatus, ...]
    driver: Lock = None
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float | None:
        """How long training goes on at the pace of the trials that run, explanations not counted; None: none tells."""
        paces = [t.seconds_left / (t.epochs - t.epoch) for t in self.trials if t.seconds_left and t.epochs > t.epoch]
        if not paces:
            return None
        running = [t for t in self.trials if t.state == "running"]
        usual = sum(t.epochs for t in running) / len(running)
        begun = sum(t.epochs - t.epoch for t in self.trials if t.state in ("running", "interrupted"))
        epochs = begun + usual * sum(t.state == "waiting" for t in self.trials)
        return epochs * sum(paces) / len(paces) / len(running)


class Study:
    """A study directory on local or object storage."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @classmethod
    def at(cls, storage_uri: str, name: str) -> Study:
        """Return the study `name` below the storage URI; it need not exist yet."""
        return cls(open_storage(storage_uri).child(name))

    @property
    def name(self) -> str:
        return self.storage.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def _root(self) -> Storage:
        """The storage that holds this study and the image store."""
        return Storage(self.storage.uri.rsplit("/", 1)[0], self.storage.retry_seconds)

    @property
    def _quick(self) -> Storage:
        """The same place for a first question: one that is away is not waited for long."""
        return Storage(self.storage.uri, min(self.storage.retry_seconds, 10.0))

    def require(self) -> Study:
        """Return self, or refuse: no such study, or one written by a newer raystudy."""
        try:
            self._plan(self._quick)
        except FileNotFoundError:
            if (driver := self.driver()) is not None:
                what, remedy = f"{driver['owner']} looks which films can be read, and then plans", "look again later"
            else:
                what, remedy = "there is no study here", "start it with `raystudy run EXPERIMENT`"
            raise StudyError(what, where=self.storage.uri, remedy=remedy) from None
        return self

    def refuse_newer(self) -> None:
        """Refuse a study that a newer raystudy wrote; none, or a damaged one, is no obstacle here.

        Raises
        ------
        StudyError : it was written by a newer raystudy.
        """
        with contextlib.suppress(FileNotFoundError, DamagedFileError):
            self._plan(self._quick)

    def plan(self) -> dict[str, Any]:
        """Return plan.json: format, study, tasks, axes and the ids of the trials that the experiment asks for."""
        return self._plan(self.storage)

    def _plan(self, storage: Storage) -> dict[str, Any]:
        data = storage.read_bytes(PLAN)
        version = _format_of(data)
        if version > FORMAT_VERSION:
            raise NewerStudyError(
                f"this study was written by a newer raystudy (format {version}, known {FORMAT_VERSION})",
                where=self.storage.uri,
                remedy="install the newer raystudy, or name another study",
            )
        try:
            return open_sealed(data)
        except ValueError as error:
            raise _damaged(self.storage, PLAN, str(error)) from None

    def experiment(self) -> dict[str, Any]:
        """Return the resolved experiment of the last run.

        Raises
        ------
        DamagedFileError : experiment.yaml is not there, or is not what a run writes.
        """
        try:
            tree = yaml.safe_load(self.storage.read_bytes("experiment.yaml"))
        except FileNotFoundError:
            raise _damaged(self.storage, "experiment.yaml", "it is missing") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise _damaged(self.storage, "experiment.yaml", "it is not valid YAML") from None
        missing = [k for k in SECTIONS if not isinstance(tree, dict) or k not in tree]
        if missing:
            raise _damaged(self.storage, "experiment.yaml", f"it lacks {', '.join(missing)}")
        return tree

    def trial(self, trial_id: str) -> Storage:
        """Return the directory of one trial."""
        return self.storage.child("trials", trial_id)

    def trial_ids(self) -> list[str]:
        """Return the trials of the current plan, in its order."""
        return list(self.plan()["trials"])

    def files(self) -> dict[str, set[str]]:
        """Return the files of every trial directory, by trial id, from one listing."""
        found: dict[str, set[str]] = {}
        for path in self.storage.list("trials"):
            trial_id, inside, name = path.removeprefix("trials/").partition("/")
            if inside:  # a file beside the trials is nobody's, such as a file browser's notes
                found.setdefault(trial_id, set()).add(name)
        return found

    def finished(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Yield (trial_id, spec, result) of every finished trial of the plan, diverged ones included."""
        files = self.files()
        ids = [t for t in self.trial_ids() if "result.json" in files.get(t, ())]
        with ThreadPoolExecutor(16) as pool:
            specs = pool.map(lambda t: self.trial(t).read_json("spec.json"), ids)
            results = pool.map(lambda t: read_result(self.trial(t)), ids)
            for trial_id, spec, result in zip(ids, specs, results, strict=True):
                if result is not None:
                    yield trial_id, spec | {k: v for k, v in result.items() if k in spec and k != "schema"}, result

    def frame(self, path: str) -> pd.DataFrame:
        """Read a Parquet file of the study directory."""
        return self.storage.read_table(path).to_pandas()

    def films(self, image_ids: list[str], size: int, axes: Mapping[str, object]) -> ImageArray:
        """Return decoded films of the study from the image store beside it, as a trial sees them.

        Parameters
        ----------
        size, axes : the trial's edge length in pixels and its axes, which may name how films are resized.

        Raises
        ------
        FileNotFoundError : the images of this study were never prepared in this form.
        """
        resize = axes.get("images.resize") or self.experiment()["images"]["resize"]
        for key in self.image_keys() or ():
            if form_of(key) == f"{resize}{size}":
                return load_pixels(self._root, key, image_ids)
        raise FileNotFoundError(f"no films of {size} px ({resize}) belong to {self.storage.uri}")

    def image_keys(self) -> list[str] | None:
        """Return the names of the study's films in the image store, or None when they were never prepared.

        Raises
        ------
        DamagedFileError : images.json, or what it names in the store, is not what was written.
        """
        kept = read_sealed(self.storage, IMAGES)
        if kept is None:
            return None
        for path, sha256 in kept["store"].items():
            if _sha256(self._root, path) != sha256:
                remedy = "run the study again: it is then written anew"
                raise DamagedFileError(
                    "the file is not what was written", where=self._root.address(path), remedy=remedy
                )
        return list(kept["keys"])

    def keep_image_keys(self, keys: Iterable[str]) -> None:
        """Write images.json: the names of the study's films in the image store, sealed with their tables."""
        wanted = sorted(keys)
        tables = [f"{FOLDER}/{key}/{name}" for key in wanted for name in ("index.parquet", "quarantine.parquet")]
        store = {path: _sha256(self._root, path) for path in tables}
        write_sealed(self.storage, IMAGES, {"keys": wanted, "store": store}, ())

    def driver(self) -> Lock:
        """Return the lock's record when a driver holds the study and has been heard of lately."""
        try:
            lock = dict(self.storage.read_json("lock.json"))
            silent = abs(time.time() - float(lock["heartbeat"]))  # a clock may have been set back
        except (FileNotFoundError, DamagedFileError, TypeError, ValueError, KeyError):
            return None
        if silent >= HEARTBEAT_SECONDS or lock.get("work", DRIVER) != DRIVER or gone_from_here(lock):
            return None
        return lock

    def status(self) -> StudyStatus:
        """Return the state of every trial of the plan."""
        files, driver, plan = self.files(), self.driver(), self.plan()
        ids, jobs = list(plan["trials"]), plan.get("explain", {})

        def look(trial_id: str) -> TrialStatus:
            return self._trial_status(trial_id, files.get(trial_id, set()), jobs.get(trial_id, {}), driver)

        with ThreadPoolExecutor(16) as pool:  # for storage that answers late; a local folder is quicker without
            trials = tuple(map(look, ids) if self.storage.is_local else pool.map(look, ids))
        counts = {state: sum(t.state == state for t in trials) for state in STATES}
        return StudyStatus(self.name, self.storage.uri, trials, driver, counts)

    def _trial_status(self, trial_id: str, names: set[str], jobs: Mapping[str, str], driver: Lock) -> TrialStatus:
        directory = self.trial(trial_id)
        explained = tuple(sorted(key for key in jobs.values() if f"explain/{key}/done.json" in names))
        if "result.json" in names:
            lacking = [f"explanation {job} failed: {said}" for job, said in failures(directory, names, jobs).items()]
            return _ended(trial_id, directory, explained, "; ".join(lacking))
        if "stopped.json" in names:
            mark = read_mark(directory, "stopped.json")
            return TrialStatus(trial_id, "stopped", epoch=int(mark["epoch"]), val_accuracy=float(mark["value"]))
        if failed := failures(directory, names, {}):
            return TrialStatus(trial_id, "failed", message=failed[""])
        events = directory.read_events("events") if any(n.split("/")[0] == "events" for n in names) else []
        events = [e for e in events if isinstance(e.get("event"), str) and isinstance(e.get("time"), int | float)]
        if not events:
            return TrialStatus(trial_id, "waiting")
        return _running(trial_id, events, driver)


def _format_of(data: bytes) -> int:
    """Return the format that a plan says it has; 0 where it says none."""
    try:
        version = json.loads(data)["format"]
    except (ValueError, KeyError, TypeError):
        return 0
    return version if isinstance(version, int) else 0


def _ended(trial_id: str, directory: Storage, explained: tuple[str, ...], message: str) -> TrialStatus:
    try:
        result = _outline(directory)
        if result["status"] == "diverged":
            return TrialStatus(trial_id, "diverged", message=str(result.get("reason", "loss is not finite")))
        accuracy = float(result["selected"]["val_accuracy"])
    except (KeyError, TypeError, AttributeError):
        read_result(directory)  # names it, with its remedy
        raise
    return TrialStatus(trial_id, "finished", "done", val_accuracy=accuracy, explained=explained, message=message)


def read_mark(directory: Storage, path: str) -> dict[str, Any]:
    """Return failed.json (``error``) of a trial or explanation, or stopped.json (``epoch``, ``value``) of a trial.

    Raises
    ------
    DamagedFileError : it is not what was written.
    """
    data = directory.read_bytes(path)
    wanted = {"failed.json": {"error"}, "stopped.json": {"epoch", "value"}}[path.rsplit("/", 1)[-1]]
    try:
        mark = json.loads(data)
        mark = open_sealed(data) if "checksum" in mark else mark  # an earlier raystudy wrote no seal
        whole = wanted <= mark.keys()
    except (ValueError, TypeError, AttributeError):
        mark, whole = {}, False
    if not whole:
        remedy = "delete this file and run again: a failed trial then goes on, a stopped one is marked anew"
        raise DamagedFileError("the file is damaged", where=directory.address(path), remedy=remedy)
    return mark


def failures(directory: Storage, names: set[str], jobs: Mapping[str, str]) -> dict[str, str]:
    """Return what failed of a trial that has these files, and why: ``""`` is its training, else an explanation job.

    Parameters
    ----------
    jobs : explanation job -> name of its folder, as the plan has them.

    Raises
    ------
    DamagedFileError : a mark is not what was written.
    """
    marks = {"": "failed.json"} if "result.json" not in names else {}
    marks |= {job: f"explain/{key}/failed.json" for job, key in jobs.items() if f"explain/{key}/done.json" not in names}
    found: dict[str, str] = {}
    for job, path in marks.items():
        if path in names:
            with contextlib.suppress(FileNotFoundError):  # it is tried again since the files were listed
                found[job] = str(read_mark(directory, path)["error"])
    return found


def _outline(directory: Storage) -> dict[str, Any]:
    """Return result.json without the long history of a trial: its keys are sorted, so that is what stands last."""
    data = directory.read_bytes("result.json")
    _, after, rest = data.rpartition(b'"n_train"')
    try:
        return json.loads(b"{" + after + rest)
    except ValueError:
        return directory.read_json("result.json")  # of another spelling, or damaged


def _running(trial_id: str, events: list[dict[str, Any]], driver: Lock) -> TrialStatus:
    def latest(key: str) -> float | None:
        return next((e[key] for e in reversed(events) if isinstance(e.get(key), int | float)), None)

    epoch, epochs = int(latest("epoch") or 0), int(latest("epochs") or 0)
    stage = next((e["stage"] for e in reversed(events) if isinstance(e.get("stage"), str)), "")
    last = events[-1]
    token = (driver or {}).get("token")
    lives = driver is not None and last.get("driver", token) == token  # its own trial, not that of an earlier one
    state: State = "running" if lives and last["event"] != "interrupted" else "interrupted"
    starts = [e for e in events if e["event"] in ("started", "resumed")]
    left = None
    if state == "running" and starts and epochs:
        first = starts[-1].get("epoch")
        done = epoch - (int(first) if isinstance(first, int | float) else 0)
        spent = events[-1]["time"] - starts[-1]["time"]
        left = spent / done * (epochs - epoch) if done > 0 and spent > 0 else None
    return TrialStatus(
        trial_id,
        state,
        stage,
        epoch,
        epochs,
        latest("images_per_second"),
        left,
        latest("val_accuracy"),
    )


def _sha256(storage: Storage, path: str) -> str:
    try:
        return hashlib.sha256(storage.read_bytes(path)).hexdigest()
    except FileNotFoundError:
        return ""


def parquet_bytes(frame: pd.DataFrame, schema: pa.Schema | None = None) -> bytes:
    """Return deterministic Parquet bytes of a frame: no index, no pandas metadata."""
    table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False).replace_schema_metadata(None)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _damaged(storage: Storage, name: str, why: str) -> DamagedFileError:
    return DamagedFileError(
        f"the file is damaged: {why}",
        where=storage.address(name),
        remedy="`raystudy run EXPERIMENT` writes it again; what is done stays done",
    )
