"""Fixtures that open the golden vectors of the published code, where they are at hand (RAYSTUDY_SHARED, ../shared)."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from raystudy.protopnet import ProtoPNet

SHARED = Path(os.environ.get("RAYSTUDY_SHARED", Path(__file__).parents[2] / "shared"))


class Golden(NamedTuple):
    """One golden file: its arrays, the network with its weights in eval mode, its normalised images (N, 3, H, W)."""

    arrays: dict[str, Any]
    model: ProtoPNet
    images: torch.Tensor


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared reference data, or a skip that names it."""
    if not (SHARED / "golden" / "loader.py").is_file():
        pytest.skip("golden vectors of the published code are not at hand (RAYSTUDY_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def golden_recipe(shared_dir: Path) -> ModuleType:
    """How the golden files' films and random numbers are made."""
    return _module(shared_dir / "golden" / "weights.py")


@pytest.fixture(scope="session")
def golden(shared_dir: Path, golden_recipe: ModuleType) -> Callable[[str], Golden]:
    """Return an opener of golden files by short name; a model that it gives is the caller's own."""
    recipe, loader = golden_recipe, _module(shared_dir / "golden" / "loader.py")
    opened: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def open_file(name: str) -> Golden:
        if name not in opened:
            opened[name] = loader.load(f"public_{name}.npz")
        arrays, weights = opened[name]
        prototypes, dim = weights["prototypes"].shape[:2]
        classes = len(weights["last_layer.weight"])
        model = ProtoPNet(str(arrays["arch"]), classes, prototypes // classes, dim)
        state = {key: torch.from_numpy(value.copy()) for key, value in weights.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        assert all(key.endswith("num_batches_tracked") for key in missing)
        return Golden(arrays, model.eval(), torch.from_numpy(recipe.normalise(arrays["images_u8"])))

    return open_file


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # loader.py imports weights.py by this name
    spec.loader.exec_module(module)
    return module
