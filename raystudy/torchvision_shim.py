"""The one door to torchvision: ``from raystudy.torchvision_shim import torchvision``.

PyPI's torchvision wheel is linked against CUDA.  Beside a CPU-only torch its compiled operators do not load and the
import dies because the operator ``torchvision::nms`` has no schema.  Declaring that schema is enough for models and
transforms.  Beside a matching torch this module does nothing but import.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_kept_alive: list[torch.library.Library] = []  # a Library deregisters its schemas when it is collected


def _import_torchvision() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept_alive.append(library)
    return importlib.import_module("torchvision")


torchvision = _import_torchvision()
models = importlib.import_module("torchvision.models")
