"""One forward pass that keeps what relevance needs, and the pass back for many prototypes at once (method.md b.6).

The forward pass of a group of images stores, per convolution, the factor that turns ``g`` of its output into S = R/Z.
The pass back carries ``g`` with ``R = a * g`` (rules.py), so that a convolution costs one multiplication and one input
gradient.  Shapes: N images, K prototypes of each; ``g`` is (N K, C, h, w) in channels-last memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from raystudy.relevance import rules, winograd
from raystudy.relevance.canonise import Block, Conv, Network
from raystudy.relevance.condense import condense
from raystudy.relevance.gradients import InputGradient, Size, input_gradient

WIDEST = 256  # channels: the top's few tiles are not worth 38 MB of transformed kernels a convolution
CONDENSE_BELOW = 1e-4  # with a finer tolerance only the top is worth a look: there equal prototypes show


@dataclass(frozen=True)
class ConvRule:
    """A convolution as its rule needs it: plain output and Z of an input, input gradient of the rule's weights."""

    conv: Conv
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]  # a >= 0 to output with bias (N, O, h, w), Z (N, m O, h, w)
    gradient: InputGradient

    @classmethod
    def of(cls, conv: Conv, gamma: float, dtype: torch.dtype) -> ConvRule:
        """Prepare z+ (``gamma`` infinite; m = 1) or the γ rule (m = 2) in the precision of the pass back."""
        zplus = gamma == float("inf")
        weights = rules.zplus_weights(conv.weight) if zplus else rules.gamma_weights(conv.weight, gamma)
        weights, weight = weights.to(dtype), conv.weight
        gradient = input_gradient(weights, conv.stride, conv.padding)
        tiled = (conv.stride, conv.padding) == (1, 1) and winograd.pays(weight) and max(weight.shape[:2]) <= WIDEST
        if tiled and zplus and dtype == weight.dtype:
            return cls(conv, winograd.output_and_positive_sum(weight, conv.bias), gradient)
        weights, weight = (w.contiguous(memory_format=torch.channels_last) for w in (weights, weight))
        conv = Conv(weight, conv.bias, conv.stride, conv.padding)
        plain = winograd.convolution(weight) if tiled else None

        def forward(a: Tensor) -> tuple[Tensor, Tensor]:
            if plain is None:
                y = F.conv2d(a, weight, conv.bias, conv.stride, conv.padding)
            else:
                y = plain(a).add_(conv.bias.view(1, -1, 1, 1))
            z = F.conv2d(a.to(dtype), weights, None, conv.stride, conv.padding)
            return y, z if zplus else rules.gamma_denominators(z)

        return cls(conv, forward, gradient)

    @staticmethod
    def factor(share: Tensor, z: Tensor) -> Tensor:
        """Return ``share / Z`` for each copy of the outputs, (N, m O, h, w)."""
        copies = z.shape[1] // share.shape[1]
        share = share.to(z.dtype)
        return rules.divide(share if copies == 1 else share.repeat(1, copies, 1, 1), z)

    def back(self, g: Tensor, factor: Tensor, size: Size) -> Tensor:
        """Hand ``g`` of the output (N K, O, h, w) to the input (N K, I, H, W)."""
        copies = factor.shape[1] // g.shape[1]
        outer = times(g if copies == 1 else g.repeat(1, copies, 1, 1), factor)
        return self.gradient(outer, size)


def per_image(g: Tensor, n: int) -> Tensor:
    """View (N K, C, h, w) as (N, K, C, h, w)."""
    return g.view(n, -1, *g.shape[1:])


def times(g: Tensor, factor: Tensor) -> Tensor:
    """Multiply (N K, C, h, w) by (N, C, h, w), each image's factor with all of its prototypes."""
    n = factor.shape[0]
    return (per_image(g, n) * factor.unsqueeze(1)).flatten(0, 1)


@dataclass(frozen=True)
class BlockRule:
    """A residual block with its rules."""

    stage: str
    convs: tuple[ConvRule, ...]
    shortcut: ConvRule | None

    @classmethod
    def of(cls, block: Block, gamma: float, dtype: torch.dtype) -> BlockRule:
        """Prepare each convolution of a block."""
        convs = tuple(ConvRule.of(conv, gamma, dtype) for conv in block.convs)
        shortcut = None if block.shortcut is None else ConvRule.of(block.shortcut, gamma, dtype)
        return cls(block.stage, convs, shortcut)


@dataclass(frozen=True)
class BlockRecord:
    """What a block's forward pass leaves: its output and the factors of the pass back."""

    output: Tensor  # (N, C, h, w)
    total: Tensor  # (), sum of the convolutions' outputs and Z: finite where they are
    sizes: tuple[Size, ...]  # of each convolution's input
    factors: tuple[Tensor, ...]
    shortcut: Tensor  # factor of the shortcut convolution, or the share that passes an identity


