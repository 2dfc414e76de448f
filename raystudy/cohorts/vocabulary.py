"""One vocabulary of findings for all hospitals.

In flow the spellings of NIH ChestX-ray14, CheXpert and any manifest; out flow one lower-case name each.  A row's
findings are kept as bits of an int64 until canonical rows are written, so that tables of some hundred thousand rows
are sorted into classes by a handful of vector operations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

NO_FINDING = "no_finding"
SUPPORT_DEVICES = "support_devices"

NIH_FINDINGS = (
    "atelectasis", "cardiomegaly", "consolidation", "edema", "effusion", "emphysema", "fibrosis", "hernia",
    "infiltration", "mass", "nodule", "pleural_thickening", "pneumonia", "pneumothorax",
)  # fmt: skip
CHEXPERT_FINDINGS = (
    "no_finding", "enlarged_cardiomediastinum", "cardiomegaly", "lung_opacity", "lung_lesion", "edema",
    "consolidation", "pneumonia", "atelectasis", "pneumothorax", "effusion", "pleural_other", "fracture",
    "support_devices",
)  # fmt: skip
OTHER = ("covid_19", "tuberculosis", "other_pathology")  # other_pathology: abnormal, without a name of its own

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys((NO_FINDING, SUPPORT_DEVICES, *NIH_FINDINGS, *CHEXPERT_FINDINGS, *OTHER))
)
PATHOLOGIES: tuple[str, ...] = tuple(f for f in VOCABULARY if f not in (NO_FINDING, SUPPORT_DEVICES))
BIT: dict[str, int] = {finding: 1 << place for place, finding in enumerate(VOCABULARY)}
ANY_PATHOLOGY: int = sum(BIT[f] for f in PATHOLOGIES)

_SYNONYMS = {
    "normal": NO_FINDING, "no_findings": NO_FINDING, "healthy": NO_FINDING, "support_device": SUPPORT_DEVICES,
    "pleural_effusion": "effusion", "oedema": "edema", "covid": "covid_19", "covid19": "covid_19",
    "opacity": "lung_opacity", "abnormal": "other_pathology", "tb": "tuberculosis",
}  # fmt: skip


def canonical_finding(spelling: str) -> str | None:
    """Return the vocabulary's name of a spelling, or None when it is not known.

    Case, spaces, hyphens and underscores do not matter: ``Pleural_Thickening``, ``pleural thickening``.
    """
    name = re.sub(r"[\s_\-/]+", "_", spelling.strip().lower()).strip("_")
    name = _SYNONYMS.get(name, name)
    return name if name in BIT else None


def bits(findings: Iterable[str]) -> int:
    """Return the bit mask of vocabulary names."""
    return sum({BIT[f] for f in findings})


def names(mask: int) -> list[str]:
    """Return the vocabulary names of a bit mask, in the vocabulary's order."""
    return [finding for finding, bit in BIT.items() if mask & bit]


def name_lists(masks: pd.Series) -> list[list[str]]:
    """Return the names of each row's mask; equal masks are spelled out once."""
    codes, unique = pd.factorize(masks.to_numpy(np.int64))
    spelled = [names(int(mask)) for mask in unique]
    return [spelled[code] for code in codes]


def parse_labels(
    texts: pd.Series, separator: str, mapping: Mapping[str, str | None]
) -> tuple[pd.Series, dict[str, list[str]]]:
    """Turn a column of joined labels into bit masks.

    Parameters
    ----------
    texts : strings such as ``Edema|Pneumonia``; empty means that nothing is marked.
    separator : between two labels.
    mapping : spellings that the vocabulary does not know; None means "not a finding".

    Returns
    -------
    masks : int64, one a row.
    unknown : for each text with unknown spellings, these spellings.
    """
    codes, unique = pd.factorize(texts.fillna("").astype(str))
    unknown: dict[str, list[str]] = {}
    values = np.zeros(len(unique), np.int64)
    for place, text in enumerate(unique):
        for part in filter(None, (p.strip() for p in str(text).split(separator))):
            finding = mapping[part] if part in mapping else canonical_finding(part)
            if finding is not None:
                values[place] |= BIT[finding]
            elif part not in mapping:
                unknown.setdefault(str(text), []).append(part)
    return pd.Series(values[codes], index=texts.index, dtype="int64"), unknown
