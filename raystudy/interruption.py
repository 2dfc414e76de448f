"""Ctrl-C where an interruption in the middle is lost or does harm: it is noted, and answered at the end of a block."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ctrl_c_kept(*, at_once: bool) -> Iterator[None]:
    """Raise KeyboardInterrupt at the end of the block where Ctrl-C came during it.

    Parameters
    ----------
    at_once : raise it in the middle too, as Python does; the end is for one that Python discarded there.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else answers it
        return
    came = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        came.set()
        if at_once:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came.is_set():
            raise KeyboardInterrupt
