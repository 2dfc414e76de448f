"""The network: ProtoPNet, its losses, its stages and the projection of its prototypes (method.md a).

Torch is loaded when a name is first asked for: reading an experiment file needs `settings` alone, and that at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raystudy.protopnet.model import ProtoPNet, ProtoPNetOutput
    from raystudy.protopnet.projection import ProjectionRecord, project_prototypes

_HOMES = {
    "ProtoPNet": "model",
    "ProtoPNetOutput": "model",
    "ProjectionRecord": "projection",
    "project_prototypes": "projection",
}
__all__ = ["ProjectionRecord", "ProtoPNet", "ProtoPNetOutput", "project_prototypes"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
