"""`raystudy plan`: who would be in the study, how precise it would be and what it would take."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raystudy.cohorts.have_need import CLASS_NAMES
from raystudy.cohorts.planning import Attainable, CohortPlan, attainable, plan_cohorts
from raystudy.config import Experiment
from raystudy.errors import StudyError
from raystudy.orchestrate.cost import ASSUMED_SIZE, Cost, estimate
from raystudy.orchestrate.plan import StudyPlan, plan_study
from raystudy.orchestrate.search import search_experiment
from raystudy.status_text import clock
from raystudy.storage import Storage, open_storage
from raystudy.study import Study

FEWEST_JOINT_STEPS = 500
FEWEST_CELLS = 4  # a side of the feature grid
WIDE = 200  # columns of tables that go into a file or a pipe


@dataclass(frozen=True)
class Variant:
    """The cohorts of some arms of an ablation: the values of the axes that decide who is in, and the counts."""

    axes: dict[str, Any]
    cohorts: CohortPlan


def print_plan(experiment: Experiment, as_json: bool) -> None:
    """Print the plan of an experiment; trains nothing and reads no pixel."""
    asked = search_experiment(experiment) if experiment.search else experiment
    storage, problems = _storage(asked)
    if storage.is_local and not problems:
        Study(storage.child(asked.name)).refuse_newer()
    plan = plan_study(asked, storage)
    variants = _variants(plan)
    cost = estimate(plan)
    warnings = problems + warnings_of(plan.experiment, cost)
    if as_json:
        print(json.dumps(_as_dict(plan, variants, cost, warnings), indent=2, default=str))
    else:
        _print_plan(plan, variants, cost, warnings, Console(width=None if sys.stdout.isatty() else WIDE))


def _storage(experiment: Experiment) -> tuple[Storage, list[str]]:
    """Return where phantoms lie; a plan of real films needs no storage and only warns of a bad one."""
    try:
        return open_storage(experiment.storage), []
    except StudyError as error:
        if any(source.kind == "phantom" for source in experiment.sources.values()):
            raise
        return open_storage("."), [f"{error.where or 'storage'}: {error.what}; `run` needs `storage` or --storage"]


def _variants(plan: StudyPlan) -> list[Variant]:
    """Return each different set of cohorts once, with the axis values that it stands for."""
    varied = [k for k, values in plan.experiment.axes.items() if k.startswith("cohort.") and len(values) > 1]
    found: dict[int, Variant] = {}
    for arm in plan.arms:
        if id(arm.cohorts) not in found:
            experiment = arm.experiment
            counted = plan_cohorts(arm.cohorts, experiment.tasks, experiment.sources, experiment.cohort)
            found[id(arm.cohorts)] = Variant({k: arm.axes[k] for k in varied}, counted)
    return list(found.values())


def print_attainable(percent: str, n: int, as_json: bool) -> None:
    """Print whether a published accuracy can come from n test films."""
    try:
        found = attainable(percent, n)
    except ValueError as error:
        raise StudyError(str(error), where="--check", remedy="raystudy plan --check 63.89 --n 290") from None
    if as_json:
        print(json.dumps({**asdict(found), "attainable": found.ok}, indent=2))
    else:
        print(_attainable_text(found))


def _attainable_text(found: Attainable) -> str:
    if found.ok:
        return f"{found.percent} % is attainable at n = {found.n}: {found.correct}/{found.n}"
    (below, low), (above, high), (k, n) = found.below, found.above, found.nearest
    return (
        f"{found.percent} % is not attainable at n = {found.n}: {below}/{found.n} is {low:.2f} % and "
        f"{above}/{found.n} is {high:.2f} %; the nearest n that gives it is {n} ({k}/{n})"
    )


def warnings_of(experiment: Experiment, cost: Cost) -> list[str]:
    """Return what a user should know before starting: schedules that cannot learn, grids too coarse to explain."""
    found: list[str] = []
    if cost.joint_steps < FEWEST_JOINT_STEPS:
        found.append(
            f"only {cost.joint_steps} joint training steps; below {FEWEST_JOINT_STEPS} a network may not learn "
            "(more epochs, more films or smaller batches)"
        )
    training = experiment.training
    cells = -(-experiment.images.size // experiment.model.stride)
    if cells < FEWEST_CELLS:
        found.append(
            f"the feature grid has {cells} × {cells} cells; below {FEWEST_CELLS} × {FEWEST_CELLS} relevance, heat maps "
            "and class maps mean little (raise images.size or lower model.backbone_layers)"
        )
    if experiment.model.weights == "none" and training.schedule == "step" and training.lr_backbone <= 1e-4:
        found.append("the paper's schedule is made for ImageNet weights; from random weights name your own schedule")
    return found


def _as_dict(plan: StudyPlan, variants: list[Variant], cost: Cost, warnings: list[str]) -> dict[str, Any]:
    table = plan.image_table
    axes = [{f"axis.{k}": v for k, v in variant.axes.items()} for variant in variants]
    both = list(zip(axes, (v.cohorts for v in variants), strict=True))
    return {
        "study": plan.experiment.name,
        "trials": [t.trial_id for t in plan.trials],
        "counts": [a | row for a, c in both for row in c.counts.to_dict(orient="records")],
        "cells": [a | asdict(cell) for a, c in both for cell in c.cells],
        "patients_in_two_splits": sum(c.overlap for _, c in both),
        "test_sets": [a | asdict(t) for a, c in both for t in c.tests],
        "policies": [a | asdict(p) for a, c in both for p in c.policies],
        "sources": variants[0].cohorts.sources,
        "images": len(table),
        "patients": int(table["patient_id"].nunique()),
        "cost": {**asdict(cost), "seconds": cost.seconds if cost.seconds is not None else "unknown"},
        "warnings": warnings,
    }


def _print_plan(plan: StudyPlan, variants: list[Variant], cost: Cost, warnings: list[str], console: Console) -> None:
    experiment, table = plan.experiment, plan.image_table
    overlap = sum(v.cohorts.overlap for v in variants)
    console.print(f"[bold]{experiment.name}[/bold]: {cost.trials} trials ({_product(experiment)})", soft_wrap=True)
    patients = table["patient_id"].nunique()
    console.print(f"{len(table)} films of {patients} patients; patients in two splits: {overlap}")
    for name, notes in variants[0].cohorts.sources.items():
        for note in notes:
            console.print(f"  {name}: {note}", markup=False, soft_wrap=True)
    for variant in variants:
        for task in experiment.tasks:
            for seed in experiment.cohort_seeds:
                title = _title(task, variant, seed if len(experiment.cohort_seeds) > 1 else None)
                console.print(_counts_table(variant.cohorts, task, seed, list(experiment.sources), title))
                for line in _precision_lines(variant.cohorts, task, seed):
                    console.print(line, soft_wrap=True)
    console.print(_policies_table(variants))
    steps = f"joint training steps a trial: {cost.joint_steps}"
    console.print(f"storage: about {cost.bytes / 1e9:.2g} GB; {steps}", soft_wrap=True)
    if cost.seconds is None:
        time = f"unknown ({cost.why_unknown})"
    else:
        time = f"about {clock(cost.seconds)} here, {cost.concurrent} trials at a time (measured just now)"
    if cost.assumed_size:
        time += f"; the originals of {cost.assumed_size} are taken to have {ASSUMED_SIZE} × {ASSUMED_SIZE} pixels"
    console.print(f"time: {time}", soft_wrap=True)
    for warning in warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)


def _product(experiment: Experiment) -> str:
    """Return what is multiplied to the number of trials."""
    factors = [(len(experiment.tasks), "tasks"), (len(experiment.mixtures), "mixtures")]
    factors += [(len(experiment.cohort_seeds), "cohort seeds")] if len(experiment.cohort_seeds) > 1 else []
    factors += [(len(experiment.seeds), "seeds"), *((len(v), k) for k, v in experiment.axes.items())]
    factors += [(experiment.search.trials, "suggestions")] if experiment.search else []
    return " × ".join(f"{n} {what}" for n, what in factors)


def _title(task: str, variant: Variant, seed: int | None) -> str:
    parts = [
        task,
        *(f"{k} {v}" for k, v in variant.axes.items()),
        *([f"cohort seed {seed}"] if seed is not None else []),
    ]
    return f"{', '.join(parts)}: images (patients)"


def _counts_table(cohorts: CohortPlan, task: str, seed: int, sources: list[str], title: str) -> Table:
    """One row per mixture and split, or test set; one column per source and class."""
    columns = [(source, label) for source in sources for label in (1, 0)]
    table = Table("mixture", "split", title=title, title_justify="left")
    for column in table.columns:
        column.no_wrap = True
    for source, label in columns:
        table.add_column(f"{source}\n{CLASS_NAMES[label]}", justify="right", no_wrap=True)
    have = {(c.split, c.source, c.label): c.have for c in cohorts.cells if (c.task, c.cohort_seed) == (task, seed)}
    for split in dict.fromkeys(split for split, _, _ in have):
        table.add_row(
            "available", split, *(str(have[split, *column]) for column in columns), end_section=split == "test"
        )
    rows: dict[tuple[int, str, str], dict[tuple[str, str], str]] = {}
    for c in cohorts.counts.to_dict(orient="records"):
        if (c["task"], c["cohort_seed"]) == (task, seed):
            row = rows.setdefault((c["h1_share"], c["split"], c["test_set"]), {})
            row[c["source"], c["class"]] = _cell(c["images"], c["patients"])
    for share, split, test in sorted(rows, key=lambda row: (row[0] < 0, row[0])):  # the test sets last
        shown = [rows[share, split, test][source, CLASS_NAMES[label]] for source, label in columns]
        table.add_row(test or f"{share}H1-{100 - share}H2", split, *shown)
    return table


def _cell(images: int, patients: int) -> str:
    return f"{images} ({patients})" if images else "0"


def _precision_lines(cohorts: CohortPlan, task: str, seed: int) -> list[str]:
    return [
        f"{t.name}: {t.images} images of {t.patients} patients; 95 % half-width of an accuracy "
        f"±{t.half_width:.1f} points "
        f"(exact binomial ±{t.half_width_exact:.1f}, by patient ±{t.half_width_clustered:.1f})"
        for t in cohorts.tests
        if (t.task, t.cohort_seed) == (task, seed)
    ]


def _policies_table(variants: list[Variant]) -> Table:
    """One row a policy; where an axis varies it, one row for each of its values."""
    table = Table("", "policy", "value", "what it does", title="Who decides what", title_justify="left")
    table.columns[1].no_wrap = True
    policies = dict.fromkeys(p for variant in variants for p in variant.cohorts.policies)
    for policy in sorted(policies, key=lambda p: p.number):
        table.add_row(str(policy.number), policy.setting, policy.value, policy.effect)
    return table
