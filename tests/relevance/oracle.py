"""Relevance the slow way, in float64: every rule as it is written in method.md b.2, one map at a time.

Nothing of the package is used: batch norm stays a scale and a shift here, transposed convolutions are autograd's, and
the Jacobian forms build the dense matrix of a convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOW, HIGH = -2.117903930131004, 2.64


def jacobian(weight: Tensor, shape: tuple[int, ...], stride: int, padding: int) -> Tensor:
    """Dense matrix (outputs, inputs) of a convolution of one image of ``shape`` (I, H, W)."""
    columns = torch.eye(torch.Size(shape).numel(), dtype=weight.dtype).view(-1, *shape)
    return F.conv2d(columns, weight, stride=stride, padding=padding).flatten(1).T


def transposed(weight: Tensor, outer: Tensor, shape: torch.Size, stride: int, padding: int) -> Tensor:
    with torch.enable_grad():
        a = torch.zeros(shape, dtype=outer.dtype, requires_grad=True)
        y = F.conv2d(a, weight, stride=stride, padding=padding)
        (gradient,) = torch.autograd.grad(y, a, outer)
    return gradient


def alpha1_beta0(a: Tensor, weight: Tensor, relevance: Tensor, stride: int, padding: int) -> Tensor:
    """The published rule with both signs of the input."""
    ap, am, wp, wm = a.clamp(min=0), a.clamp(max=0), weight.clamp(min=0), weight.clamp(max=0)
    z = F.conv2d(ap, wp, None, stride, padding) + F.conv2d(am, wm, None, stride, padding)
    s = relevance / (z + 1e-12 * (z == 0))
    return ap * transposed(wp, s, a.shape, stride, padding) + am * transposed(wm, s, a.shape, stride, padding)


def gamma_rule(a: Tensor, weight: Tensor, relevance: Tensor, stride: int, padding: int, gamma: float) -> Tensor:
    """Generalised γ rule for a >= 0."""
    plain = F.conv2d(a, weight, None, stride, padding)
    out = torch.zeros_like(a)
    for w, mask in (
        (weight + gamma * weight.clamp(min=0), plain >= 0),
        (weight + gamma * weight.clamp(max=0), plain < 0),
    ):
        z = F.conv2d(a, w, None, stride, padding)
        s = torch.where(mask & (z != 0), relevance / torch.where(z == 0, 1.0, z), 0.0)
        out += a * transposed(w, s, a.shape, stride, padding)
    return out


def box(x: Tensor, weight: Tensor, relevance: Tensor, stride: int, padding: int) -> Tensor:
    low, high = torch.full_like(x, LOW), torch.full_like(x, HIGH)
    wp, wm = weight.clamp(min=0), weight.clamp(max=0)
    z = F.conv2d(x, weight, None, stride, padding)
    z = z - F.conv2d(low, wp, None, stride, padding) - F.conv2d(high, wm, None, stride, padding)
    s = relevance / (z + 1e-6 * z.sign() + 1e-6 * (z == 0))
    return (
        x * transposed(weight, s, x.shape, stride, padding)
        - low * transposed(wp, s, x.shape, stride, padding)
        - high * transposed(wm, s, x.shape, stride, padding)
    )


def residual(u: Tensor, v: Tensor, relevance: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    t = u + v
    s = relevance / (t + eps * t.sign() + eps * (t == 0))
    return u * s, v * s


def max_pool(a: Tensor, relevance: Tensor, kernel: int = 3, stride: int = 2, padding: int = 1) -> Tensor:
    """Loop over windows; the first maximum in row-major order takes all."""
    out = torch.zeros_like(a)
    _, channels, height, width = a.shape
    for c in range(channels):
        for i in range(relevance.shape[2]):
            for j in range(relevance.shape[3]):
                best, at = -float("inf"), (0, 0)
                for y in range(max(i * stride - padding, 0), min(i * stride - padding + kernel, height)):
                    for x in range(max(j * stride - padding, 0), min(j * stride - padding + kernel, width)):
                        if a[0, c, y, x] > best:
                            best, at = float(a[0, c, y, x]), (y, x)
                out[0, c, at[0], at[1]] += relevance[0, c, i, j]
    return out


def start(patch: Tensor, prototype: Tensor, power: int = 2, eps: float = 1e-12) -> Tensor:
    g = 1 / ((patch - prototype).abs() ** power + eps)
    return g / (g.sum() + 2e-12)


def _bn(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale.view(-1, 1, 1, 1), norm.bias.double() - norm.running_mean.double() * scale


class SlowPRP:
    """The whole map, one convolution after the other.

    ``gammas`` as in the rule set: add-on, topmost stage, next stage, ...; missing entries are z+.
    """

    def __init__(self, net: Any, power: int = 2, gammas: tuple[float, ...] = (), loss_eps: bool = True) -> None:
        self.net, self.power, self.gammas = net, power, gammas
        self.eps = 1e-6 if loss_eps else 0.0
        self.sums: dict[str, float] = {}

    def conv_back(self, a: Tensor, w: Tensor, r: Tensor, stride: int, padding: int, depth: int) -> Tensor:
        if depth < len(self.gammas):
            return gamma_rule(a, w, r, stride, padding, self.gammas[depth])
        return alpha1_beta0(a, w, r, stride, padding)

    @torch.no_grad()
    def __call__(self, x: Tensor, prototype: int) -> tuple[Tensor, Tensor, tuple[int, int], float]:
        """Map (H, W), feature relevance (D,), cell, score of one image (3, H, W)."""
        backbone = self.net.backbone
        x = x.double().unsqueeze(0)
        scale, shift = _bn(backbone.bn1)
        stem = backbone.conv1.weight.double() * scale
        stem_out = (F.conv2d(x, stem, None, 2, 3) + shift.view(1, -1, 1, 1)).relu()
        a = F.max_pool2d(stem_out, 3, 2, 1)
        undo = []
        stages = [s for s in ("layer1", "layer2", "layer3", "layer4") if hasattr(backbone, s)]
        for stage in stages:
            depth = len(stages) - stages.index(stage)
            for block in getattr(backbone, stage):
                inputs = []
                y = entry = a
                names = [i for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
                for i in names:
                    conv = getattr(block, f"conv{i}")
                    scale, shift = _bn(getattr(block, f"bn{i}"))
                    w = conv.weight.double() * scale
                    inputs.append((y, w, conv.stride[0], conv.padding[0]))
                    y = F.conv2d(y, w, None, conv.stride[0], conv.padding[0]) + shift.view(1, -1, 1, 1)
                    if i != names[-1]:
                        y = y.relu()
                side = None
                v = entry
                if block.downsample is not None:
                    conv = block.downsample[0]
                    scale, shift = _bn(block.downsample[1])
                    side = (entry, conv.weight.double() * scale, conv.stride[0], conv.padding[0])
                    v = F.conv2d(*side[:2], None, *side[2:]) + shift.view(1, -1, 1, 1)
                a = (y + v).relu()
                undo.append((stage, depth, inputs, side, y, v))
        first, second = self.net.add_on[0], self.net.add_on[2]
        w1, w2 = first.weight.double(), second.weight.double()
        hidden = F.conv2d(a, w1, first.bias.double()).relu()
        z = F.conv2d(hidden, w2, second.bias.double()).sigmoid()
        p = self.net.prototypes[prototype].double()  # D, 1, 1
        distance = (z[0] - p).square().sum(0)
        cell = int(distance.flatten().argmin())
        h, w = divmod(cell, distance.shape[1])
        score = float(((distance[h, w] + 1) / (distance[h, w] + 1e-4)).log())
        features = start(z[0, :, h, w], p[:, 0, 0], self.power)
        r = torch.zeros_like(z)
        r[0, :, h, w] = features
        self.sums = {"features": float(r.sum())}
        r = self.conv_back(hidden, w2, r, 1, 0, 0)
        r = self.conv_back(a, w1, r, 1, 0, 0)
        above = None
        for stage, depth, inputs, side, u, v in reversed(undo):
            if stage != above:
                self.sums[stage] = float(r.sum())
                above = stage
            r_u, r_v = residual(u, v, r, self.eps)
            for entry, weight, stride, padding in reversed(inputs):
                r_u = self.conv_back(entry, weight, r_u, stride, padding, depth)
            if side is not None:
                r_v = self.conv_back(side[0], side[1], r_v, side[2], side[3], depth)
            r = r_u + r_v
        self.sums["maxpool"] = float(r.sum())
        with torch.enable_grad():  # equals max_pool above, which is too slow for a whole stem
            leaf = stem_out.clone().requires_grad_()
            (r,) = torch.autograd.grad(F.max_pool2d(leaf, 3, 2, 1), leaf, r)
        pixels = box(x, stem, r, 2, 3)
        return pixels[0].sum(0), features, (h, w), score
