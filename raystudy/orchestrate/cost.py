"""What a study would take: storage from the sizes of its files, time from steps measured here and now.

A trial's time is put together from the parts that dominate it: training steps, evaluation passes, last-layer steps,
maps and masked forwards of the explanations.  Each part is measured for a second or two on this machine with the
trials' own networks; where the trials ask for a GPU and there is none here, the time is unknown.  Decoding goes by the
size of the originals, which is known of phantoms and of NIH's films and assumed of others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from raystudy.augmentation import COPIES
from raystudy.cohorts.settings import NihSource, PhantomSource
from raystudy.config import Experiment
from raystudy.orchestrate.plan import PlannedTrial, StudyPlan
from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.losses import last_layer_loss, loss_terms
from raystudy.protopnet.stages import build_optimizers, last_layer_epochs_after, projects_after, set_stage
from raystudy.relevance import RULE_SETS, PrototypeExplainer

MEASURE_SECONDS = 0.8
PIXELS_A_STEP = 400_000  # of a measured step: eight films of 224 px
FIXED_SECONDS = 30.0  # imports here and in the workers, starting Ray and Ray Data, the report
TRIAL_SECONDS = 1.2  # files, scheduling and reading of one trial and its explanation jobs
# 103 films of 1024 px a second on two cores from S3 (docs/performance.md), 80 a core by the decoder alone.
FILM_SECONDS = 0.003  # to fetch and store a film, on one core
PIXEL_RATE = 64e6  # pixels of the originals decoded a second, on one core
ASSUMED_SIZE = 1024  # pixels a side of originals whose size is not known before they are read


@dataclass(frozen=True)
class Work:
    """What a trial does, or the seconds of one of each on one trial's share of this machine.

    Images trained on, images evaluated, steps of the last layer, relevance maps.
    """

    train: float = 0
    evaluate: float = 0
    last_layer: float = 0
    maps: float = 0

    def at(self, seconds: Work) -> float:
        """Return how long this takes where each part takes so many seconds."""
        return (
            self.train * seconds.train
            + self.evaluate * seconds.evaluate
            + self.last_layer * seconds.last_layer
            + self.maps * seconds.maps
        )


@dataclass(frozen=True)
class Cost:
    """What a study would take here."""

    trials: int
    joint_steps: int
    bytes: int
    seconds: float | None  # None: unknown hardware
    concurrent: int | None
    why_unknown: str = ""
    assumed_size: str = ""  # the sources whose originals are taken to be of ASSUMED_SIZE


def estimate(plan: StudyPlan, measure: bool = True) -> Cost:
    """Estimate a plan's cost; `measure` false leaves the time unknown."""
    experiment, trials = plan.experiment, plan.trials
    steps = min(_joint_steps(t) for t in trials)
    suggestions = experiment.search.trials if experiment.search else 1  # each is tried on all planned trials
    films, sizes = len(plan.image_table), {t.images.size for t in trials}
    storage = suggestions * sum(_trial_bytes(t) for t in trials) + films * sum(size**2 for size in sizes)
    n = len(trials) * suggestions
    if experiment.resources.gpus > 0 and not torch.cuda.is_available():
        return Cost(n, steps, storage, None, None, "the trials ask for a GPU and there is none here")
    if not measure:
        return Cost(n, steps, storage, None, None, "not measured")
    concurrent = _concurrent(experiment, n)
    kinds = {_kind(t): t for t in trials}
    seconds = {
        kind: _measure(t, experiment.resources.gpus > 0, MEASURE_SECONDS / len(kinds)) for kind, t in kinds.items()
    }
    work = suggestions * sum(
        training_work(t).at(seconds[_kind(t)]) + explanation_work(t).at(seconds[_kind(t)]) + TRIAL_SECONDS
        for t in trials
    )
    originals, assumed = _originals(plan)
    prepare = len(sizes) * sum(n * (FILM_SECONDS + size**2 / PIXEL_RATE) for n, size in originals) / _cores()
    total = FIXED_SECONDS + prepare + work / concurrent
    return Cost(n, steps, storage, total, concurrent, assumed_size=", ".join(assumed))


def _originals(plan: StudyPlan) -> tuple[list[tuple[int, int]], list[str]]:
    """Return (films, pixels a side) of each source, and the sources of which the size is only assumed."""
    films, found, assumed = plan.image_table["source"].value_counts(), list[tuple[int, int]](), list[str]()
    for name, source in plan.experiment.sources.items():
        known = isinstance(source, PhantomSource | NihSource)
        size = source.settings.size if isinstance(source, PhantomSource) else ASSUMED_SIZE  # NIH's are 1024 px
        found.append((int(films.get(name, 0)), size))
        assumed += [] if known else [name]
    return found, assumed


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


