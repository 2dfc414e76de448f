"""What a study would take: storage from the sizes of its files, time from steps measured here and now.

A trial's time is put together from the parts that dominate it: training steps, evaluation passes, maps and masked
forwards of the explanations.  Each part is measured for a second or two on this machine with the experiment's own
network; where the trials ask for a GPU and there is none here, the time is unknown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from raystudy.config import Experiment
from raystudy.orchestrate.plan import PlannedTrial, StudyPlan
from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.losses import loss_terms
from raystudy.protopnet.stages import build_optimizers, projects_after, set_stage
from raystudy.relevance import PrototypeExplainer

MEASURE_SECONDS = 0.8
PIXELS_A_STEP = 400_000  # of a measured step: eight films of 224 px
FIXED_SECONDS = 30.0  # imports here and in the workers, starting Ray and Ray Data, the report
TRIAL_SECONDS = 1.2  # files, scheduling and reading of one trial and its explanation jobs
PREPARE_RATE = 300.0  # films a second and core, decoded or rendered


@dataclass(frozen=True)
class Rates:
    """Seconds of one training image, one evaluated image, one relevance map, on one trial's share of this machine."""

    train: float
    evaluate: float
    relevance: float


@dataclass(frozen=True)
class Cost:
    """What a study would take here."""

    trials: int
    joint_steps: int
    bytes: int
    seconds: float | None  # None: unknown hardware
    concurrent: int | None
    why_unknown: str = ""


def estimate(plan: StudyPlan, measure: bool = True) -> Cost:
    """Estimate a plan's cost; `measure` false leaves the time unknown."""
    experiment, trials = plan.experiment, plan.trials
    training = experiment.training
    train = max(int((t.cohort["role"] == "train").sum()) for t in trials)
    steps = -(-train // training.batch_size) * (training.epochs - training.warm_epochs)
    suggestions = experiment.search.trials if experiment.search else 1  # each is tried on all planned trials
    storage = suggestions * sum(_trial_bytes(t) for t in trials) + len(plan.image_table) * experiment.images.size**2
    n = len(trials) * suggestions
    if experiment.resources.gpus > 0 and not torch.cuda.is_available():
        return Cost(n, steps, storage, None, None, "the trials ask for a GPU and there is none here")
    if not measure:
        return Cost(n, steps, storage, None, None, "not measured")
    concurrent = _concurrent(experiment, n)
    rates = _measure(experiment)
    work = suggestions * sum(_trial_seconds(t, rates) + TRIAL_SECONDS for t in trials)
    prepare = len(plan.image_table) / (PREPARE_RATE * _cores())
    return Cost(n, steps, storage, FIXED_SECONDS + prepare + work / concurrent, concurrent)


def _concurrent(experiment: Experiment, trials: int) -> int:
    resources = experiment.resources
    slots = int(_cores() / resources.cpus)
    if resources.gpus > 0:
        slots = min(slots, int(torch.cuda.device_count() / resources.gpus))
    return max(1, min(slots, resources.max_concurrent or slots, trials))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _trial_bytes(trial: PlannedTrial) -> int:
    model = {"resnet18": 45e6, "resnet34": 85e6, "resnet50": 95e6}[trial.spec.model.backbone]
    model *= {4: 1.0, 3: 0.26, 2: 0.07, 1: 0.02}[trial.spec.model.backbone_layers]
    maps = 2 * trial.spec.model.prototypes_per_class * trial.spec.image_size**2 * (4 + 2 * trial.explain.top_k)
    return int(model + (maps if trial.explain.enabled else 0) + 200 * len(trial.tests))


def _trial_seconds(trial: PlannedTrial, rates: Rates) -> float:
    training, explain = trial.spec.training, trial.explain
    train = int((trial.cohort["role"] == "train").sum())
    val = len(trial.cohort) - train
    tests = int(trial.tests["image_id"].nunique())
    projections = sum(projects_after(e + 1, training) for e in range(training.epochs))
    passes = training.epochs * val + projections * (train + val) + tests
    if training.last_layer_bn == "published":
        passes += projections * training.last_layer_epochs * (train + val)
    seconds = training.epochs * train * rates.train + passes * rates.evaluate
    if explain.enabled:
        prototypes = trial.spec.model.prototypes_per_class
        per_set = len(trial.tests) // max(1, trial.tests["test_set"].nunique())
        films = min(explain.adai_images or per_set, per_set) * explain.adai_draws
        seconds += films * (prototypes * rates.relevance + (2 * prototypes + 2) * rates.evaluate)
        seconds += train * rates.evaluate + 2 * prototypes * (explain.top_k + 1) * rates.relevance
    return seconds


def _measure(experiment: Experiment) -> Rates:
    """Time the three parts with this experiment's network, on as many threads as a trial uses."""
    settings, size = experiment.training, experiment.images.size
    device = torch.device("cuda" if experiment.resources.gpus > 0 else "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        model = ProtoPNet.from_settings(experiment.model).to(device)
        generator = torch.Generator().manual_seed(0)
        batch = min(settings.batch_size, max(4, PIXELS_A_STEP // size**2))
        images = torch.randn(batch, 3, size, size, generator=generator).to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = (torch.arange(batch) % 2).to(device)
        optimizer = build_optimizers(model, settings)["joint"]
        set_stage(model, "joint", settings)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                maps = model.backbone(images)
            loss = loss_terms(model.head(maps.float()), labels, model, settings).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        train = _time(step, device) / batch
        model.eval()
        few = images[: max(4, batch // 4)]

        def evaluate() -> None:
            with torch.no_grad():
                model(few)

        forward = _time(evaluate, device) / len(few)
        explainer = PrototypeExplainer(model, experiment.explain.rule, experiment.explain.l2_power)
        index = torch.arange(min(4, experiment.model.prototypes_per_class), device=device)[None]
        relevance = _time(lambda: explainer(images[:1], index) and None, device) / index.shape[1]
    finally:
        torch.set_num_threads(before)
    return Rates(train, forward, relevance)


def _time(work: Callable[[], None], device: torch.device) -> float:
    """Return the mean seconds of a piece of work, after one that warms up."""
    work()
    runs, started = 0, time.perf_counter()
    while runs < 1 or time.perf_counter() - started < MEASURE_SECONDS:
        work()
        runs += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - started) / runs
