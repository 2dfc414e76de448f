"""The explanation: which pixels made a prototype's score."""

from raystudy.relevance.class_maps import TopImages, UniquePrototype, class_map, top_images, unique_prototypes
from raystudy.relevance.heatmaps import (
    crop_box,
    overlay_activation,
    overlay_relevance,
    scale_activation,
    scale_relevance,
    upsample_activation,
)
from raystudy.relevance.prp import PrototypeExplainer, Relevance, prototype_relevance
from raystudy.relevance.rules import RULE_SETS
from raystudy.relevance.specificity import Specificity, measure_specificity, pool_specificity

__all__ = [
    "RULE_SETS",
    "PrototypeExplainer",
    "Relevance",
    "Specificity",
    "TopImages",
    "UniquePrototype",
    "class_map",
    "crop_box",
    "measure_specificity",
    "overlay_activation",
    "overlay_relevance",
    "pool_specificity",
    "prototype_relevance",
    "scale_activation",
    "scale_relevance",
    "top_images",
    "unique_prototypes",
    "upsample_activation",
]
