"""`raystudy plan`: who would be in the study, how precise it would be and what it would take."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from raystudy.cohorts.planning import Attainable, CohortPlan, attainable, plan_cohorts
from raystudy.config import Experiment
from raystudy.errors import StudyError
from raystudy.orchestrate.cost import Cost, estimate
from raystudy.orchestrate.plan import StudyPlan, plan_study
from raystudy.orchestrate.search import search_experiment
from raystudy.status_text import clock
from raystudy.storage import open_storage

FEWEST_JOINT_STEPS = 500


def print_plan(experiment: Experiment, as_json: bool) -> None:
    """Print the plan of an experiment; trains nothing and reads no pixel."""
    asked = search_experiment(experiment) if experiment.search else experiment
    plan = plan_study(asked, open_storage(experiment.storage))
    arm = plan.arms[0]
    cohorts = plan_cohorts(arm.cohorts, arm.experiment.tasks, arm.experiment.sources, arm.experiment.cohort)
    cost = estimate(plan)
    if as_json:
        print(json.dumps(_as_dict(plan, cohorts, cost), indent=2, default=str))
    else:
        _print_tables(plan, cohorts, cost, Console(soft_wrap=True))


def print_attainable(percent: float, n: int, as_json: bool) -> None:
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
    """Return what a user should know before starting: schedules that cannot learn."""
    found: list[str] = []
    if cost.joint_steps < FEWEST_JOINT_STEPS:
        found.append(
            f"only {cost.joint_steps} joint training steps; below {FEWEST_JOINT_STEPS} a network may not learn "
            "(more epochs, more films or smaller batches)"
        )
    training = experiment.training
    if experiment.model.weights == "none" and training.schedule == "step" and training.lr_backbone <= 1e-4:
        found.append("the paper's schedule is made for ImageNet weights; from random weights name your own schedule")
    return found


def _as_dict(plan: StudyPlan, cohorts: CohortPlan, cost: Cost) -> dict[str, Any]:
    return {
        "study": plan.experiment.name,
        "trials": [t.trial_id for t in plan.trials],
        "counts": cohorts.counts.to_dict(orient="records"),
        "patients_in_two_splits": cohorts.overlap,
        "test_sets": [asdict(t) for t in cohorts.tests],
        "policies": [asdict(p) for p in cohorts.policies],
        "sources": cohorts.sources,
        "images": cohorts.images,
        "patients": cohorts.patients,
        "cost": {**asdict(cost), "seconds": cost.seconds if cost.seconds is not None else "unknown"},
        "warnings": warnings_of(plan.experiment, cost),
    }


def _print_tables(plan: StudyPlan, cohorts: CohortPlan, cost: Cost, console: Console) -> None:
    experiment = plan.experiment
    axes = "".join(f" × {len(v)} {k}" for k, v in experiment.axes.items())
    axes += f" × {experiment.search.trials} suggestions" if experiment.search else ""
    parts = f"{len(experiment.tasks)} tasks × {len(experiment.mixtures)} mixtures × {len(experiment.seeds)} seeds"
    console.print(f"[bold]{experiment.name}[/bold]: {cost.trials} trials ({parts}{axes})")
    console.print(f"{cohorts.images} films of {cohorts.patients} patients; patients in two splits: {cohorts.overlap}")
    for name, notes in cohorts.sources.items():
        for note in notes:
            console.print(f"  {name}: {note}", markup=False)
    for task in experiment.tasks:
        console.print(_mixtures_table(cohorts.counts, task, list(experiment.sources)))
        console.print(_tests_table(cohorts, task))
    policies = Table("", "policy", "value", "what it does", title="Who decides what", title_justify="left")
    for policy in cohorts.policies:
        policies.add_row(str(policy.number), policy.setting, policy.value, policy.effect)
    console.print(policies)
    console.print(f"storage: about {cost.bytes / 1e9:.2g} GB; joint training steps a trial: {cost.joint_steps}")
    if cost.seconds is None:
        console.print(f"time: unknown ({cost.why_unknown})")
    else:
        console.print(f"time: about {clock(cost.seconds)} here, {cost.concurrent} trials at a time (measured just now)")
    for warning in warnings_of(experiment, cost):
        console.print(f"[yellow]warning:[/yellow] {warning}")


def _mixtures_table(counts: pd.DataFrame, task: str, sources: list[str]) -> Table:
    table = Table(title=f"{task}: images (patients)", title_justify="left")
    table.add_column("mixture")
    rows = counts[(counts["task"] == task) & (counts["cohort_seed"] == counts["cohort_seed"].iloc[0])]
    cells = [
        (split, source, label) for split in ("train", "val") for source in sources for label in ("positive", "negative")
    ]
    for split, source, label in cells:
        table.add_column(f"{split}\n{source}\n{label}", justify="right")
    for share in sorted(s for s in rows["h1_share"].unique() if s >= 0):
        one = rows[rows["h1_share"] == share]
        shown = [f"{share}H1-{100 - share}H2"]
        for split, source, label in cells:
            cell = one[(one["split"] == split) & (one["source"] == source) & (one["class"] == label)]
            shown.append(f"{cell['images'].iloc[0]} ({cell['patients'].iloc[0]})" if len(cell) else "0")
        table.add_row(*shown)
    return table


def _tests_table(cohorts: CohortPlan, task: str) -> Table:
    table = Table("test set", "images", "patients", "95 % half-width of an accuracy", title_justify="left")
    for test in cohorts.tests:
        if test.task == task:
            width = f"±{test.half_width:.1f} points (±{test.half_width_clustered:.1f} by patient)"
            table.add_row(test.name, str(test.images), str(test.patients), width)
    return table
