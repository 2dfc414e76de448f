"""The method written out slowly in float64, from its text alone; nothing here is imported from the product.

Convolutions are sums over kernel positions, batch norm is its formula, minima are loops.  Operations are torch's so
that autograd gives the gradients of a training step.  A state is a dictionary of float64 tensors under the product's
names.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
State = dict[str, Tensor]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    """Sum over the positions of the kernel: (N, I, H, W) and (O, I, k, k) to (N, O, h, w)."""
    kernel = weight.shape[2]
    n, _, height, width = x.shape
    padded = x.new_zeros(n, x.shape[1], height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = x
    h, w = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    out = x.new_zeros(n, len(weight), h, w)
    for i in range(kernel):
        for j in range(kernel):
            shifted = padded[:, :, i : i + stride * (h - 1) + 1 : stride, j : j + stride * (w - 1) + 1 : stride]
            out = out + torch.einsum("nihw,oi->nohw", shifted, weight[:, :, i, j])
    return out if bias is None else out + bias[None, :, None, None]


def pool(x: Tensor) -> Tensor:
    """Maximum over 3 x 3 windows, stride 2, padding 1; only values >= 0 come in, so padding with 0 changes nothing."""
    n, c, height, width = x.shape
    padded = x.new_zeros(n, c, height + 2, width + 2)
    padded[:, :, 1:-1, 1:-1] = x
    h, w = (height - 1) // 2 + 1, (width - 1) // 2 + 1
    windows = [padded[:, :, i : i + 2 * h - 1 : 2, j : j + 2 * w - 1 : 2] for i in range(3) for j in range(3)]
    return torch.stack(windows).amax(0)


def batch_norm(x: Tensor, state: State, name: str, train: bool) -> Tensor:
    """Normalise by running statistics, or by the batch's own (biased) ones."""
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if train:
        mean = x.mean((0, 2, 3))
        var = ((x - mean[None, :, None, None]) ** 2).mean((0, 2, 3))
    scale = state[f"{name}.weight"] / torch.sqrt(var + 1e-5)
    return (x - mean[None, :, None, None]) * scale[None, :, None, None] + state[f"{name}.bias"][None, :, None, None]


def block(x: Tensor, state: State, name: str, stride: int, train: bool) -> Tensor:
    """A basic block (stride in its first convolution) or a bottleneck (stride in its second)."""
    deep = f"{name}.conv3.weight" in state
    steps = ((1, 1, 0), (2, stride, 1), (3, 1, 0)) if deep else ((1, stride, 1), (2, 1, 1))
    y = x
    for i, s, padding in steps:
        y = batch_norm(convolve(y, state[f"{name}.conv{i}.weight"], None, s, padding), state, f"{name}.bn{i}", train)
        if i < len(steps):
            y = y.clamp(min=0)
    if f"{name}.downsample.0.weight" in state:
        x = convolve(x, state[f"{name}.downsample.0.weight"], None, stride)
        x = batch_norm(x, state, f"{name}.downsample.1", train)
    return (x + y).clamp(min=0)


def features(state: State, arch: str, layers: int, images: Tensor, train: bool = False) -> Tensor:
    """(N, 3, H, W) to the add-on's output (N, D, h, w)."""
    x = convolve(images, state["backbone.conv1.weight"], None, 2, 3)
    x = pool(batch_norm(x, state, "backbone.bn1", train).clamp(min=0))
    for stage in range(1, layers + 1):
        for b in range(BLOCKS[arch][stage - 1]):
            x = block(x, state, f"backbone.layer{stage}.{b}", 2 if b == 0 and stage > 1 else 1, train)
    x = convolve(x, state["add_on.0.weight"], state["add_on.0.bias"]).clamp(min=0)
    return 1 / (1 + torch.exp(-convolve(x, state["add_on.2.weight"], state["add_on.2.bias"])))


def distances(z: Tensor, prototypes: Tensor) -> Tensor:
    """Sum of squared differences, (N, D, h, w) and (P, D, 1, 1) to (N, P, h, w)."""
    return torch.stack([((z - p[None]) ** 2).sum(1) for p in prototypes], 1)


def similarity(d: Tensor) -> Tensor:
    return torch.log((d + 1) / (d + 1e-4))


