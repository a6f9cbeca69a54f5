"""Garments: their vocabulary, cut, cloth texture, and the flat-lay product pictures made of them."""

import functools
import math
from dataclasses import dataclass

import cv2
import numpy as np

from loomvideo.pipelines.sample_data import canvas as cv

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 34, 46),
    "yellow": (248, 206, 58),
    "green": (46, 148, 84),
    "blue": (42, 88, 196),
    "purple": (126, 62, 168),
    "pink": (243, 132, 176),
    "black": (40, 38, 46),
    "white": (244, 242, 236),
}
PATTERNS: dict[str, str] = {"plain": "plain", "stripes": "striped", "dots": "dotted", "checks": "checked"}
# Outfits with much cloth come first and more often: an edit should change a large part of the frame.
OUTFIT_SHARES = (0.3, 0.25, 0.12, 0.2, 0.13)
OUTFITS: dict[str, tuple[str, ...]] = {
    "dress": ("dress",),
    "coat": ("coat",),
    "suit": ("jacket", "trousers"),
    "blouse": ("shirt", "skirt"),
    "casual": ("sweater", "trousers"),
}
LOWER = ("trousers", "skirt")

# Texture area in head units, the same for every garment.
LEFT, TOP, RIGHT, BOTTOM = -2.2, 1.0, 2.2, 7.4
WAIST, HIP = 2.95, 3.75


@dataclass(frozen=True)
class Garment:
    """One garment as the captions describe it."""

    type: str
    colour: str
    pattern: str = "plain"
    accent: str = "white"

    @property
    def phrase(self) -> str:
        """For captions: "red striped dress"."""
        words = [self.colour] + ([PATTERNS[self.pattern]] if self.pattern != "plain" else []) + [self.type]
        return " ".join(words)

    def attributes(self) -> dict[str, str]:
        """For `extra.garments`."""
        values = {"type": self.type, "colour": self.colour, "pattern": self.pattern}
        return values if self.pattern == "plain" else values | {"accent": self.accent}


def outline(garment_type: str, flare: float) -> np.ndarray:
    """Body of a garment [n, 2] in head units, in the frame of the torso.

    Args:
        garment_type: One of the types in ``OUTFITS``.
        flare: 0..1, how wide skirts and coats fall.
    """
    collar, shoulder = cv.corner(0.24, 1.36), (0.80, 1.50)
    arm = [(0.86, 1.72), (0.68, 2.10)]
    if garment_type == "dress":
        hem = 1.45 + 0.5 * flare
        right = [*cv.corner(0.42, 1.40), (0.74, 1.52), (0.70, 2.0), (0.60, 2.35), (0.46, WAIST), (0.80, HIP),
                 (hem * 0.8, 4.7), *cv.corner(hem, 5.55), (hem * 0.5, 5.68)]  # fmt: skip
        return cv.smooth([(0, 1.78), *cv.mirrored(right)])
    if garment_type == "coat":
        hem = 1.12 + 0.35 * flare
        right = [*collar, shoulder, *arm, (0.66, WAIST), (0.92, HIP), *cv.corner(hem, 5.6), (hem * 0.4, 5.68)]
    elif garment_type == "jacket":
        right = [*collar, shoulder, *arm, (0.58, WAIST), *cv.corner(0.84, 3.95), (0.4, 4.03)]
    elif garment_type == "sweater":
        right = [*collar, shoulder, *arm, (0.72, WAIST), (0.82, 3.7), *cv.corner(0.74, 3.95), (0.35, 4.0)]
    elif garment_type == "shirt":
        right = [*collar, shoulder, *arm, (0.50, WAIST), *cv.corner(0.62, 3.2), (0.3, 3.25)]
    elif garment_type == "skirt":
        hem = 1.3 + 0.5 * flare
        right = [*cv.corner(0.46, WAIST - 0.1), (0.82, HIP), *cv.corner(hem, 5.45), (hem * 0.5, 5.58)]
    elif garment_type == "trousers":
        right = [*cv.corner(0.48, WAIST - 0.1), (0.76, HIP), (0.76, 4.3), (0.3, 4.45)]
    else:
        raise ValueError(f"no garment type {garment_type!r}")
    return cv.smooth(cv.mirrored(right))


def sleeve_length(garment_type: str) -> tuple[float, float]:
    """How much of the upper arm and the forearm a garment covers, 0..1 each."""
    return {"dress": (0.55, 0.0), "shirt": (1.0, 0.0)}.get(garment_type, (1.0, 0.92))


