"""What an experiment file may say about the network and its training; defaults are the paper's (method.md a.3, a.7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def _require(ok: bool, rule: str) -> None:
    if not ok:
        raise ValueError(rule)


@dataclass(frozen=True)
class ModelSettings:
    """The ProtoPNet (method.md a.1).

    ``weights``: ``none`` (random initialisation), ``imagenet`` (torchvision's file, fetched before any trial starts) or
    the path of a safetensors file with torchvision's names.  ``backbone_layers=3`` leaves layer4 out (stride 16).
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, never changed)

    backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet34"
    weights: str = "imagenet"
    prototypes_per_class: int = 10
    prototype_dim: int = 128
    backbone_layers: int = 4

    def __post_init__(self) -> None:
        _require(1 <= self.prototypes_per_class <= 1000, "prototypes_per_class must lie in 1..1000")
        _require(1 <= self.prototype_dim <= 4096, "prototype_dim must lie in 1..4096")
        _require(1 <= self.backbone_layers <= 4, "backbone_layers must be 1, 2, 3 or 4")

    @property
    def stride(self) -> int:
        """Pixels a side of one cell of the feature grid."""
        return 4 * 2 ** (self.backbone_layers - 1)


@dataclass(frozen=True)
class TrainingSettings:
    """Schedule, optimisers and losses of the three stages (method.md a.2, a.3, a.7)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    epochs: int = 50  # warm epochs included
    warm_epochs: int = 5
    projection_interval: int = 10  # project after every so many completed epochs
    projection_offset: int = 0  # 1: after 11, 21, … epochs, as the published code
    last_layer_epochs: int = 20
    last_layer_stages: Literal["each", "last"] = "each"  # after each projection, or after the last alone
    batch_size: int = 80
    evaluation_batch_size: int = 100
    lr_backbone: float = 1e-4
    lr_add_on: float = 3e-3
    lr_prototypes: float = 3e-3
    lr_warm_add_on: float = 3e-3
    lr_warm_prototypes: float = 3e-3
    lr_last_layer: float = 1e-4
    weight_decay: float = 1e-3  # backbone and add-on; none on prototypes and last layer
    schedule: Literal["step", "cosine", "constant"] = "step"  # of the joint stage
    step_epochs: int = 5
    step_gamma: float = 0.1
    coefficient_cross_entropy: float = 1.0
    coefficient_cluster: float = 0.8
    coefficient_separation: float = -0.08
    coefficient_l1: float = 1e-4
    last_layer_bn: Literal["frozen", "published"] = "frozen"
    selection: Literal["projected"] = "projected"
    augmentation: Literal["none", "published"] = "none"
    precision: Literal["float32", "bf16"] = "float32"  # of the backbone in warm and joint training
    threads: int = 1
    checkpoint_share: float = 0.05  # of the trial's time, at most
    deterministic: bool = False  # GPU only: bit-exact resume at the price of speed

    def __post_init__(self) -> None:
        _require(1 <= self.epochs <= 100_000, "epochs must lie in 1..100000")
        _require(0 <= self.warm_epochs <= self.epochs, "warm_epochs must lie in 0..epochs")
        _require(self.projection_interval >= 1, "projection_interval must be at least 1")
        _require(
            self.projection_offset + self.projection_interval <= self.epochs,
            "no projection would ever happen: projection_offset + projection_interval must not exceed epochs",
        )
        _require(0 <= self.last_layer_epochs <= 100_000, "last_layer_epochs must lie in 0..100000")
        _require(2 <= self.batch_size <= 100_000, "batch_size must lie in 2..100000 (batch norm needs two films)")
        _require(1 <= self.evaluation_batch_size <= 100_000, "evaluation_batch_size must lie in 1..100000")
        rates = (self.lr_backbone, self.lr_add_on, self.lr_prototypes, self.lr_warm_add_on, self.lr_warm_prototypes)
        _require(all(0 < r <= 1e30 for r in (*rates, self.lr_last_layer)), "learning rates must lie in (0, 1e30]")
        _require(0 <= self.weight_decay <= 1e30, "weight_decay must lie in 0..1e30")
        terms = (self.coefficient_cross_entropy, self.coefficient_cluster, self.coefficient_separation)
        _require(all(abs(c) <= 1e30 for c in (*terms, self.coefficient_l1)), "coefficients must lie in -1e30..1e30")
        _require(1 <= self.step_epochs <= 100_000, "step_epochs must lie in 1..100000")
        _require(0 < self.step_gamma <= 1, "step_gamma must lie in (0, 1]")
        _require(1 <= self.threads <= 128, "threads must lie in 1..128")
        _require(0 < self.checkpoint_share <= 1, "checkpoint_share must lie in (0, 1]")
