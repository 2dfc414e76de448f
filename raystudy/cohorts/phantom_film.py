"""Rendering of a synthetic chest film: thicknesses add up, a gain curve turns them into grey, text goes on top.

In flow an anatomy (of a patient), a pose (of a film), disease signs and the hospital's marks; out flow 8-bit grey
pixels and the ground-truth masks of sign and text.  Everything is drawn in patient coordinates, x to the right of the
image, y down, both in -1..1 at the film's edges; lengths are in those units.  The forms are invented, the manner is
physics in miniature: soft tissue, bone and fluid attenuate, air does not, and attenuation along the beam adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from raystudy.cohorts.phantom_text import draw_text

Plane = NDArray[np.floating]  # (S, S)
SIGN_FLOOR = 0.25  # a sign's mask holds the pixels with more than this share of its strongest effect


@dataclass(frozen=True)
class Anatomy:
    """What all films of a patient share (lengths in patient coordinates)."""

    width: float  # of the thorax, about 1
    apex: float  # height of the lung apices
    dome: float  # height of the diaphragm
    heart: float  # size, about 1; an enlarged heart is beyond 1.25
    heart_tilt: float
    knob: float  # of the aorta
    rib_start: float
    rib_gap: float
    rib_slope: float
    bone: float  # density
    fat: float  # soft tissue over the lungs
    breast: float  # 0 for none
    gas: float  # stomach bubble
    vessels: NDArray[np.float32]  # (V, 5): x0, y0, x1, y1, calibre
    texture_seed: int


@dataclass(frozen=True)
class Pose:
    """How a film differs from the patient's others: position, breath and exposure."""

    shift: tuple[float, float]
    turn: float  # radians
    zoom: float
    breath: float  # the diaphragm's descent
    exposure: float  # about 1


@dataclass(frozen=True)
class Sign:
    """One disease sign: ``kind`` is a finding, ``places`` are (x, y, radius_x, radius_y, strength)."""

    kind: str
    places: tuple[tuple[float, float, float, float, float], ...]
    seed: int = 0


@dataclass(frozen=True)
class Marks:
    """What the hospital leaves on a film: text lines with their corner, collimator borders, gain curve."""

    text: tuple[str, ...] = ()
    corner: tuple[float, float] = (0.0, 0.0)  # of the text block, share of the side, towards the nearer edge
    letter: float = 0.06  # height, share of the side
    ring: bool = False  # a lead marker in its holder
    visibility: float = 1.0
    borders: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # left, top, right, bottom; share of the side
    border_tilt: float = 0.0
    gamma: float = 1.0
    contrast: float = 1.0
    black: float = 0.0
    noise: float = 1.0


@dataclass(frozen=True)
class Film:
    """A rendered film with its planted truth."""

    pixels: NDArray[np.uint8]  # S, S
    sign: NDArray[np.bool_]  # S, S
    tag: NDArray[np.bool_]  # S, S


def render(size: int, anatomy: Anatomy, pose: Pose, signs: tuple[Sign, ...], marks: Marks, noise_seed: int) -> Film:
    """Render one film.

    Returns
    -------
    Film : pixels (size, size) uint8 and masks (size, size) of what the signs changed and of the text.
    """
    x, y = _grid(size, pose)
    parts = _Chest(x, y, anatomy, pose, size)
    healthy = parts.thickness(heart=anatomy.heart)
    thickness = healthy
    for sign in signs:
        thickness = _add_sign(thickness, sign, parts, anatomy)
    effect = np.abs(thickness - healthy)
    sign_mask = effect > SIGN_FLOOR * effect.max() if effect.max() > 1e-3 else np.zeros_like(effect, bool)
    grey = 1.0 - np.exp(-1.15 * thickness * pose.exposure)
    rng = np.random.Generator(np.random.Philox(noise_seed))
    grain = rng.standard_normal((size, size), dtype=np.float32)
    blurred = gaussian_filter(grain, 0.8)
    grey += marks.noise * (0.004 * grain + 0.020 * blurred) * (0.5 + grey)
    grey = np.clip(marks.black + (grey - 0.5) * marks.contrast + 0.5, 0.0, 1.0) ** marks.gamma
    grey *= 1.0 - _outside_collimator(size, marks) * 0.97
    text = _text(size, marks)
    grey = np.clip(grey + (0.98 - grey) * text * marks.visibility, 0.0, 1.0)
    tag_mask = text * marks.visibility > 0.2
    pixels = np.round(grey * 255).astype(np.uint8)
    return Film(pixels, sign_mask, tag_mask)


