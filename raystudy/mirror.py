"""The thread that keeps MLflow equal to a study directory while the study runs (see `raystudy.tracking`).

Nothing here can delay or fail a study: starting waits for nobody, and at the end a store that has fallen silent is left
behind; ``raystudy report EXPERIMENT --sync`` repairs it.
"""

from __future__ import annotations

import logging
import threading
import time
from urllib.parse import urlsplit

from raystudy.config import Tracking
from raystudy.errors import StudyError
from raystudy.study import Study
from raystudy.tracking import UNAVAILABLE, GivenUpError, Line, Store, first_line

INTERVAL_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 60.0  # between two attempts at a store that does not answer
SILENCE_SECONDS = {"http": 15.0, "https": 15.0}  # at the end of a study: so long without an answer, and it is left
SILENCE_OF_A_DATABASE = 60.0  # a new database is migrated first
CLOSING_SECONDS = 180.0

log = logging.getLogger("raystudy.tracking")


class Mirror:
    """Keeps an MLflow store equal to a study directory, from a thread of its own."""

    def __init__(self, study: Study, settings: Tracking, interval: float = INTERVAL_SECONDS) -> None:
        self.study, self.settings, self.interval = study, settings, interval
        self._line = Line()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Store | None = None
        self._complete = self._told = self._failed = False
        self._at_rest = True

    def start(self) -> None:
        """Mirror in the background until `close`."""
        self._thread = threading.Thread(target=self._loop, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def close(self, *, at_rest: bool = True) -> bool:
        """Send what is left; False when MLflow does not take it (repair: `raystudy report EXPERIMENT --sync`).

        Parameters
        ----------
        at_rest : nothing runs any more, so what is unfinished is shown as killed; not where another driver goes on.
        """
        self._at_rest = at_rest
        self._stop.set()
        if self._thread is None:
            self.start()
        assert self._thread is not None
        closing = self._line.heard = time.monotonic()
        silence = SILENCE_SECONDS.get(urlsplit(self.settings.uri).scheme, SILENCE_OF_A_DATABASE)
        while self._thread.is_alive():
            self._thread.join(0.1)
            now = time.monotonic()
            if now > self._line.heard + silence or now > closing + CLOSING_SECONDS:
                self._line.given_up.set()
                return False
        return self._complete

    def _loop(self) -> None:
        wait = 0.0
        while not self._stop.wait(wait):
            began = time.monotonic()
            if self._try(final=False):
                wait = max(self.interval, 2 * (time.monotonic() - began))
            else:
                wait = min(LONGEST_WAIT_SECONDS, 2 * max(wait, self.interval))
        if self._failed:
            self._store = None  # a run whose creation came late is found now
        self._complete = self._try(final=True)

    def _try(self, final: bool) -> bool:
        try:
            self._store = self._store or Store(self.study, self.settings, self._line)
            self._store.at_rest = final and self._at_rest
            self._store.sync(final)
        except GivenUpError:
            return False
        except (*UNAVAILABLE, StudyError) as error:
            self._store, self._failed = None, True  # look at it anew
            if not self._told and isinstance(error, StudyError):
                log.warning("the MLflow mirror waits (%s); training goes on", first_line(error))
            elif not self._told:
                log.warning("MLflow at %s does not answer (%s); training goes on", self.settings.uri, first_line(error))
            self._told = True
            return False
        self._told = False
        return True