def _shown(trial: PlannedTrial) -> int:
    """Return the films of a training epoch, copies included."""
    train = int((trial.cohort["role"] == "train").sum())
    return train * (COPIES if trial.spec.training.augmentation == "published" else 1)


def _joint_steps(trial: PlannedTrial) -> int:
    training = trial.spec.training
    return -(-_shown(trial) // training.batch_size) * (training.epochs - training.warm_epochs)


def training_work(trial: PlannedTrial) -> Work:
    """Return what training, selection and test of one trial take."""
    training, shown = trial.spec.training, _shown(trial)
    train = int((trial.cohort["role"] == "train").sum())
    val, tests = len(trial.cohort) - train, int(trial.tests["image_id"].nunique())
    projections = sum(projects_after(e + 1, training) for e in range(training.epochs))
    passes = training.epochs * val + projections * (train + val) + tests
    stages = [last_layer_epochs_after(e + 1, training) for e in range(training.epochs)]
    if training.last_layer_bn == "published":
        passes += sum(stages) * (shown + val)
    elif shown > train:
        passes += sum(epochs > 0 for epochs in stages) * shown
    steps = sum(stages) * -(-shown // training.batch_size)
    return Work(training.epochs * shown, passes, steps)


def explanation_work(trial: PlannedTrial) -> Work:
    """Return what the explanation jobs of one trial take when no two prototypes are the same patch."""
    explain, prototypes = trial.explain, trial.spec.model.prototypes_per_class
    if not explain.enabled:
        return Work()
    per_set = len(trial.tests) // max(1, trial.tests["test_set"].nunique())
    films = min(explain.adai_images or per_set, per_set)
    train = int((trial.cohort["role"] == "train").sum())
    evaluate = films * (1 + explain.adai_draws * (2 * prototypes + 1)) + train + 2 * 2 * prototypes
    specificity = len(RULE_SETS) * 2 * min(2, prototypes) * min(4, prototypes) * (3 if prototypes > 1 else 2)
    return Work(evaluate=evaluate, maps=films * prototypes + 2 * prototypes * (explain.top_k + 1) + specificity)


def _kind(trial: PlannedTrial) -> tuple[object, ...]:
    """Return what decides about the speed of a trial's parts."""
    training, explain = trial.spec.training, trial.explain
    shape = (trial.spec.model, trial.spec.image_size, training.batch_size, training.precision, training.threads)
    return *shape, explain.rule, explain.l2_power, explain.precision


def _measure(trial: PlannedTrial, on_gpu: bool, at_least: float) -> Work:
    """Time each part with this trial's network, on as many threads as a trial uses."""
    settings, size = trial.spec.training, trial.spec.image_size
    device = torch.device("cuda" if on_gpu else "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        model = ProtoPNet.from_settings(trial.spec.model).to(device)
        generator = torch.Generator().manual_seed(0)
        batch = min(settings.batch_size, max(4, PIXELS_A_STEP // size**2))
        images = torch.randn(batch, 3, size, size, generator=generator).to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = (torch.arange(batch) % 2).to(device)
        optimizers = build_optimizers(model, settings)
        set_stage(model, "joint", settings)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                maps = model.backbone(images)
            loss = loss_terms(model.head(maps.float()), labels, model, settings).total
            optimizers["joint"].zero_grad()
            loss.backward()
            optimizers["joint"].step()

        train = _time(step, device, at_least) / batch
        model.eval()
        few = images[: max(4, batch // 4)]

        def evaluate() -> None:
            with torch.no_grad():
                model(few)

        forward = _time(evaluate, device, at_least) / len(few)
        set_stage(model, "last_layer", settings)
        with torch.no_grad():
            scores = model(few).similarities.repeat(-(-batch // len(few)), 1)[:batch]

        def last_layer() -> None:
            loss = last_layer_loss(model.last_layer(scores), labels, model, settings).total
            optimizers["last_layer"].zero_grad()
            loss.backward()
            optimizers["last_layer"].step()

        last = _time(last_layer, device, at_least / 4)
        untrained = (
            ProtoPNet.from_settings(trial.spec.model).to(device).eval()
        )  # a high rate may have blown the other up
        explainer = PrototypeExplainer(untrained, trial.explain.rule, trial.explain.l2_power)
        index = torch.arange(min(4, trial.spec.model.prototypes_per_class), device=device)[None]
        relevance = _time(lambda: explainer(images[:1], index) and None, device, at_least) / index.shape[1]
    finally:
        torch.set_num_threads(before)
    return Work(train, forward, last, relevance)


def _time(work: Callable[[], None], device: torch.device, at_least: float) -> float:
    """Return the mean seconds of a piece of work, after one that warms up."""
    work()
    runs, started = 0, time.perf_counter()
    while runs < 1 or time.perf_counter() - started < at_least:
        work()
        runs += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - started) / runs
