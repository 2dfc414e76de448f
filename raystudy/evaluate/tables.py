"""The three tables of a study: accuracy, reliance, faithfulness (DESIGN.md, the study directory).

In: finished trials' tables, each with the key columns of its row (study, trial_id, task, h1_share, seed, cohort_seed,
axis.*).  Out: data frames with exactly those keys and the numbers, every number with its n and its 95 % interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from raystudy.evaluate.accuracy import score_test_sets
from raystudy.evaluate.arm import Arm, TrialPredictions, build_arm
from raystudy.evaluate.faithfulness import method_difference, summarise
from raystudy.evaluate.intervals import Interval, share_interval
from raystudy.evaluate.reliance import reliance

DIFFERENCE = "prp-protopnet"
TRIAL_KEYS = ("trial_id", "h1_share", "seed")  # what differs inside an arm


@dataclass(frozen=True)
class KeyedTable:
    """A trial's table (predictions or AD/AI pairs) with the key columns of its row."""

    keys: Mapping[str, object]
    table: pd.DataFrame

    @property
    def arm(self) -> tuple[tuple[str, object], ...]:
        """The keys that trials of one arm share."""
        return tuple((k, v) for k, v in self.keys.items() if k not in TRIAL_KEYS)


def arms(
    trials: Sequence[KeyedTable], study_seed: int, *, with_auroc: bool = False
) -> list[tuple[dict[str, object], Arm]]:
    """Group predictions into arms, in order of first appearance; the keys are those shared inside the arm."""
    groups: dict[tuple[tuple[str, object], ...], list[KeyedTable]] = {}
    for trial in trials:
        groups.setdefault(trial.arm, []).append(trial)
    return [
        (
            dict(keys),
            build_arm(
                [TrialPredictions(_int(t.keys["h1_share"]), _int(t.keys["seed"]), t.table) for t in members],
                study_seed,
                with_auroc=with_auroc,
            ),
        )
        for keys, members in groups.items()
    ]


def accuracy_table(trials: Sequence[KeyedTable], study_seed: int) -> pd.DataFrame:
    """Return one row per trial and test set; intervals are conditional on that training run."""
    of_arm = {tuple(keys.items()): arm for keys, arm in arms(trials, study_seed, with_auroc=True)}
    rows: list[dict[str, object]] = []
    for trial in trials:
        arm, seed = of_arm[trial.arm], _int(trial.keys["seed"])
        for test_set, score in score_test_sets(trial.table).items():
            cell = (_int(trial.keys["h1_share"]), test_set)
            accuracy = share_interval(arm.accuracy[cell].of((seed,)))
            area = share_interval(arm.auroc[cell].of((seed,))) if cell in arm.auroc else None
            row = {
                **trial.keys,
                "test_set": test_set,
                "n": score.n,
                "correct": score.correct,
                "accuracy": score.accuracy,
            }
            row |= {"accuracy_low": 100 * accuracy.low, "accuracy_high": 100 * accuracy.high, "auroc": score.auroc}
            row |= {"auroc_low": area.low if area else None, "auroc_high": area.high if area else None}
            rows.append(row)
    return pd.DataFrame(rows)


def mixture_table(trials: Sequence[KeyedTable], study_seed: int) -> pd.DataFrame:
    """Return one row per arm, mixture and test set: accuracy over seeds with its crossed interval (for the curves)."""
    rows: list[dict[str, object]] = []
    for keys, arm in arms(trials, study_seed):
        for (x, test_set), share in sorted(arm.accuracy.items()):
            value = share_interval(share)
            row = {**keys, "h1_share": x, "test_set": test_set, "seeds": value.seeds, "n": arm.images[x, test_set]}
            row |= {
                "accuracy": 100 * value.estimate,
                "accuracy_low": 100 * value.low,
                "accuracy_high": 100 * value.high,
            }
            rows.append({**row, "interval": value.label})
    return pd.DataFrame(rows)


def reliance_table(trials: Sequence[KeyedTable], study_seed: int) -> pd.DataFrame:
    """Return one row per arm and mixture: source reliance and skill with crossed intervals."""
    rows: list[dict[str, object]] = []
    for keys, arm in arms(trials, study_seed):
        for value in reliance(arm):
            row = {**keys, "h1_share": value.h1_share, "seeds": len(value.seeds)}
            row |= _interval("source_reliance", value.source_reliance) | _interval("skill", value.skill)
            rows.append({**row, "interval": value.skill.label})
    return pd.DataFrame(rows)


def faithfulness_table(trials: Sequence[KeyedTable], study_seed: int) -> pd.DataFrame:
    """Return one row per trial, test set and method from `pairs.parquet`; intervals over patients."""
    rows: list[dict[str, object]] = []
    for trial in trials:
        for test_set, pairs in trial.table.groupby("test_set", sort=True):
            for value in summarise([pairs], study_seed).values():
                row = {**trial.keys, "test_set": test_set, "method": value.method}
                row |= {"n_images": value.n_images, "n_pairs": value.n_pairs}
                row |= _interval("average_drop", value.average_drop)
                row |= _interval("average_increase", value.average_increase)
                row |= {"unique_average_drop": value.unique_average_drop}
                rows.append({**row, "unique_average_increase": value.unique_average_increase})
    return pd.DataFrame(rows)


def faithfulness_mixture_table(trials: Sequence[KeyedTable], study_seed: int) -> pd.DataFrame:
    """Return one row per arm, mixture, test set and method: AD and AI over seeds with their crossed intervals.

    The row of method ``DIFFERENCE`` holds PRP minus ProtoPNet in points, paired by film, noise and training run.
    """
    cells: dict[tuple[tuple[tuple[str, object], ...], int, str], list[pd.DataFrame]] = {}
    for trial in trials:
        for test_set, pairs in trial.table.groupby("test_set", sort=True):
            cells.setdefault((trial.arm, _int(trial.keys["h1_share"]), str(test_set)), []).append(pairs)
    rows: list[dict[str, object]] = []
    for (arm, x, test_set), runs in cells.items():
        for value in summarise(runs, study_seed).values():
            row: dict[str, object] = {**dict(arm), "h1_share": x, "test_set": test_set, "method": value.method}
            row |= {"seeds": len(runs), "n_images": value.n_images, "n_pairs": value.n_pairs}
            row |= _interval("average_drop", value.average_drop)
            row |= _interval("average_increase", value.average_increase)
            rows.append({**row, "interval": value.average_drop.label})
        if {"prp", "protopnet"} <= {str(row["method"]) for row in rows[-3:]}:
            drop, increase = method_difference(runs, study_seed)
            row = {**rows[-1], "method": DIFFERENCE}
            rows.append(row | _interval("average_drop", drop) | _interval("average_increase", increase))
    return pd.DataFrame(rows)


def _interval(name: str, value: Interval) -> dict[str, object]:
    return {name: value.estimate, f"{name}_low": value.low, f"{name}_high": value.high}


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise ValueError(f"h1_share and seed must be whole numbers, got {value!r}")
    return value
