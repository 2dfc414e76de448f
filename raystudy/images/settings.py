"""What an experiment file may say about pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raystudy.errors import check_setting


@dataclass(frozen=True)
class ImageSettings:
    """Decoding and resizing of the originals into the image store.

    ``resize``: ``squash`` to a square as published (aspect not kept) or ``letterbox``.  ``pixel_cap`` is checked on the
    header, before decoding.  ``unreadable``: ``fail`` stops the study with the quarantine list, ``drop`` leaves the
    images, and rows whose image id repeats, out and repeats the have/need check.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, never changed)

    size: int = 224
    resize: Literal["squash", "letterbox"] = "squash"
    unreadable: Literal["fail", "drop"] = "fail"
    pixel_cap: int = 100_000_000
    node_memory_share: float = 0.3  # beyond this share of a node's memory the pixels are streamed

    def __post_init__(self) -> None:
        check_setting(self, "size", 32 <= self.size <= 2048, "must lie in 32..2048 pixels")
        check_setting(self, "pixel_cap", self.pixel_cap >= 1, "must be at least 1")
        check_setting(self, "node_memory_share", 0 < self.node_memory_share < 1, "must lie between 0 and 1")
