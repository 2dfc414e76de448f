"""What the MLflow mirror says of a study: plain parameters and numbers from specs, events, results and explanations.

In flow the JSON and tables of a study directory; out flow names and values.  No film, image id or patient id passes.
A trial that is resumed repeats epochs with the same results; a position in its schedule tells what was said before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from raystudy.evaluate.faithfulness import summarise

EPOCH_NUMBERS = (
    "loss",
    "cross_entropy",
    "cluster",
    "separation",
    "l1",
    "train_accuracy",
    "val_accuracy",
    "val_cross_entropy",
)
SPEED = "images_per_second"
PREFIX = {"epoch": "", "projection": "projection_", "last_layer": "last_layer_"}
ORDER = tuple(PREFIX)  # within one epoch
MOST_NUMBERS = len(EPOCH_NUMBERS) + 1  # of one event
TEST_SETS = {"Test-100H1": "test_100h1", "Test-100H2": "test_100h2", "Test-50-50": "test_50_50"}

Position = list[int]  # epoch, place in ORDER, last-layer epoch


@dataclass(frozen=True)
class Number:
    """One value of a run at its event's own time (ms) and step."""

    key: str
    value: float
    time: int
    step: int = 0


def event_time(event: dict[str, Any]) -> int:
    """Return an event's time in ms."""
    return round(1000 * float(event["time"]))


def parameters(spec: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a spec as flat texts: ``training.epochs``, ``task``, ``h1_share``, …"""
    flat: dict[str, str] = {}
    for key, value in sorted(spec.items()):
        flat |= parameters(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def event_numbers(events: Iterable[dict[str, Any]], position: Position) -> tuple[list[Number], Position]:
    """Return the numbers of events, and the position behind them; the step counts completed epochs.

    Parameters
    ----------
    position : how far the trial had come; an epoch at or before it was run again after a crash and is left out.
    """
    numbers: list[Number] = []
    for event in events:
        kind, time, epoch = event.get("event"), event_time(event), int(event.get("epoch") or 0)
        if kind in PREFIX:
            here = [epoch, ORDER.index(kind), int(event.get("last_layer_epoch") or 0)]
            if here <= position:
                continue
            position = here
            found = {f"{PREFIX[kind]}{key}": event.get(key) for key in EPOCH_NUMBERS}
            found[SPEED] = event.get(SPEED) if kind == "epoch" else None
        elif kind == "progress":
            found = {SPEED: event.get(SPEED)}
        else:
            continue
        numbers += [
            Number(key, float(value), time, epoch)
            for key, value in found.items()
            if isinstance(value, int | float) and math.isfinite(value)
        ]
    return numbers, position


def result_numbers(result: dict[str, Any]) -> dict[str, float]:
    """Return ``accuracy_test_100h1``, …, and the validation accuracy of the selected state, in percent."""
    numbers = {f"accuracy_{TEST_SETS.get(k, k)}": float(v["accuracy"]) for k, v in sorted(result["tests"].items())}
    return {**numbers, "selected_val_accuracy": float(result["selected"]["val_accuracy"])}


def faithfulness_numbers(pairs: pd.DataFrame, study_seed: int) -> dict[str, float]:
    """Return ``average_drop_prp``, ``average_increase_prp``, …, in percent, as the report's table has them."""
    numbers: dict[str, float] = {}
    for method, value in summarise([pairs], study_seed, resamples=2).items():
        numbers[f"average_drop_{method}"] = value.average_drop.estimate
        numbers[f"average_increase_{method}"] = value.average_increase.estimate
    return numbers
