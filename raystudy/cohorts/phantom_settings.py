"""What an experiment file may say about a synthetic hospital (`kind: phantom`).

A phantom hospital is planted truth: every film's disease signs and burned-in text are drawn from a named stream, so
that masks of both can be had for any image id.  Two sources with different looks are two hospitals that can be told
apart; with the same look, or with ``tag_visibility``, ``collimation`` and ``gain`` at 0, nothing tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raystudy.errors import check_setting

SIGNS = ("Pneumonia", "Effusion", "Cardiomegaly", "Nodule", "Consolidation")
NO_FINDING = "No Finding"
LOOKS = ("north", "south")


@dataclass(frozen=True)
class PhantomSettings:
    """One synthetic hospital.

    ``look`` is the house style: the wording and the usual places of its text tag, its collimator and its gain curve.
    Strengths are factors of the usual strength: 0 takes the thing away.  ``sign_strength`` scales the opacity (and
    the heart's extra width) of disease signs; ``tag_visibility`` the brightness of the burned-in text.
    ``tag_association`` is the share of films that carry a tag among those with ``tag_finding`` minus the share among
    the others, so that 0 means that the tag says nothing about the disease within the hospital.  ``tag_share`` lies
    halfway between the two; it is the share among all films where ``tag_association`` is 0.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, never changed)

    look: Literal["north", "south"] = "north"
    patients: int = 600
    films_per_patient: int = 3  # a patient has 1 to so many films
    size: int = 192  # pixels a side of the originals
    seed: int = 0
    pneumonia_share: float = 0.34  # of the patients
    healthy_share: float = 0.33  # the rest has another pathology
    sign_strength: float = 1.0
    tag_visibility: float = 1.0
    tag_share: float = 1.0
    tag_association: float = 0.0
    tag_finding: Literal["Pneumonia", "Effusion", "Cardiomegaly", "Nodule", "Consolidation", "No Finding"] = "Pneumonia"
    collimation: float = 1.0
    gain: float = 1.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        findings = (*SIGNS, NO_FINDING)
        ill, well, apart = self.pneumonia_share, self.healthy_share, abs(self.tag_association) / 2
        check_setting(self, "look", self.look in LOOKS, f"must be one of {', '.join(LOOKS)}")
        check_setting(self, "tag_finding", self.tag_finding in findings, f"must be one of {', '.join(findings)}")
        check_setting(self, "patients", 1 <= self.patients <= 99_999, "must lie in 1..99999")
        check_setting(self, "films_per_patient", 1 <= self.films_per_patient <= 99, "must lie in 1..99")
        check_setting(self, "size", 64 <= self.size <= 2048, "must lie in 64..2048 pixels")
        check_setting(self, "seed", self.seed >= 0, "must not be negative")
        check_setting(self, "pneumonia_share", ill >= 0, "must not be negative")
        check_setting(self, "healthy_share", well >= 0, "must not be negative")
        check_setting(self, "pneumonia_share", ill + well <= 1, f"must add up to at most 1 with healthy_share = {well}")
        check_setting(self, "sign_strength", 0 <= self.sign_strength <= 3, "must lie in 0..3")
        check_setting(self, "tag_visibility", 0 <= self.tag_visibility <= 1, "must lie in 0..1")
        check_setting(self, "tag_share", 0 <= self.tag_share <= 1, "must lie in 0..1")
        check_setting(
            self,
            "tag_association",
            self.tag_share - apart >= 0 and self.tag_share + apart <= 1,
            f"tag_share ± tag_association / 2 must lie in 0..1 with tag_share = {self.tag_share}",
        )
        check_setting(self, "collimation", 0 <= self.collimation <= 2, "must lie in 0..2")
        check_setting(self, "gain", 0 <= self.gain <= 2, "must lie in 0..2")
        check_setting(self, "noise", 0 <= self.noise <= 5, "must lie in 0..5")
