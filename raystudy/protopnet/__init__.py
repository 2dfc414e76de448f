"""The network: ProtoPNet, its losses, its stages and the projection of its prototypes (method.md a)."""

from raystudy.protopnet.model import ProtoPNet, ProtoPNetOutput
from raystudy.protopnet.projection import ProjectionRecord, project_prototypes

__all__ = ["ProjectionRecord", "ProtoPNet", "ProtoPNetOutput", "project_prototypes"]
