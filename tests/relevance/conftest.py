"""Golden vectors of the published code, where they are at hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.golden_vectors import Golden


@pytest.fixture(scope="session")
def published(golden: Callable[[str], Golden]) -> Callable[[str], Golden]:
    """Open a golden file: arrays, network and normalised images."""
    return golden
