"""Relevance maps a second against zennit with an equal composite and against one map at a time; ResNet34, one thread.

CPU seconds of this process, not wall seconds, so that a busy machine disturbs less; medians over interleaved repeats.
A map's error is its largest difference to float64, relative to its maximum; the largest are single winners of the max
pool that rounding decides, whoever computes in float32.  "Passes" are the maps that are carried down to the pixels:
prototypes that are equal, or in bf16 combinations of others, share one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.zennit_prp import ZennitPRP
from raystudy.protopnet import ProtoPNet
from raystudy.relevance import PrototypeExplainer, prototype_relevance

SIZE, PROTOTYPES, IMAGES = 224, 10, 16
PEAK = 2048  # side of the matrices


def rows(repeats: int = 3) -> list[dict[str, object]]:
    """Return the table's rows: 1 image x 10 prototypes and 16 images x 1 prototype, float32 and bf16."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _rows(repeats)
    finally:
        torch.set_num_threads(threads)


def _rows(repeats: int) -> list[dict[str, object]]:
    images = _images(IMAGES)
    model = _network(images)
    exact, single, fast = (PrototypeExplainer(model, precision=p) for p in ("float64", "float32", "bf16"))
    peer = ZennitPRP(model)
    one = f"PRP, 1 image x {PROTOTYPES} prototypes"
    first, last = torch.arange(PROTOTYPES)[None], torch.arange(PROTOTYPES, 2 * PROTOTYPES)[None]
    cases = [
        (one, images[:1], last),
        (f"{one} at {PROTOTYPES} cells", images[:1], first),
        (f"PRP, {IMAGES} images x 1 prototype", images, torch.arange(IMAGES)[:, None]),
    ]
    table = [_peak(repeats)]
    for what, batch, chosen in cases:
        n, k = chosen.shape
        reference = exact(batch, chosen)
        cells = len({(i, *cell) for i, row in enumerate(reference.cells.tolist()) for cell in map(tuple, row)})
        if torch.equal(chosen, first) and cells < k:
            raise RuntimeError("the prototypes must lie in different cells")
        pairs = batch.repeat_interleave(k, 0)
        jobs: list[Callable[[], object]] = [lambda b=pairs, c=chosen: peer(b, c.flatten())]
        jobs += [lambda e=e, b=batch, c=chosen: e(b, c) for e in (single, fast)]
        if torch.equal(chosen, last):
            jobs.append(lambda b=batch, c=chosen: prototype_relevance(model, b, c))
            jobs.append(lambda b=batch, c=chosen: [single(b, c[:, j : j + 1]) for j in range(c.shape[1])])
        seconds = _medians(jobs, repeats)
        for name, explainer, ours in (("float32", single, seconds[1]), ("bf16", fast, seconds[2])):
            errors = _errors(explainer(batch, chosen).maps, reference.maps)
            found = f"error: median {statistics.median(errors):.1e}, largest {max(errors):.1e} of the maximum"
            note = f"against zennit; {cells} distinct cells, {_passes(explainer, batch, chosen)} passes; {found}"
            table.append(_row(f"{what}, {name}", n * k, ours, seconds[0], repeats, note))
        if len(seconds) > 3:
            note = "against zennit; with the preparation of the model in every call"
            table.append(_row(f"{what}, float32, one call", n * k, seconds[3], seconds[0], repeats, note))
            note = "against our own float32, one prototype at a time"
            table.append(_row(f"{what}, float32", n * k, seconds[1], seconds[4], repeats, note))
    return table


def _peak(repeats: int) -> dict[str, object]:
    """What one thread reaches in a large matrix product, for comparison with a map's arithmetic: GFLOP a second."""
    square = torch.rand(PEAK, PEAK, generator=torch.Generator().manual_seed(0))
    half = square.bfloat16()
    single, fast = _medians([lambda: square @ square, lambda: half @ half], repeats)
    gflop = 2 * PEAK**3 / 1e9
    note = "matrix product, bf16 against float32; a forward pass or a map is 7.3 GFLOP"
    return {
        "name": "largest rate of one thread", "ratio": single / fast, "ours": gflop / fast, "peer": gflop / single,
        "unit": "GFLOP/s", "n": repeats, "note": note,
    }  # fmt: skip


@torch.no_grad()
def _network(images: Tensor) -> ProtoPNet:
    """A network whose batch norm fits the images; half of its prototypes are near different cells of the first one."""
    model = ProtoPNet("resnet34").train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # running statistics become those of the one batch
    model(images)
    z = model.eval().features(images[:1])[0].flatten(1).T  # h w, D
    cells = torch.arange(PROTOTYPES) * (len(z) // PROTOTYPES)
    noise = torch.rand(PROTOTYPES, z.shape[1], generator=torch.Generator().manual_seed(1))
    model.prototypes[:PROTOTYPES, :, 0, 0] = 0.9 * z[cells] + 0.1 * noise
    return model


def _passes(explainer: PrototypeExplainer, images: Tensor, prototypes: Tensor) -> int:
    """Count the maps whose relevance is carried to the pixels."""
    rules = explainer._rules
    stem, counted = rules.stem_gradient, 0

    def count(outer: Tensor, size: tuple[int, int]) -> Tensor:
        nonlocal counted
        counted += len(outer)
        return stem(outer, size)

    rules.stem_gradient = count
    explainer(images, prototypes)
    rules.stem_gradient = stem
    return counted


def _row(name: str, maps: int, ours: float, peer: float, n: int, note: str) -> dict[str, object]:
    ratio = peer / ours
    return {
        "name": name, "ratio": ratio, "ours": maps / ours, "peer": maps / peer, "unit": "maps/s", "n": n, "note": note
    }  # fmt: skip


def _images(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 1, 14, 14, generator=generator)
    grey = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (grey - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def _errors(maps: Tensor, reference: Tensor) -> list[float]:
    difference = (maps.double() - reference).abs().amax((2, 3))
    return (difference / reference.abs().amax((2, 3))).flatten().tolist()


def _medians(jobs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median CPU seconds of each job; the repeats of all jobs are interleaved after one warm-up each."""
    seconds: list[list[float]] = [[] for _ in jobs]
    for repeat in range(repeats + 1):
        for job, found in zip(jobs, seconds, strict=True):
            start = time.process_time()
            job()
            if repeat:
                found.append(time.process_time() - start)
    return [statistics.median(found) for found in seconds]
