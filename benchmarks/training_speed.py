"""Training and projection against a plain loop: the joint step, the projection pass, the last-layer stage."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from raystudy.protopnet import ProtoPNet
from raystudy.protopnet.losses import last_layer_loss, loss_terms
from raystudy.protopnet.projection import project_features
from raystudy.protopnet.settings import TrainingSettings
from raystudy.protopnet.stages import build_optimizers, set_stage

SIZE, BATCH, PROJECTED, LAST_LAYER_N = 224, 16, 64, 2198


def rows(repeats: int = 5) -> list[dict[str, object]]:
    """Return the rows: ResNet34, 224 px, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [joint_step(repeats), projection(repeats), last_layer(repeats)]
    finally:
        torch.set_num_threads(threads)


def joint_step(repeats: int) -> dict[str, object]:
    """Our step (bf16 backbone, channels last) against a plain float32 step of the same network and losses."""
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(BATCH) % 2
    plain = _stepper(images, labels, TrainingSettings())
    ours = _stepper(images.contiguous(memory_format=torch.channels_last), labels, TrainingSettings(precision="bf16"))
    mine, peer = _interleaved([ours, plain], repeats)
    return _row("joint step, batch 16", peer / mine, BATCH / mine, BATCH / peer, "images/s", repeats, "wanted ≥ 1.6")


def _stepper(images: Tensor, labels: Tensor, settings: TrainingSettings) -> Callable[[], object]:
    model = ProtoPNet("resnet34")
    if settings.precision == "bf16":
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (the stubs lack it)
    optimizer = build_optimizers(model, settings)["joint"]
    set_stage(model, "joint", settings)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            maps = model.backbone(images)
        loss = loss_terms(model.head(maps.float()), labels, model, settings).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def projection(repeats: int) -> dict[str, object]:
    """One projection against the one evaluation pass that it cannot avoid."""
    model = ProtoPNet("resnet34").eval()
    images = torch.randn(PROJECTED, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)
    labels, ids = torch.arange(PROJECTED) % 2, [str(i) for i in range(PROJECTED)]

    @torch.no_grad()
    def project() -> object:
        features = torch.cat([model.features(b) for b in images.split(BATCH)])
        return project_features(model, features, labels, ids)

    @torch.no_grad()
    def evaluate() -> object:
        return [model(b) for b in images.split(BATCH)]

    mine, peer = _interleaved([project, evaluate], repeats)
    name = f"projection of {PROJECTED} images"
    return _row(name, mine / peer, PROJECTED / mine, PROJECTED / peer, "images/s", repeats, "share of one pass; ≤ 1.1")


def last_layer(repeats: int) -> dict[str, object]:
    """Twenty last-layer epochs on cached scores, N = 2198: no backbone pass, at most a second more."""
    settings, model = TrainingSettings(), ProtoPNet("resnet34")
    optimizer = build_optimizers(model, settings)["last_layer"]
    set_stage(model, "last_layer", settings)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(LAST_LAYER_N, len(model.prototypes), generator=generator)
    labels = torch.arange(LAST_LAYER_N) % 2

    def stage() -> None:
        for _ in range(settings.last_layer_epochs):
            for index in torch.randperm(LAST_LAYER_N, generator=generator).split(settings.batch_size):
                loss = last_layer_loss(model.last_layer(scores[index]), labels[index], model, settings).total
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    (mine,) = _interleaved([stage], repeats)
    return _row("last-layer stage, 20 epochs, N = 2198", mine / 1.0, mine, 1.0, "s", repeats, "peer: 1 s allowed")


def _interleaved(jobs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median seconds of each job, measured in turns after one round that warms up."""
    seconds: list[list[float]] = [[] for _ in jobs]
    for turn in range(repeats + 1):
        for job, found in zip(jobs, seconds, strict=True):
            start = time.perf_counter()
            job()
            if turn:
                found.append(time.perf_counter() - start)
    return [sorted(found)[len(found) // 2] for found in seconds]


def _row(name: str, ratio: float, ours: float, peer: float, unit: str, n: int, note: str) -> dict[str, object]:
    return {"name": name, "ratio": ratio, "ours": ours, "peer": peer, "unit": unit, "n": n, "note": note}
