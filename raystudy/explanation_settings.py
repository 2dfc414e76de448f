"""What an experiment file may say about explanations (method.md b, c, d); the defaults follow the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
        checks = {
            "l2_power must be 2 or 4": self.l2_power in (2, 4),
            "l2_eps must be positive and finite": 0 < self.l2_eps < float("inf"),
            "adai_images must be at least 1, or null for all": self.adai_images is None or self.adai_images >= 1,
            "adai_draws must lie in 1..10000": 1 <= self.adai_draws <= 10_000,
            "mask_share must lie in 0.01..0.99": 0.01 <= self.mask_share <= 0.99,
            "top_k must lie in 1..1000": 1 <= self.top_k <= 1000,
        }
        for rule, ok in checks.items():
            if not ok:
                raise ValueError(rule)
