"""Small golden vectors from the slow oracle, in tests/golden/protopnet.npz.

``python -m tests.protopnet.small_golden`` writes them.
They stand in where the published code's vectors are not at hand.  Weights and images come from integers (raw words of
PCG64, which NumPy keeps for ever), the numbers from `oracle`, in float64.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.protopnet import oracle

FILE = Path(__file__).parents[1] / "golden" / "protopnet.npz"


class Case(NamedTuple):
    """A network and its images; classes share the prototypes equally."""

    arch: str
    layers: int
    classes: int
    per_class: int
    dim: int
    size: tuple[int, int]
    n: int


CASES = {
    "r18": Case("resnet18", 2, 2, 3, 8, (48, 64), 6),
    "r50": Case("resnet50", 1, 3, 2, 5, (36, 36), 4),
}
LABELS = (1, 0, 1, 0, 0, 1)


def uniform(name: str, shape: tuple[int, ...]) -> Tensor:
    """Multiples of 2**-53 in [0, 1) from the stream of a name."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    return torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


def tensor(case: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """One parameter or buffer, float64 holding a float32 value; every sixth batch norm scale is negative."""
    u = uniform(f"{case} {name}", shape)
    leaf = name.rsplit(".", 1)[-1]
    if name == "prototypes":
        value = u
    elif name == "last_layer.weight":
        own = torch.arange(shape[0])[:, None] == torch.arange(shape[1])[None] // (shape[1] // shape[0])
        value = torch.where(own, 1.0, -0.5) + 0.2 * u - 0.1
    elif leaf == "running_var":
        value = 0.5 + 1.5 * u
    elif leaf in ("bias", "running_mean"):
        value = 0.6 * u - 0.3
    elif len(shape) == 1:
        value = 0.5 + u
        value[5::6] *= -1
    else:
        value = (2 * u - 1) * (6 / np.prod(shape[1:])) ** 0.5
    return value.float().double()


def weights(case: str, shapes: dict[str, tuple[int, ...]]) -> oracle.State:
    return {name: tensor(case, name, shape) for name, shape in shapes.items()}


def images(case: str) -> Tensor:
    """(N, 3, H, W), about the range of normalised films, float64 holding float32 values."""
    c = CASES[case]
    coarse = uniform(f"{case} coarse", (c.n, 3, 6, 6))
    blocks = torch.kron(coarse, torch.ones(1, 1, c.size[0] // 6 + 1, c.size[1] // 6 + 1, dtype=torch.float64))
    fine = uniform(f"{case} fine", (c.n, 3, *c.size))
    return (4 * blocks[:, :, : c.size[0], : c.size[1]] + fine - 2).float().double()


def shapes_of(case: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a case, written out by hand rather than asked of the product."""
    c = CASES[case]
    out: dict[str, tuple[int, ...]] = {}

    def conv_norm(conv: str, norm: str, o: int, i: int, k: int) -> None:
        out[f"{conv}.weight"] = (o, i, k, k)
        out.update({f"{norm}.{leaf}": (o,) for leaf in ("weight", "bias", "running_mean", "running_var")})

    conv_norm("backbone.conv1", "backbone.bn1", 64, 3, 7)
    deep = c.arch == "resnet50"
    before = 64
    for stage in range(1, c.layers + 1):
        width = 32 * 2**stage
        after = 4 * width if deep else width
        for b in range(oracle.BLOCKS[c.arch][stage - 1]):
            name = f"backbone.layer{stage}.{b}"
            kernels = ((width, before, 1), (width, width, 3), (after, width, 1))
            for k, (o, i, kernel) in enumerate(kernels if deep else ((width, before, 3), (width, width, 3)), start=1):
                conv_norm(f"{name}.conv{k}", f"{name}.bn{k}", o, i, kernel)
            if b == 0 and before != after:
                conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", after, before, 1)
            before = after
    out["add_on.0.weight"], out["add_on.0.bias"] = (c.dim, before, 1, 1), (c.dim,)
    out["add_on.2.weight"], out["add_on.2.bias"] = (c.dim, c.dim, 1, 1), (c.dim,)
    out["prototypes"] = (c.classes * c.per_class, c.dim, 1, 1)
    out["last_layer.weight"] = (c.classes, c.classes * c.per_class)
    return out


def compute() -> dict[str, np.ndarray]:
    """All arrays of the file, as float64 or integers."""
    found: dict[str, np.ndarray] = {}
    for case, c in CASES.items():
        state = weights(case, shapes_of(case))
        output = oracle.forward(state, c.arch, c.layers, images(case))
        found.update({f"{case}.{name}": value.numpy() for name, value in output.items()})
    c, labels = CASES["r18"], list(LABELS)
    state = weights("r18", shapes_of("r18"))
    output = oracle.forward(state, c.arch, c.layers, images("r18"))
    terms = oracle.losses(output, state["last_layer.weight"], labels, c.per_class)
    names = ("total", "cross_entropy", "cluster", "separation", "l1")
    found["losses"] = np.array([float(terms[name]) for name in names])
    sources = oracle.project(output["distances"].numpy(), labels, c.per_class)
    found["projection.sources"] = np.array([s[:3] for s in sources])
    found["projection.distances"] = np.array([s[3] for s in sources])
    found["projection.prototypes"] = np.stack([output["features"][i, :, r, w].numpy() for i, r, w, _ in sources])
    for stage in ("warm", "joint", "last"):
        state = weights("r18", shapes_of("r18"))
        log = oracle.train_steps(state, c.arch, c.layers, images("r18"), labels, c.per_class, stage)
        found[f"{stage}.log"] = np.array([[float(terms[name]) for name in names] for terms in log])
        for name in ("prototypes", "add_on.2.weight", "last_layer.weight", "backbone.layer2.0.downsample.0.weight"):
            found[f"{stage}.{name}"] = state[name].detach().numpy().reshape(-1)[:256]
    return found


if __name__ == "__main__":
    np.savez_compressed(FILE, **compute())
    print(FILE, FILE.stat().st_size, "bytes")
