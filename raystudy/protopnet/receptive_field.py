"""Which pixels a cell of the feature grid can see (method.md a.1).

In flow a network and an image size; out flow the boxes that the published push writes down.  For a ResNet34 the box is
the whole image, so that its crop carries no information; this is why relevance is needed.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from raystudy.protopnet.model import ProtoPNet


class ReceptiveField(NamedTuple):
    """The grid of cells: how many a side, pixels between two of them, pixels that one sees, centre of the first."""

    cells: int
    jump: int
    size: int
    first_centre: float

    def box(self, row: int, col: int, image_size: int) -> tuple[int, int, int, int]:
        """Return (top, bottom, left, right) of what a cell sees, clipped to the image, ends exclusive."""

        def span(index: int) -> tuple[int, int]:
            centre = self.first_centre + self.jump * index
            return max(int(centre - self.size / 2), 0), min(int(centre + self.size / 2), image_size)

        return (*span(row), *span(col))


def receptive_field(model: ProtoPNet, image_size: int) -> ReceptiveField:
    """Follow kernel, stride and padding through stem, pool and blocks, without the shortcuts, which see less.

    Parameters
    ----------
    model : its backbone is read.
    image_size : side of a square image in pixels.
    """
    field = ReceptiveField(image_size, 1, 1, 0.5)
    shortcuts = [block.downsample for block in model.backbone.modules() if hasattr(block, "downsample")]
    skipped = {layer for shortcut in shortcuts if isinstance(shortcut, nn.Module) for layer in shortcut.modules()}
    for layer in model.backbone.modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d) and layer not in skipped:
            field = _through(field, *(_side(v) for v in (layer.kernel_size, layer.stride, layer.padding)))
    return field


def _through(field: ReceptiveField, kernel: int, stride: int, padding: int) -> ReceptiveField:
    return ReceptiveField(
        (field.cells - kernel + 2 * padding) // stride + 1,
        field.jump * stride,
        field.size + (kernel - 1) * field.jump,
        field.first_centre + ((kernel - 1) / 2 - padding) * field.jump,
    )


def _side(value: int | tuple[int, ...] | str) -> int:
    return value if isinstance(value, int) else int(value[0])