def record_block(rule: BlockRule, x: Tensor) -> BlockRecord:
    """Run a block on ``x`` >= 0 and keep its factors."""
    sizes: list[Size] = []
    denominators: list[Tensor] = []
    shares: list[Tensor] = []
    total = x.new_zeros(())
    a = y = x
    for i, conv in enumerate(rule.convs):
        if i:
            a = y.relu_()
            shares.append(a)
        sizes.append((a.shape[2], a.shape[3]))
        y, z = conv.forward(a)
        total = total + y.sum() + z.sum()
        denominators.append(z)
    if rule.shortcut is None:
        v, over = x, None
    else:
        v, over = rule.shortcut.forward(x)
        total = total + v.sum() + over.sum()
    t = y + v
    share = rules.residual_share(t)
    factors = [ConvRule.factor(s, z) for s, z in zip([*shares, y * share], denominators, strict=True)]
    if rule.shortcut is None or over is None:
        shortcut = share.to(factors[-1].dtype)
    else:
        shortcut = ConvRule.factor(v * share, over)
    return BlockRecord(t.relu_(), total, tuple(sizes), tuple(factors), shortcut)


def back_block(rule: BlockRule, record: BlockRecord, g: Tensor) -> Tensor:
    """Hand ``g`` of a block's output to its input."""
    inner = g
    for conv, factor, size in zip(reversed(rule.convs), reversed(record.factors), reversed(record.sizes), strict=True):
        inner = conv.back(inner, factor, size)
    if rule.shortcut is None:
        n = record.shortcut.shape[0]
        return per_image(inner, n).addcmul_(per_image(g, n), record.shortcut.unsqueeze(1)).flatten(0, 1)
    return inner.add_(rule.shortcut.back(g, record.shortcut, record.sizes[0]))


@dataclass(frozen=True)
class Tape:
    """What the forward pass of N images leaves."""

    images: Tensor  # (N, 3, H, W)
    stem_size: Size
    winners: Tensor  # (N, C, h, w) position of each pooling window's maximum
    pooled: Tensor  # (N, C, h, w)
    pool_factor: Tensor  # pooled / stabilised Z of the stem at the winner
    blocks: tuple[BlockRecord, ...]
    hidden: Tensor  # (N, D', h, w), add-on, after the ReLU
    features: Tensor  # (N, D, h, w), after the sigmoid