def forward(state: State, arch: str, layers: int, images: Tensor, train: bool = False) -> dict[str, Tensor]:
    z = features(state, arch, layers, images, train)
    d = distances(z, state["prototypes"])
    scores = similarity(d).amax((2, 3))
    return {"features": z, "distances": d, "similarities": scores, "logits": scores @ state["last_layer.weight"].T}


def losses(output: dict[str, Tensor], weight: Tensor, labels: list[int], per_class: int) -> dict[str, Tensor]:
    """The four terms by loops over images, prototypes and classes."""
    minima = output["distances"].amin((2, 3))  # N, P
    n, p = minima.shape
    own = [[j // per_class == label for j in range(p)] for label in labels]
    terms = {
        "cross_entropy": torch.stack([-torch.log_softmax(output["logits"][i], 0)[labels[i]] for i in range(n)]).mean(),
        "cluster": torch.stack([min(minima[i, j] for j in range(p) if own[i][j]) for i in range(n)]).mean(),
        "separation": torch.stack([min(minima[i, j] for j in range(p) if not own[i][j]) for i in range(n)]).mean(),
        "l1": torch.stack(
            [weight[c, j].abs() for c in range(len(weight)) for j in range(p) if j // per_class != c]
        ).sum(),
    }
    published = {"cross_entropy": 1, "cluster": 0.8, "separation": -0.08, "l1": 1e-4}
    terms["total"] = torch.stack([published[name] * term for name, term in terms.items()]).sum()
    return terms


def project(d: Any, labels: list[int], per_class: int) -> list[tuple[int, int, int, float]]:
    """(image, row, col, distance) of each prototype by one loop over all patches, first of equals."""
    n, p, h, w = d.shape
    out: list[tuple[int, int, int, float]] = []
    for j in range(p):
        best = (-1, -1, -1, math.inf)
        for i in range(n):
            if labels[i] != j // per_class:
                continue
            for row in range(h):
                for col in range(w):
                    if float(d[i, j, row, col]) < best[3]:
                        best = (i, row, col, float(d[i, j, row, col]))
        out.append(best)
    return out


class Adam:
    """Kingma and Ba with L2 decay added to the gradient."""

    def __init__(self, rates: dict[str, float], decay: dict[str, float]) -> None:
        self.rates, self.decay, self.steps = rates, decay, 0
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

    def step(self, state: State, gradients: State) -> None:
        self.steps += 1
        for name, rate in self.rates.items():
            g = gradients[name] + self.decay[name] * state[name].detach()
            m, v = self.moments.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            self.moments[name] = (m, v)
            m_hat, v_hat = m / (1 - 0.9**self.steps), v / (1 - 0.999**self.steps)
            state[name] = state[name].detach() - rate * m_hat / (v_hat.sqrt() + 1e-8)


def train_steps(
    state: State, arch: str, layers: int, images: Tensor, labels: list[int], per_class: int, stage: str, steps: int = 3
) -> list[dict[str, Tensor]]:
    """Take steps of a stage in train mode at the published rates, changing ``state``; return the terms before each."""
    prefixes = {"warm": ("add_on.", "prototypes"), "joint": ("backbone.", "add_on.", "prototypes"), "last": ("last_",)}
    rate_of = {"backbone": 1e-4, "add_on": 3e-3, "prototypes": 3e-3, "last_layer": 1e-4}
    decay_of = {"backbone": 1e-3, "add_on": 1e-3, "prototypes": 0.0, "last_layer": 0.0}
    trained = [n for n in state if n.startswith(prefixes[stage]) and "running" not in n]
    adam = Adam({n: rate_of[n.split(".")[0]] for n in trained}, {n: decay_of[n.split(".")[0]] for n in trained})
    log: list[dict[str, Tensor]] = []
    for _ in range(steps):
        for name in trained:
            state[name] = state[name].detach().requires_grad_()
        terms = losses(forward(state, arch, layers, images, train=True), state["last_layer.weight"], labels, per_class)
        gradients = torch.autograd.grad(terms["total"], [state[n] for n in trained], allow_unused=True)
        log.append({name: term.detach() for name, term in terms.items()})
        given = {n: torch.zeros_like(state[n]) if g is None else g for n, g in zip(trained, gradients, strict=True)}
        adam.step(state, given)
    return log
