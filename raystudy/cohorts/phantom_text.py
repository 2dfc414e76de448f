"""Burned-in text of a phantom film: drawn large and shrunk, so that letters are smooth at any film size."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LARGE = 64  # pixels of a letter while drawing


@lru_cache(maxsize=512)
def _block(lines: tuple[str, ...], ring: bool) -> Image.Image:
    font = ImageFont.load_default(LARGE)
    spacing = LARGE // 4
    probe = ImageDraw.Draw(Image.new("L", (1, 1)))
    text = "\n".join(lines)
    left, top, right, bottom = probe.multiline_textbbox((0, 0), text, font=font, spacing=spacing, stroke_width=3)
    pad = LARGE // 2 if ring else 4
    picture = Image.new("L", (int(right - left) + 2 * pad, int(bottom - top) + 2 * pad))
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((pad - left, pad - top), text, font=font, fill=255, spacing=spacing, stroke_width=3)
    if ring:
        draw.rounded_rectangle((4, 4, picture.width - 5, picture.height - 5), radius=LARGE // 2, outline=215, width=9)
    return picture


def draw_text(
    size: int, lines: tuple[str, ...], corner: tuple[float, float], letter: float, *, ring: bool
) -> NDArray[np.float32]:
    """Draw a block of text.

    Parameters
    ----------
    corner : of the block, as shares of the side; a coordinate above one half is the block's right or lower edge.
    letter : height of a letter, share of the side.

    Returns
    -------
    coverage : (size, size) float32 in 0..1.
    """
    block = _block(lines, ring)
    scale = letter * size / LARGE
    width, height = max(1, round(block.width * scale)), max(1, round(block.height * scale))
    small = block.resize((width, height), Image.Resampling.BOX)
    left = round(corner[0] * size) - (width if corner[0] > 0.5 else 0)
    top = round(corner[1] * size) - (height if corner[1] > 0.5 else 0)
    canvas = Image.new("L", (size, size))
    canvas.paste(small, (left, top))
    return np.asarray(canvas, np.float32) / np.float32(255)