class RuleNetwork:
    """A canonised network with a rule set in a precision: prepared once, used for many images.

    ``network`` is in the precision of the forward pass, ``dtype`` that of Z and of the pass back.  ``tolerance`` lets
    maps of one image be combined from others (condense.py); 0 carries every map.
    """

    def __init__(self, network: Network, rule_set: rules.RuleSet, dtype: torch.dtype, tolerance: float = 0.0) -> None:
        self.network = network
        self.dtype = dtype
        self.tolerance = tolerance
        self.stem = Conv(
            network.stem.weight.contiguous(memory_format=torch.channels_last), network.stem.bias, network.stem.stride,
            network.stem.padding,
        )  # fmt: skip
        self.stem_gradient = input_gradient(
            rules.box_weights(network.stem.weight).to(dtype), network.stem.stride, network.stem.padding
        )
        stages = network.stages
        self.blocks = tuple(BlockRule.of(b, rule_set.gamma(b.stage, stages), dtype) for b in network.blocks)
        # The add-on acts on one cell: its rules stay in the precision of the forward pass.
        add_on_gamma = rule_set.gamma("add_on", stages)
        self.add_on = tuple(ConvRule.of(c, add_on_gamma, network.stem.weight.dtype) for c in network.add_on)
        self._box_z: dict[Size, Tensor] = {}

    def _box_denominator(self, size: Size) -> Tensor:
        """``conv(L, w+) + conv(H, w-)`` with zero padding, (1, O, h, w); the same for every image of a size."""
        if size not in self._box_z:
            weight = self.stem.weight
            ones = weight.new_ones(1, weight.shape[1], *size)
            low = F.conv2d(ones, weight.clamp(min=0), None, self.stem.stride, self.stem.padding)
            high = F.conv2d(ones, weight.clamp(max=0), None, self.stem.stride, self.stem.padding)
            self._box_z = {size: rules.BOX_LOW * low + rules.BOX_HIGH * high}
        return self._box_z[size]

    def record(self, images: Tensor) -> Tape:
        """Run the forward pass of (N, 3, H, W) normalised images.

        Raises
        ------
        ValueError : the network overflows on them; a ReLU, a sigmoid or a division would hide it from the maps.
        """
        x = images.to(self.stem.weight.dtype).contiguous(memory_format=torch.channels_last)
        plain = F.conv2d(x, self.stem.weight, None, self.stem.stride, self.stem.padding)  # N, 64, H/2, W/2
        total = plain.sum()
        z = rules.stabilise(plain - self._box_denominator((x.shape[2], x.shape[3])), rules.BOX_EPS)
        pool = self.network.pool
        a = plain.add_(self.stem.bias.view(1, -1, 1, 1)).relu_()
        pooled, winners = F.max_pool2d(a, pool.kernel, pool.stride, pool.padding, return_indices=True)
        z_at_winner = z.flatten(2).gather(2, winners.flatten(2)).view(winners.shape)
        pool_factor = (pooled / z_at_winner).to(self.dtype).contiguous(memory_format=torch.channels_last)
        blocks: list[BlockRecord] = []
        a_block = pooled
        for rule in self.blocks:
            blocks.append(record_block(rule, a_block))
            a_block = blocks[-1].output
            total = total + blocks[-1].total
        first, second = (rule.conv for rule in self.add_on)
        hidden = F.conv2d(a_block, first.weight, first.bias)
        total = total + hidden.sum()
        features = F.conv2d(hidden.relu_(), second.weight, second.bias)
        if not bool(torch.isfinite(total + features.sum())):
            raise ValueError("activations must be finite: the network overflows on these images")
        features.sigmoid_()
        stem_size = (a.shape[2], a.shape[3])
        return Tape(x, stem_size, winners, pooled, pool_factor, tuple(blocks), hidden, features)

    def _add_on_back(self, tape: Tape, cells: Tensor, start: Tensor) -> Tensor:
        """Relevance (N, K, D) of the features at ``cells`` (N, K) to ``g`` (N K, C, h, w) of the last block."""
        n, k = cells.shape
        top = tape.blocks[-1].output  # N, C, h, w
        at = cells.unsqueeze(1)

        def pick(a: Tensor) -> Tensor:
            values = a.flatten(2).gather(2, at.expand(-1, a.shape[1], -1))  # N, C, K
            return values.transpose(1, 2).reshape(n * k, -1, 1, 1)

        relevance = start.to(top.dtype).reshape(n * k, -1, 1, 1)
        hidden, top_cell = pick(tape.hidden), pick(top)
        first, second = self.add_on
        factor = ConvRule.factor(torch.ones_like(relevance), second.forward(hidden)[1])
        g = second.back(relevance, factor, (1, 1))
        g = first.back(g, ConvRule.factor(hidden, first.forward(top_cell)[1]), (1, 1))  # N K, C, 1, 1
        spread = g.new_zeros(n * k, g.shape[1], top.shape[2], top.shape[3]).to(memory_format=torch.channels_last)
        spread.flatten(2).scatter_(2, cells.reshape(-1, 1, 1).expand(-1, g.shape[1], 1), g.flatten(2))
        return spread.to(self.dtype)

    def relevance(self, tape: Tape, cells: Tensor, start: Tensor, layers: dict[str, Tensor] | None = None) -> Tensor:
        """Relevance at the pixels, summed over channels.

        Parameters
        ----------
        tape : of N images.
        cells : (N, K) flat positions of the feature grid.
        start : (N, K, D) relevance of the features at those cells.
        layers : filled, where given, with the relevance (N, K, C, h, w) at each stage's and the max pool's output.

        Returns
        -------
        (N, K, H, W) in the precision of the pass back.
        """
        n = len(cells)
        g = self._add_on_back(tape, cells, start)

        def note(name: str, a: Tensor) -> None:
            if layers is not None:
                layers[name] = per_image(times(g, a.to(g.dtype)), n)

        stage, mix = None, None  # mix (N, K, r): the K maps from the r that are carried
        for rule, record in zip(reversed(self.blocks), reversed(tape.blocks), strict=True):
            if rule.stage != stage:
                note(rule.stage, record.output)
                if layers is None and (stage is None or self.tolerance >= CONDENSE_BELOW):
                    g, mix = self._condense(g, record.output, mix)
                stage = rule.stage
            g = back_block(rule, record, g)
        note("maxpool", tape.pooled)
        s = rules.scatter_to_winners(times(g, tape.pool_factor), tape.winners, tape.stem_size, self.network.pool)
        size = (tape.images.shape[2], tape.images.shape[3])
        gradients = per_image(self.stem_gradient(s, size), n)
        maps = rules.box_combine(tape.images.unsqueeze(1), gradients)
        return maps if mix is None else torch.einsum("nkr,nrhw->nkhw", mix.to(maps.dtype), maps)

    def _condense(self, g: Tensor, a: Tensor, mix: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Go on with as few maps as the tolerance allows; ``a`` is the activation where ``g`` is."""
        n = len(a)
        if len(g) == n or not self.tolerance:
            return g, mix
        fewer = condense(per_image(times(g, a.to(g.dtype)), n), self.tolerance)
        if fewer is None:
            return g, mix
        chosen, coefficients = fewer
        kept = per_image(g, n)[torch.arange(n, device=g.device).unsqueeze(1), chosen].flatten(0, 1)
        kept = kept.contiguous(memory_format=torch.channels_last)
        return kept, coefficients if mix is None else mix @ coefficients
