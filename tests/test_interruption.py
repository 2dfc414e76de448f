"""Ctrl-C that is kept until a block ends."""

import signal
from collections.abc import Iterator

import pytest

from raystudy.interruption import ctrl_c_kept


@pytest.fixture(autouse=True)
def pythons_own_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(steps: list[str], *, at_once: bool) -> None:
    """Press Ctrl-C in the middle of work that discards interruptions."""
    with ctrl_c_kept(at_once=at_once):
        try:
            signal.raise_signal(signal.SIGINT)
            steps.append("not cut")
        except KeyboardInterrupt:
            steps.append("cut")
        steps.append("discarded")
    steps.append("went on")


@pytest.mark.parametrize(("at_once", "middle"), [(True, "cut"), (False, "not cut")])
def test_ctrl_c_ends_a_block_that_discards_it(at_once: bool, middle: str) -> None:
    steps: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt(steps, at_once=at_once)
    assert steps == [middle, "discarded"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_ctrl_c_and_under_another_handler_nothing_changes() -> None:
    with ctrl_c_kept(at_once=True):
        pass
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    steps: list[str] = []
    interrupt(steps, at_once=True)
    assert steps == ["not cut", "discarded", "went on"]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