def _grid(size: int, pose: Pose) -> tuple[Plane, Plane]:
    line = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    fx, fy = (line - pose.shift[0])[None, :], (line - pose.shift[1])[:, None]
    cos, sin = np.float32(np.cos(pose.turn) / pose.zoom), np.float32(np.sin(pose.turn) / pose.zoom)
    return cos * fx + sin * fy, -sin * fx + cos * fy


def _soft(distance: Plane, width: float) -> Plane:
    """1 inside (distance < 0), 0 outside, a smooth ramp of 4·width between."""
    ramp = np.clip(0.5 - distance * np.float32(0.25 / width), 0.0, 1.0)
    return ramp * ramp * (3 - 2 * ramp)


def _disc(x: Plane, y: Plane, cx: float, cy: float, rx: float, ry: float, edge: float) -> Plane:
    u, v = (x - cx) * np.float32(1 / rx), (y - cy) * np.float32(1 / ry)
    return _soft((np.sqrt(u * u + v * v) - 1) * np.float32(min(rx, ry)), edge)


class _Chest:
    """The organs of one film as planes in 0..1, made once and added up by thickness."""

    def __init__(self, x: Plane, y: Plane, a: Anatomy, pose: Pose, size: int) -> None:
        self.x, self.y, self.a = x / np.float32(a.width), y, a
        self.side = np.abs(self.x)
        self.size, self.pose = size, pose
        side = self.side
        right = _soft(self.x, 0.05)  # the patient's right lung, on the image's left, over the liver
        low = a.dome + pose.breath + 0.03 - 0.08 * right
        out = side - 0.36
        slope = np.where(out > 0, np.float32(1.25), np.float32(0.30))
        self.floor = low + slope * out * out  # the diaphragm's line: steep at the costophrenic angle
        above, under = np.float32(1 / (0.34 - a.apex)), np.float32(1 / 1.6)
        rise = (y - 0.34) * np.where(y < 0.34, above, under)
        tall = rise * rise * np.sqrt(np.abs(rise))
        across = (side - 0.375 - 0.075 * (y + 0.2)) * np.float32(1 / 0.370)
        across = across * across
        self.shell = (np.sqrt(across * np.sqrt(across) + tall) - 1.0) * np.float32(0.36)  # below 0 in the thorax
        self.above = _soft(y - self.floor, 0.007)
        self.lung = _soft(self.shell, 0.010) * self.above

    def thickness(self, heart: float) -> Plane:
        """Return attenuation along the beam; about 0.4 in a lung, 1.2 in the abdomen, 1.5 in the mediastinum."""
        x, y, side, a = self.x, self.y, self.side, self.a
        body = self._body()
        total = 0.93 + a.fat + 0.22 * np.clip(y + 0.3, 0, 1.3) + 0.16 * _soft(0.75 - side, 0.10) * _soft(y + 0.1, 0.12)
        total -= self.lung * (0.70 - 0.16 * np.clip(y, -0.5, 0.6) - 0.10 * _soft(-0.10 - self.shell, 0.05))
        total += 0.20 * (1 - self.above) * _soft(side - 0.80, 0.05)
        total -= a.gas * self._stomach()
        # the mediastinum: a band that widens downwards, with the aortic knob and the vena cava
        half = 0.125 + 0.045 * np.clip(y + 0.25, 0, 0.8) + 0.03 * _soft(y + 0.75, 0.06)
        band = _soft(side - half, 0.016)
        knob = _disc(x, y, 0.115, -0.27, a.knob, a.knob * 1.15, 0.012)
        trunk = _disc(x, y, 0.125, -0.10, 0.085, 0.14, 0.02)
        middle = np.maximum(band, np.maximum(knob, 0.7 * trunk))
        fade = _soft(y - self.floor - 0.05, 0.06)  # the abdomen's own thickness drowns it
        total += 0.40 * middle * (0.35 + 0.65 * fade) + 0.42 * self.heart(heart) * (1 - 0.55 * middle)
        bodies = np.cos(y * np.float32(2 * np.pi / 0.15) + np.float32(a.rib_start))
        total += np.float32(a.bone) * _soft(side - 0.078, 0.012) * (0.15 + 0.055 * bodies)
        windpipe = _soft(np.abs(x - 0.012 - 0.03 * (y + 0.6)) - 0.036, 0.012) * _soft(y + 0.20, 0.04)
        total -= 0.22 * windpipe
        total += self._bones()
        total += self._vessels() * self.lung
        if a.breast:
            total += 0.15 * a.breast * _disc(side, y, 0.45, 0.24, 0.33, 0.27, 0.05)
        return np.maximum(total * body, 0.0)

    def heart(self, size: float) -> Plane:
        """Return the heart's plane; it grows to the image's right and comes to lie on the diaphragm."""
        t = self.a.heart_tilt
        cx, cy = 0.085 + 0.11 * (size - 1), self.a.dome - 0.22 + self.pose.breath * 0.8
        cos, sin = np.float32(np.cos(t)), np.float32(np.sin(t))
        u = (self.x - cx) * cos + (self.y - cy) * sin
        v = (self.y - cy) * cos - (self.x - cx) * sin
        return _disc(u, v, 0.0, 0.0, 0.355 * size, 0.265 * (0.6 + 0.4 * size), 0.014)

    def _stomach(self) -> Plane:
        y = self.a.dome + self.pose.breath
        return _disc(self.x, self.y, 0.38, y + 0.17, 0.15, 0.075, 0.015)

    def _body(self) -> Plane:
        side, y = self.side, self.y
        away = np.clip(side - 0.22, 0, 1)
        shoulder = -0.93 + 0.20 * np.sqrt(away) + 0.16 * away * away * away
        arm = _soft(y - 0.10 + 0.9 * np.clip(1.12 - side, -0.3, 0.3), 0.05)
        wall = 0.955 - 0.06 * np.clip(y, -0.4, 0.5) + 0.4 * arm
        trunk = _soft(shoulder - y, 0.018) * _soft(side - wall, 0.014)
        return np.maximum(trunk, _soft(side - 0.25 - 0.05 * np.clip(y + 0.9, -0.2, 0.2), 0.018))

    def _bones(self) -> Plane:
        y, side, a, shell = self.y, self.side, self.a, self.shell
        s = np.clip((side - 0.05) * np.float32(1 / 0.80), 0, 1.1)
        s2 = s * s
        back = y - (np.float32(a.rib_slope) * s - 0.15 * np.sin(np.float32(3.4) * s) + 0.30 * s2 * s2)
        front = y + 0.10 - (0.75 * s - 0.52 * s2 * s)
        cage = _soft(shell - 0.025, 0.012) * (0.35 + 0.65 * self.above)
        ribs = 0.165 * self._row(back, a.rib_start, a.rib_gap, 0.25)
        ribs += 0.070 * self._row(front, a.rib_start + 2, a.rib_gap * 1.25, 0.30) * np.clip((s - 0.32) * 4, 0, 1)
        rim = np.clip(1 - np.abs(shell - 0.012) * np.float32(1 / 0.028), 0, 1)  # the cage seen along its wall
        bones = cage * ribs + 0.10 * rim * self.above
        line = -0.585 - 0.17 * s + 0.035 * np.sin(np.float32(6.0) * s)
        thick = 0.030 + 0.016 * np.abs(s - 0.5)
        bones += 0.25 * self._shaft((y - line) / thick) * _soft(side - 0.80, 0.01) * _soft(0.10 - side, 0.01)
        tip = y + 0.30
        bones += (
            0.09 * _soft(np.abs(side - 0.83 + 0.25 * tip) - 0.10 + 0.10 * tip, 0.012) * _soft(np.abs(tip) - 0.30, 0.02)
        )
        bones += 0.19 * _disc(side, y, 0.98, -0.57, 0.12, 0.13, 0.010)
        bones += 0.19 * _soft(np.abs(side - 1.00 - 0.25 * (y + 0.6)) - 0.075, 0.012) * _soft(-0.5 - y, 0.02)
        return np.float32(a.bone) * bones

    def _row(self, y: Plane, start: float, gap: float, half: float) -> Plane:
        """Return evenly spaced ribs from y = -0.85 downwards, brighter along their cortex."""
        number = (y + np.float32(0.80 + gap * start / 6)) * np.float32(1 / gap)
        return self._shaft((number - np.floor(number) - np.float32(0.5)) * np.float32(1 / half)) * (number > 0)

    def _shaft(self, offset: Plane) -> Plane:
        """Return a tube's profile: 0 on the axis and ±1 on the edges of `offset`."""
        o2 = np.minimum(offset * offset, 1.0)
        return (1 - o2 * o2 * o2) * (0.72 + 0.42 * o2)

    def _vessels(self) -> Plane:
        """Hila and vessels as blurred strokes, plus a fine interstitial texture that belongs to the patient."""
        size, pose, a = self.size, self.pose, self.a
        over = 2
        canvas = Image.new("L", (size * over, size * over))
        draw = ImageDraw.Draw(canvas)
        cos, sin = np.cos(pose.turn) * pose.zoom, np.sin(pose.turn) * pose.zoom
        ends = a.vessels[:, :4].reshape(-1, 2) * np.array([a.width, 1.0], np.float32)
        fx = (cos * ends[:, 0] - sin * ends[:, 1] + pose.shift[0] + 1) / 2 * size * over
        fy = (sin * ends[:, 0] + cos * ends[:, 1] + pose.shift[1] + 1) / 2 * size * over
        lines = np.stack([fx, fy], axis=1).reshape(-1, 4).tolist()
        for line, calibre in zip(lines, a.vessels[:, 4].tolist(), strict=True):
            width = max(1, round(calibre * size * over * 0.5))
            draw.line(line, fill=int(90 + 130 * min(1.0, calibre * 40)), width=width)
        strokes = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) * np.float32(1 / 255)
        hilum = _disc(self.side, self.y, 0.20, 0.0, 0.09, 0.15, 0.035)
        strokes = gaussian_filter(strokes, size / 420)
        return 0.22 * strokes + 0.14 * hilum + 0.035 * texture(size, a.texture_seed)


