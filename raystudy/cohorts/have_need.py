"""The refusal of a study whose cells hold too few films: have, need, and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raystudy.cohorts.settings import CohortSettings, TaskSettings
from raystudy.errors import StudyError

CLASS_NAMES = {1: "positive", 0: "negative"}


@dataclass(frozen=True)
class Cell:
    """Films of one task, cohort seed, split, source and class: there are ``have``, some mixture takes ``need``."""

    task: str
    cohort_seed: int
    split: str
    source: str
    label: int
    have: int
    need: int
    patients: int  # among the films that may be taken

    @property
    def short(self) -> bool:
        return self.have < self.need


def refuse_shortage(cells: Sequence[Cell], cohort: CohortSettings, tasks: Mapping[str, TaskSettings]) -> None:
    """Raise a StudyError with the have/need table if some cell is short."""
    short = [cell for cell in cells if cell.short]
    if not short:
        return
    first = [c for c in cells if (c.task, c.cohort_seed) == (short[0].task, short[0].cohort_seed)]
    others = sorted({c.task for c in short} - {short[0].task})
    worst = "; ".join(
        f"{c.split} {c.source} {CLASS_NAMES[c.label]}: have {c.have}, need {c.need}" for c in first if c.short
    )
    text = f"task {short[0].task} has too few films: {worst}\n{have_need_table(first)}"
    if others:
        text += f"\n(too few as well in task {', '.join(others)})"
    raise StudyError(text, where="cohort", remedy="; or ".join(_remedies(short, first, cohort, tasks)))


def have_need_table(cells: Sequence[Cell]) -> str:
    """Return the table of have and need as aligned text."""
    rows = [("split", "source", "class", "have", "need", "")]
    rows += [
        (c.split, c.source, CLASS_NAMES[c.label], str(c.have), str(c.need), "<- too few" if c.short else "")
        for c in cells
    ]
    widths = [max(len(row[k]) for row in rows) for k in range(6)]
    return "\n".join(
        "    "
        + "  ".join(t.rjust(w) if k in (3, 4) else t.ljust(w) for k, (t, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ).replace(" \n", "\n")


def _remedies(
    short: Sequence[Cell], first: Sequence[Cell], cohort: CohortSettings, tasks: Mapping[str, TaskSettings]
) -> list[str]:
    remedies: list[str] = []
    if cohort.h2_test == "official_valid" and any(c.split == "test" for c in short):
        remedies.append("cohort.h2_test: holdout (test films from CheXpert's train.csv, patient-wise)")
    for split in dict.fromkeys(c.split for c in short):
        possible = min(c.have for c in first if c.split == split)
        if possible and cohort.wanted(split) is not None:
            remedies.append(f"cohort.{split}: {possible}")
    if all(c.have for c in short) and not cohort.shrink:
        remedies.append("cohort.shrink: true (both sources give what the smallest cell holds)")
    empty = [c for c in short if not c.have]
    for cell in empty[:1]:
        if cell.label == 0 and tasks[cell.task].positive != "any_pathology":
            policy = tasks[cell.task].negatives_for(cell.source)
            remedies.append(
                f"another policy than {policy}: tasks.{cell.task}.negatives, for example {{{cell.source}: no_finding}}"
            )
        else:
            remedies.append(f"a source with {CLASS_NAMES[cell.label]} {cell.split} films for task {cell.task}")
    return remedies or ["larger sources"]
