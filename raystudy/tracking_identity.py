"""Which study this is: a random id, kept in its directory, that tells it in MLflow from others of the same name.

In flow the study directory and the tags of runs; out flow the id.  A directory that is copied or moved keeps it.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from raystudy.errors import DamagedFileError
from raystudy.results import create_sealed, read_sealed
from raystudy.storage import Storage

ID_FILE = "tracking/study.json"
ID, STUDY, TRIAL, STARTED = "raystudy.study_id", "raystudy.study", "raystudy.trial_id", "raystudy.started"  # tags
PARENT = "mlflow.parentRunId"


def study_id(storage: Storage, look: Callable[[], str | None]) -> str:
    """Return the id of a study, made the first time; of several makers all get the same.

    Where its file is lost or damaged the cursors know it, or else ``look``, which asks the store.
    """
    try:
        kept = read_sealed(storage, ID_FILE)
    except DamagedFileError:
        kept = None
        storage.delete(ID_FILE)
    if kept is None:
        made = {"id": next(_ids_of_cursors(storage), None) or look() or uuid.uuid4().hex}
        kept = made if create_sealed(storage, ID_FILE, made) else read_sealed(storage, ID_FILE) or made
    return str(kept["id"])


def _ids_of_cursors(storage: Storage) -> Iterator[str]:
    for path in storage.list("tracking"):
        with contextlib.suppress(DamagedFileError):
            cursor: dict[str, Any] = read_sealed(storage, path) or {}
            if "study" in cursor:  # an earlier raystudy wrote none
                yield str(cursor["study"])


def known_as(runs: Iterable[Mapping[str, str]], began: Mapping[str, int]) -> str | None:
    """Return the id under which runs with these tags have a study's trials already, None when there is none.

    Parameters
    ----------
    began : when the study's trials began, in ms.  All of them that a study of that id has must have begun just then.
    """
    starts: dict[str, dict[str, set[str]]] = {}
    for tags in runs:
        if tags.get(ID) and tags.get(STARTED):
            starts.setdefault(tags[ID], {}).setdefault(tags[TRIAL], set()).add(tags[STARTED])
    for known, trials in sorted(starts.items()):
        shared = trials.keys() & began.keys()
        if shared and all(str(began[t]) in trials[t] for t in shared):
            return known
    return None


def adopted(
    old: list[Any],
    mine: list[Any],
    sent: Mapping[str, Any],
    began: Mapping[str, int],
    failed_at: Callable[[str], int | None],
) -> list[Any]:
    """Return the runs of a study among those that an earlier raystudy made, which had no id.

    A trial's run began, or failed before it began, when that of this study did; the study's own is the parent of one.
    The cursor (``sent``) tells where the files do not.

    Parameters
    ----------
    mine : the runs that have the study's id.
    began, failed_at : when the study's trials did, in ms.
    """

    def fits(run: Any) -> bool:
        trial_id, started = run.data.tags.get(TRIAL, ""), run.data.tags.get(STARTED, "")
        told = sent.get(trial_id, {})
        if started:
            return started in (str(began.get(trial_id)), str(told.get("started")))
        return bool(trial_id) and (run.info.run_id == told.get("run") or run.info.start_time == failed_at(trial_id))

    trials = [run for run in old if fits(run)]
    if not all(run.data.tags.get(TRIAL) for run in mine):  # the study's own is there
        return trials
    told, parents = sent.get("", {}).get("run"), {run.data.tags.get(PARENT) for run in mine + trials}
    own = [r for r in old if not r.data.tags.get(TRIAL) and (r.info.run_id == told or r.info.run_id in parents)]
    return trials + sorted(own, key=lambda run: run.info.run_id != told)[:1]
