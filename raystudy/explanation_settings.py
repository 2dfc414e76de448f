"""What an experiment file may say about explanations (method.md b, c, d); the defaults follow the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raystudy.errors import check_setting


@dataclass(frozen=True)
class ExplainSettings:
    """PRP maps, AD/AI, class maps and top-k images of a finished trial.

    ``adai_images`` bounds the test images of AD/AI (None: all, as the paper); the first so many of a seeded order.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, never changed)

    enabled: bool = True
    rule: Literal["published", "separating"] = "published"
    l2_power: int = 2
    l2_eps: float = 1e-12
    prp_scale: Literal["unit", "score"] = "unit"
    precision: Literal["float32", "bf16"] = "float32"
    adai_images: int | None = None
    adai_draws: int = 1
    mask_share: float = 0.5
    ranking: Literal["signed", "absolute"] = "signed"  # of what is masked first
    noise: Literal["grey", "per_channel"] = "grey"
    upsampling: Literal["cubic", "bilinear"] = "cubic"
    top_k: int = 4
    superposition: Literal["displayed_mean", "unit_sum", "multiplicity", "score", "maximum"] = "displayed_mean"

    def __post_init__(self) -> None:
        some = self.adai_images is None or self.adai_images >= 1
        check_setting(self, "l2_power", self.l2_power in (2, 4), "must be 2 or 4")
        check_setting(self, "l2_eps", 0 < self.l2_eps < float("inf"), "must be positive and finite")
        check_setting(self, "adai_images", some, "must be at least 1, or null for all")
        check_setting(self, "adai_draws", 1 <= self.adai_draws <= 10_000, "must lie in 1..10000")
        check_setting(self, "mask_share", 0.01 <= self.mask_share <= 0.99, "must lie in 0.01..0.99")
        check_setting(self, "top_k", 1 <= self.top_k <= 1000, "must lie in 1..1000")
