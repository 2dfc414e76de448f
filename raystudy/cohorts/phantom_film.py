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
    grey += marks.noise * (0.010 * grain + 0.025 * blurred) * (0.5 + grey)
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
    """1 inside (distance < 0), 0 outside, a ramp of about 2·width between."""
    return np.clip(0.5 - distance / (2 * width), 0.0, 1.0) if width < 0.02 else 0.5 * (1 - np.tanh(distance / width))


def _disc(x: Plane, y: Plane, cx: float, cy: float, rx: float, ry: float, edge: float) -> Plane:
    radius = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2)
    return _soft((radius - 1) * min(rx, ry), edge)


class _Chest:
    """The organs of one film as planes in 0..1, made once and added up by thickness."""

    def __init__(self, x: Plane, y: Plane, a: Anatomy, pose: Pose, size: int) -> None:
        self.x, self.y, self.a = x / np.float32(a.width), y, a
        self.side = np.abs(self.x)
        self.size, self.pose = size, pose
        x, side = self.x, self.side
        right = x < 0  # the patient's right lung is on the image's left; the liver lifts its dome
        centre = np.where(right, 0.40, 0.43).astype(np.float32)
        top = a.dome + pose.breath + np.where(right, -0.05, 0.02).astype(np.float32)
        self.floor = top + 0.62 * (side - centre) ** 2 * (1 + 1.6 * (side > centre))  # the diaphragm's line
        across = np.abs((side - 0.43) / 0.39)
        along = np.abs((y - 0.18) / (0.18 - a.apex))
        below = np.abs((y - 0.18) / 1.3)
        up = np.where(y < 0.18, along, below)
        shell = (across**2.6 + up**2.2) ** 0.4 - 1.0
        self.lung = _soft(shell * 0.36, 0.018) * _soft(y - self.floor, 0.014)
        self.cage = _soft(shell * 0.36 - 0.05, 0.03)  # ribs reach a little beyond the lungs and below the diaphragm

    def thickness(self, heart: float) -> Plane:
        """Return attenuation along the beam; about 0.3 in a lung, 1.2 in the abdomen, 2 behind the heart."""
        x, y, side, a = self.x, self.y, self.side, self.a
        body = self._body()
        total = body * (0.95 + 0.30 * np.clip(y + 0.2, 0, 1.2) + a.fat)
        total -= self.lung * (0.80 + 0.10 * y) * body
        below = _soft(self.floor - y, 0.02) * _soft(side - 0.86, 0.04)
        total += 0.32 * below * body
        bubble = _disc(x, y, 0.40, a.dome + self.pose.breath + 0.20, 0.15, 0.07, 0.03)
        total -= a.gas * bubble
        # mediastinum: a band with the aortic knob on the image's right and the vena cava on its left
        half = 0.135 + 0.05 * np.clip(y + 0.1, 0, 1)
        knob = _disc(x, y, 0.12, -0.30, a.knob, a.knob * 1.1, 0.02)
        band = _soft(side - half, 0.02) * _soft(-0.95 - y, 0.1)
        total += 0.62 * np.maximum(band, knob) * body
        total += 0.48 * self.heart(heart) * (1 - 0.6 * band)
        spine = _soft(side - 0.085, 0.02)
        discs = 0.5 + 0.5 * np.cos(y * (2 * np.pi / 0.145) + a.rib_start)
        total += a.bone * spine * (0.16 + 0.10 * discs)
        trachea = _soft(np.abs(x - 0.012 - 0.02 * (y + 0.6)) - 0.038, 0.015) * _soft(y + 0.22, 0.04)
        total -= 0.34 * trachea * body
        total += self._bones() * body
        total += self._vessels() * self.lung
        if a.breast:
            total += 0.17 * a.breast * _disc(side, y, 0.46, 0.26, 0.34, 0.27, 0.06)
        return np.maximum(total, 0.0)

    def heart(self, size: float) -> Plane:
        """Return the heart's plane; its right border hardly moves when it grows."""
        t = self.a.heart_tilt
        cx, cy = 0.09 + 0.09 * (size - 1), 0.30 + self.pose.breath * 0.7
        u = (self.x - cx) * np.cos(t) + (self.y - cy) * np.sin(t)
        v = -(self.x - cx) * np.sin(t) + (self.y - cy) * np.cos(t)
        return _disc(u, v, 0.0, 0.0, 0.335 * size, 0.27 * (0.6 + 0.4 * size), 0.025)

    def _body(self) -> Plane:
        side, y = self.side, self.y
        shoulder = -0.90 + 0.20 * np.clip((side - 0.20) / 0.55, 0, 2) ** 1.4
        trunk = _soft(shoulder - y, 0.03) * _soft(side - (0.97 + 0.05 * np.clip(-y, -1, 0.6)), 0.03)
        neck = _soft(side - 0.24, 0.04)
        return np.maximum(trunk, neck)

    def _bones(self) -> Plane:
        y, side, a = self.y, self.side, self.a
        s = np.clip((side - 0.06) / 0.76, 0, 1.1)
        turn = np.float32(a.rib_slope) * s - 0.17 * np.sin(np.pi * np.minimum(s * 1.05, 1)) + 0.20 * s**4
        back = self._rib_row(y - turn, a.rib_start, a.rib_gap, 0.30)
        fall = -0.42 * (s - 0.9) ** 2 - 0.40 * s
        front = self._rib_row(y + fall - 0.25, a.rib_start + 0.4, a.rib_gap * 1.22, 0.34)
        ribs = self.cage * (0.20 * back + 0.085 * front * (s > 0.28) * np.clip((s - 0.28) * 5, 0, 1))
        line = -0.60 - 0.10 * s + 0.055 * np.sin(2 * np.pi * s * 0.95)
        clavicle = self._tube(y - line, 0.034) * _soft(side - 0.80, 0.03) * _soft(0.11 - side, 0.02)
        blade = _soft(np.abs(side - 0.86 + 0.22 * (y + 0.3)) - 0.11, 0.03) * _soft(np.abs(y + 0.32) - 0.33, 0.06)
        ball = _disc(side, y, 0.97, -0.60, 0.14, 0.14, 0.02)
        return np.float32(a.bone) * (ribs + 0.30 * clavicle + 0.10 * blade + 0.20 * ball)

    def _rib_row(self, y: Plane, start: float, gap: float, half: float) -> Plane:
        """Evenly spaced bands below y = -0.85; a cortex brighter than the marrow."""
        number = (y + 0.85) / np.float32(gap) + np.float32(start / 6)
        offset = np.abs(number - np.floor(number) - 0.5) / half  # 0 on the rib's axis, 1 on its edge
        cortex = np.exp(-(((offset - 0.80) / 0.20) ** 2))
        return (_soft(offset - 1, 0.12) * 0.62 + 0.38 * cortex) * (number > 0.4)

    def _tube(self, distance: Plane, half: float) -> Plane:
        offset = np.abs(distance) / half
        return _soft(offset - 1, 0.15) * 0.7 + 0.4 * np.exp(-(((offset - 0.85) / 0.18) ** 2))

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
        for i, calibre in enumerate(a.vessels[:, 4]):
            points = [(fx[2 * i], fy[2 * i]), (fx[2 * i + 1], fy[2 * i + 1])]
            width = max(1, round(float(calibre) * size * over * 0.5))
            draw.line(points, fill=int(90 + 130 * min(1.0, float(calibre) * 40)), width=width)
        strokes = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255
        hilum = _disc(self.side, self.y, 0.19, 0.0, 0.09, 0.16, 0.06)
        return 0.26 * gaussian_filter(strokes, size / 256) + 0.16 * hilum + 0.07 * texture(size, a.texture_seed)


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
    x, y, side = chest.x, chest.y, chest.side
    for cx, cy, rx, ry, strength in sign.places:
        if sign.kind == "Cardiomegaly":
            heart = a.heart + strength
            grown = chest.heart(heart) - chest.heart(a.heart)
            thickness = thickness + 0.48 * np.clip(grown, 0, 1) * (0.25 + 0.75 * chest.lung)
        elif sign.kind == "Effusion":
            level = chest.a.dome + chest.pose.breath + cy
            meniscus = level - 0.9 * np.clip(side - 0.35, 0, 1) ** 2
            fluid = _soft(meniscus - y, 0.03) * (np.sign(x) == np.sign(cx)) * _soft(0.16 - side, 0.05)
            thickness = thickness + strength * 0.62 * fluid * chest.cage * chest.lung
        elif sign.kind == "Consolidation":
            lobe = (
                _soft(y - (cy + 0.22 * (side - 0.4)), 0.012) * (np.sign(x) == np.sign(cx)) * _soft(cy - 0.42 - y, 0.1)
            )
            thickness = thickness + strength * 0.42 * lobe * chest.lung
        elif sign.kind == "Nodule":
            thickness = thickness + strength * 0.40 * _disc(x, y, cx, cy, rx, ry, 0.015)
        else:  # Pneumonia: a patchy cloud without an edge
            cloud = np.exp(-0.5 * (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2) ** 1.3)
            patches = np.clip(0.85 + 0.35 * texture(chest.size, sign.seed, 18), 0.25, 1.7)
            thickness = thickness + strength * 0.46 * cloud * patches * chest.lung
    return thickness.astype(np.float32)


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
