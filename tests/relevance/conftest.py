"""Golden vectors of the published code, where they are at hand."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from raystudy.protopnet import ProtoPNet
from tests.relevance.nets import from_weights

SHARED = Path(os.environ.get("RAYSTUDY_SHARED", Path(__file__).parents[3] / "shared"))


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SHARED / "golden" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # loader.py imports weights.py by this name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def published() -> Callable[[str], tuple[dict[str, Any], ProtoPNet, torch.Tensor]]:
    """Open a golden file: arrays, network and normalised images."""
    if not (SHARED / "golden" / "loader.py").is_file():
        pytest.skip("golden vectors of the published code are not at hand (RAYSTUDY_SHARED)")
    recipe, loader = _module("weights"), _module("loader")

    def open_file(name: str) -> tuple[dict[str, Any], ProtoPNet, torch.Tensor]:
        arrays, weights = loader.load(f"public_{name}.npz")
        net = from_weights(weights, str(arrays["arch"]))
        return arrays, net, torch.from_numpy(recipe.normalise(arrays["images_u8"]))

    return open_file