@functools.lru_cache(maxsize=32)
def cloth(garment: Garment, pixels_per_unit: float) -> tuple[np.ndarray, np.ndarray]:
    """Cloth texture of a garment: base colour, pattern, and the shading and folds of its cut.

    Returns:
        Texture uint8 [h, w, 3] and the 2x3 matrix from its pixels to head units.
    """
    width, height = round((RIGHT - LEFT) * pixels_per_unit), round((BOTTOM - TOP) * pixels_per_unit)
    x = LEFT + (np.arange(width) + 0.5) / pixels_per_unit
    y = TOP + (np.arange(height) + 0.5) / pixels_per_unit
    share = _pattern_share(garment.pattern, x, y)[..., None]
    colour = (1 - share) * np.array(COLOURS[garment.colour]) + share * np.array(COLOURS[garment.accent])
    shade = _shading(garment.type, x, y)[..., None]
    lit = np.where(shade > 1, 255 - (255 - colour) * (2 - shade), colour * shade)
    to_units = np.array([[1 / pixels_per_unit, 0, LEFT], [0, 1 / pixels_per_unit, TOP]])
    return np.clip(np.round(lit), 0, 255).astype(np.uint8), to_units


def _pattern_share(pattern: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of the accent colour [h, w]."""
    grid_x, grid_y = np.meshgrid(x, y)
    if pattern == "plain":
        return np.zeros_like(grid_x)
    edge = 0.03
    if pattern == "stripes":
        return _step(0.13 - np.abs(_wrap(grid_x, 0.5)), edge)
    if pattern == "dots":
        row = np.floor(grid_y / 0.44)
        distance = np.hypot(_wrap(grid_x + 0.26 * (row % 2), 0.52), _wrap(grid_y - 0.22, 0.44))
        return _step(0.14 - distance, edge)
    if pattern == "checks":
        columns = _step(0.15 - np.abs(_wrap(grid_x, 0.6)), edge)
        rows = _step(0.15 - np.abs(_wrap(grid_y, 0.6)), edge)
        return 0.5 * (columns + rows)
    raise ValueError(f"no pattern {pattern!r}")


def _wrap(value: np.ndarray, period: float) -> np.ndarray:
    return (value + period / 2) % period - period / 2


def _step(value: np.ndarray, edge: float) -> np.ndarray:
    return np.clip(value / edge + 0.5, 0, 1)


def _shading(garment_type: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness [h, w]: light from the upper left, folds that fan out below the waist."""
    grid_x, grid_y = np.meshgrid(x, y)
    body = np.interp(grid_y, [1.3, 2.0, WAIST, HIP, 5.6], [0.85, 0.75, 0.6, 0.9, 1.6])
    across = grid_x / body
    shade = 1.06 - 0.10 * across - 0.10 * across**2
    below = np.clip((grid_y - WAIST) / 2.2, 0, 1)
    if garment_type in ("dress", "skirt", "coat"):
        shade -= 0.10 * below * _eighth_power(np.cos(7.5 * across))
        shade += 0.05 * below * _eighth_power(np.cos(7.5 * across + 0.9))
    return np.clip(shade, 0.62, 1.12)


def _eighth_power(value: np.ndarray) -> np.ndarray:
    square = value * value
    return (square * square) ** 2


def draw_details(
    canvas: np.ndarray, garment: Garment, matrix: np.ndarray, pixels_per_unit: float, flare: float
) -> None:
    """Collars, lapels, buttons, belts: what makes a garment of its type recognisable."""
    base = COLOURS[garment.colour]
    line = cv.darker(base, 0.62) if garment.colour != "black" else (92, 90, 104)
    thin = pixels_per_unit * 0.035
    if garment.type == "dress":
        belt = cv.smooth(cv.mirrored([*cv.corner(0.47, 2.86), *cv.corner(0.49, 3.04)]))
        cv.fill(canvas, belt, matrix, line)
    elif garment.type in ("jacket", "coat"):
        bottom = 3.98 if garment.type == "jacket" else 5.64
        blouse = np.array([(-0.24, 1.34), (0.24, 1.34), (0.0, 2.45)])
        cv.fill(canvas, blouse, matrix, (250, 248, 244) if garment.colour != "white" else (120, 128, 150))
        for side in (-1, 1):
            lapel = np.array([(side * 0.22, 1.3), (side * 0.5, 1.62), (side * 0.36, 1.8), (0.0, 2.5)])
            cv.fill(canvas, lapel, matrix, cv.darker(base, 0.86) if garment.colour != "black" else (62, 60, 72))
            cv.stroke(canvas, lapel, matrix, line, thin)
            pocket = [(side * 0.3, 3.45), (side * 0.62, 3.38)]
            cv.stroke(canvas, pocket, matrix, line, thin)
        cv.stroke(canvas, [(0.0, 2.45), (0.02, bottom)], matrix, line, thin)
        for y in (2.72, 3.12) if garment.type == "jacket" else (2.75, 3.3, 3.85):
            cv.fill(canvas, cv.ellipse(0.14, y, 0.055, 0.055, 12), matrix, line)
    elif garment.type == "shirt":
        for side in (-1, 1):
            collar = np.array([(0.0, 1.62), (side * 0.26, 1.3), (side * 0.42, 1.58), (side * 0.2, 1.78)])
            cv.fill(canvas, collar, matrix, cv.darker(base, 1.25) if garment.colour != "white" else (255, 255, 255))
            cv.stroke(canvas, collar, matrix, line, thin)
        cv.stroke(canvas, [(0.0, 1.7), (0.0, 3.2)], matrix, line, thin)
        for y in (2.0, 2.4, 2.8):
            cv.fill(canvas, cv.ellipse(0.0, y, 0.045, 0.045, 10), matrix, line)
    elif garment.type == "sweater":
        collar = cv.smooth(cv.mirrored([(0.28, 1.2), (0.34, 1.4), (0.1, 1.52)]))
        cv.fill(canvas, collar, matrix, cv.darker(base, 0.82))
        cv.stroke(canvas, [(-0.74, 3.78), (0, 3.84), (0.74, 3.78)], matrix, line, thin)
    elif garment.type in LOWER:
        band = cv.smooth(cv.mirrored([*cv.corner(0.47, 2.85), *cv.corner(0.5, 3.05)]))
        cv.fill(canvas, band, matrix, line)


def flat_lay(garment: Garment, flare: float, size: int, background: tuple[int, int, int]) -> np.ndarray:
    """Product picture uint8 [size, size, 3]: the garment alone, laid flat with a soft shadow."""
    side = size * cv.SUPERSAMPLING
    picture = np.full((side, side, 3), background, np.uint8)
    lower = garment.type in LOWER
    top, bottom = (2.7, 5.75) if lower else (1.1, 5.8 if garment.type in ("dress", "coat") else 4.2)
    if garment.type == "trousers":
        bottom = 6.6
    reach = 4.9 if sleeve_length(garment.type)[1] and not lower else 3.9
    scale = side * 0.9 / max(bottom - top, reach)
    place = cv.compose(cv.shift(side / 2, side / 2), cv.stretch(scale, scale), cv.shift(0, -(top + bottom) / 2))
    parts = [(outline(garment.type, flare), np.eye(3)[:2])] + _flat_limbs(garment.type)
    shadow = np.zeros((side, side), np.uint8)
    for points, frame in parts:
        cv2.fillPoly(shadow, [cv.to_pixels(points, cv.compose(cv.shift(side * 0.015, side * 0.025), place, frame))],
                     255, cv2.LINE_AA, cv.SUBPIXEL_BITS)  # fmt: skip
    soft = cv2.GaussianBlur(shadow, (0, 0), side * 0.02)[..., None] / 255 * 0.28
    picture = np.round(picture * (1 - soft)).astype(np.uint8)
    texture, to_units = cloth(garment, scale)
    for points, frame in reversed(parts):
        anchored = cv.compose(cv.shift(-frame[0, 2], -frame[1, 2]), to_units)
        cv.fill_textured(picture, points, cv.compose(place, frame), texture, anchored)
    draw_details(picture, garment, place, scale, flare)
    return cv.average_down(picture, size, size)


def _flat_limbs(garment_type: str) -> list[tuple[np.ndarray, np.ndarray]]:
    if garment_type == "skirt":
        return []
    if garment_type == "trousers":
        leg = cv.smooth([(-0.36, -0.2), (0.36, -0.2), *cv.corner(0.35, 2.7), *cv.corner(-0.35, 2.7)])
        return [(leg, cv.compose(cv.shift(s * 0.4, 3.75), cv.turn(-s * 0.05))) for s in (-1, 1)]
    upper, fore = sleeve_length(garment_type)
    arm = cv.limb(1.25 * upper + 1.1 * fore, 0.27, 0.2)
    return [(arm, cv.compose(cv.shift(s * 0.72, 1.68), cv.turn(-s * math.radians(32)))) for s in (-1, 1)]
