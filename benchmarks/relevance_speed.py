"""Relevance maps a second against zennit with an equal composite and against one map at a time; ResNet34, one thread.

CPU seconds of this process, not wall seconds, so that a busy machine disturbs less; medians over interleaved repeats.
The error is the largest difference to float64, relative to the map's maximum, over all maps of a row.
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


def rows(repeats: int = 3) -> list[dict[str, object]]:
    """Return the table's rows: 1 image x 10 prototypes and 16 images x 1 prototype, float32 and bf16."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _rows(repeats)
    finally:
        torch.set_num_threads(threads)


def _rows(repeats: int) -> list[dict[str, object]]:
    model = ProtoPNet("resnet34").eval()
    images = _images(IMAGES)
    exact, single, fast = (PrototypeExplainer(model, precision=p) for p in ("float64", "float32", "bf16"))
    peer = ZennitPRP(model)
    table: list[dict[str, object]] = []
    for n, k in ((1, PROTOTYPES), (IMAGES, 1)):
        batch, chosen = images[:n], torch.arange(n * k).view(n, k) % (2 * PROTOTYPES)
        reference = exact(batch, chosen)
        errors = [_error(e(batch, chosen).maps, reference.maps) for e in (single, fast)]
        cells = len({(i, *cell) for i, row in enumerate(reference.cells.tolist()) for cell in map(tuple, row)})
        pairs = batch.repeat_interleave(k, 0)
        jobs: list[Callable[[], object]] = [
            lambda b=pairs, c=chosen: peer(b, c.flatten()),
            lambda b=batch, c=chosen: single(b, c),
            lambda b=batch, c=chosen: fast(b, c),
        ]
        if k > 1:
            jobs.append(lambda b=batch, c=chosen: prototype_relevance(model, b, c))
            jobs.append(lambda b=batch, c=chosen: [single(b, c[:, j : j + 1]) for j in range(c.shape[1])])
        seconds = _medians(jobs, repeats)
        what = f"PRP, {n} image{'s' * (n > 1)} x {k} prototype{'s' * (k > 1)}"
        note = f"against zennit; {cells} distinct cells; error {{:.1e}} of the maximum"
        for name, i, extra in (("float32", 1, note.format(errors[0])), ("bf16", 2, note.format(errors[1]))):
            table.append(_row(f"{what}, {name}", n * k, seconds[i], seconds[0], repeats, extra))
        if k > 1:
            extra = "against zennit; with the preparation of the model in every call"
            table.append(_row(f"{what}, float32, one call", n * k, seconds[3], seconds[0], repeats, extra))
            extra = "against our own float32, one prototype at a time"
            table.append(_row(f"{what}, float32", n * k, seconds[1], seconds[4], repeats, extra))
    return table


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


def _error(maps: Tensor, reference: Tensor) -> float:
    difference = (maps.double() - reference).abs().amax((2, 3))
    return float((difference / reference.abs().amax((2, 3))).max())


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
