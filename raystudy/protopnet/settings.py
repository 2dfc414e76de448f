"""What an experiment file may say about the network and its training; defaults are the paper's (method.md a.3, a.7)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from raystudy.errors import check_setting


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
        check_setting(self, "prototypes_per_class", 1 <= self.prototypes_per_class <= 1000, "must lie in 1..1000")
        check_setting(self, "prototype_dim", 1 <= self.prototype_dim <= 4096, "must lie in 1..4096")
        check_setting(self, "backbone_layers", 1 <= self.backbone_layers <= 4, "must be 1, 2, 3 or 4")

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
        check_setting(self, "epochs", 1 <= self.epochs <= 100_000, "must lie in 1..100000")
        warm = f"must lie in 0..epochs = {self.epochs}"
        check_setting(self, "warm_epochs", 0 <= self.warm_epochs <= self.epochs, warm)
        check_setting(self, "projection_interval", self.projection_interval >= 1, "must be at least 1")
        first, room = self.projection_offset + self.projection_interval, self.epochs - self.projection_offset
        other = f"interval to at most {room}" if room >= 1 else f"offset below {self.epochs} and the interval to fit"
        rule = f"must be at least {first}, else no projection would ever happen (or set training.projection_{other})"
        check_setting(self, "epochs", first <= self.epochs, rule)
        check_setting(self, "last_layer_epochs", 0 <= self.last_layer_epochs <= 100_000, "must lie in 0..100000")
        two = "must lie in 2..100000 (batch norm needs two films)"
        check_setting(self, "batch_size", 2 <= self.batch_size <= 100_000, two)
        some = 1 <= self.evaluation_batch_size <= 100_000
        check_setting(self, "evaluation_batch_size", some, "must lie in 1..100000")
        for key in [f.name for f in fields(self) if f.name.startswith("lr_")]:
            check_setting(self, key, 0 < getattr(self, key) <= 1e30, "must lie in (0, 1e30]")
        check_setting(self, "weight_decay", 0 <= self.weight_decay <= 1e30, "must lie in 0..1e30")
        for key in [f.name for f in fields(self) if f.name.startswith("coefficient_")]:
            check_setting(self, key, abs(getattr(self, key)) <= 1e30, "must lie in -1e30..1e30")
        check_setting(self, "step_epochs", 1 <= self.step_epochs <= 100_000, "must lie in 1..100000")
        check_setting(self, "step_gamma", 0 < self.step_gamma <= 1, "must lie in (0, 1]")
        check_setting(self, "threads", 1 <= self.threads <= 128, "must lie in 1..128")
        check_setting(self, "checkpoint_share", 0 < self.checkpoint_share <= 1, "must lie in (0, 1]")