def texture(size: int, seed: int, cells: int = 24) -> Plane:
    """Return a smooth random field of about unit spread."""
    rng = np.random.Generator(np.random.Philox(seed))
    coarse = rng.standard_normal((cells // 3, cells // 3), dtype=np.float32)
    fine = rng.standard_normal((cells * 2, cells * 2), dtype=np.float32)
    return _enlarged(coarse, size) * 0.6 + _enlarged(fine, size) * 0.7


def _enlarged(field_: Plane, size: int) -> Plane:
    picture = Image.fromarray(field_)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC), np.float32)


def _add_sign(thickness: Plane, sign: Sign, chest: _Chest, a: Anatomy) -> Plane:
    x, y, side, lung = chest.x, chest.y, chest.side, chest.lung
    for cx, cy, rx, ry, strength in sign.places:
        half = (x > 0) == (cx > 0)
        if sign.kind == "Cardiomegaly":
            grown = np.clip(chest.heart(a.heart + strength) - chest.heart(a.heart), 0, 1)
            thickness = thickness + 0.42 * grown
        elif sign.kind == "Effusion":
            out = np.clip(side - 0.20, 0, 1)
            meniscus = a.dome + chest.pose.breath + cy - 0.55 * out * out
            thickness = thickness + np.float32(0.90 * strength) * _soft(meniscus - y, 0.022) * half * lung
        elif sign.kind == "Consolidation":
            fissure = cy + 0.20 * (side - 0.4)
            lobe = _soft(y - fissure, 0.010) * _soft(fissure - 0.45 - y, 0.10)
            thickness = thickness + np.float32(0.60 * strength) * lobe * half * lung
        elif sign.kind == "Nodule":
            thickness = thickness + np.float32(0.45 * strength) * _disc(x, y, cx, cy, rx, ry, 0.012)
        else:  # Pneumonia: a patchy cloud without an edge
            u, v = (x - cx) * np.float32(1 / rx), (y - cy) * np.float32(1 / ry)
            cloud = np.exp(-0.5 * np.square(u * u + v * v) / 1.5)
            patches = np.clip(0.85 + 0.35 * texture(chest.size, sign.seed, 18), 0.25, 1.7)
            thickness = thickness + np.float32(0.52 * strength) * cloud * patches * lung
    return thickness


def _outside_collimator(size: int, marks: Marks) -> Plane:
    left, top, right, bottom = marks.borders
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    u = line[None, :] + np.float32(marks.border_tilt) * (line[:, None] - 0.5)
    v = line[:, None] - np.float32(marks.border_tilt) * (line[None, :] - 0.5)
    inside = np.minimum(np.minimum(u - left, 1 - right - u), np.minimum(v - top, 1 - bottom - v))
    if max(marks.borders) <= 0:
        return np.zeros((size, size), np.float32)
    return _soft(inside, 0.004)


def _text(size: int, marks: Marks) -> Plane:
    """Return the text's coverage in 0..1."""
    if not marks.text or marks.visibility <= 0:
        return np.zeros((size, size), np.float32)
    return draw_text(size, marks.text, marks.corner, marks.letter, ring=marks.ring)
