"""Antialiased drawing on RGB arrays: smooth outlines, gradients, and textures that follow a part of the body.

Shapes live in *head units* (one unit is the height of a figure's head, x right, y down); a 2x3 affine matrix takes
them to pixels of a canvas that is drawn larger than the frame and averaged down.
"""

import functools
import math
from collections.abc import Sequence

import cv2
import numpy as np

SUBPIXEL_BITS = 4
SUPERSAMPLING = 2
CURVE_STEPS = 6

Point = tuple[float, float]


def _catmull_rom_basis(steps: int) -> np.ndarray:
    t = np.arange(steps) / steps
    return 0.5 * np.stack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3], 1)


_BASIS = _catmull_rom_basis(CURVE_STEPS)


def smooth(points: Sequence[Point]) -> np.ndarray:
    """Closed Catmull-Rom curve [m, 2] through n control points; use :func:`corner` for a sharp one."""
    return _smooth(tuple(points))


@functools.lru_cache(maxsize=512)
def _smooth(points: tuple[Point, ...]) -> np.ndarray:
    p = np.asarray(points, np.float64)
    neighbours = np.stack([np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0)], 1)
    # Between the two points of a corner the curve would overshoot: that piece is left out.
    neighbours = neighbours[np.any(neighbours[:, 1] != neighbours[:, 2], axis=1)]
    curve = np.einsum("sk,nkc->nsc", _BASIS, neighbours).reshape(-1, 2)
    curve.flags.writeable = False
    return curve


def corner(x: float, y: float) -> list[Point]:
    """Control points that make :func:`smooth` turn sharply."""
    return [(x, y)] * 2


def mirrored(right_half: list[Point]) -> list[Point]:
    """Outline symmetric about x = 0 from its right half, listed from top to bottom."""
    return right_half + [(-x, y) for x, y in reversed(right_half)]


@functools.lru_cache(maxsize=512)
def ellipse(cx: float, cy: float, rx: float, ry: float, num_points: int = 28) -> np.ndarray:
    """Outline [num_points, 2] of an ellipse."""
    angle = np.linspace(0, 2 * math.pi, num_points, endpoint=False)
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], 1)


def limb(length: float, top: float, bottom: float) -> np.ndarray:
    """A tapered limb hanging from the origin, half widths ``top`` and ``bottom``, with round ends."""
    return smooth([(-top, 0), (0, -top), (top, 0), (bottom, length), (0, length + bottom), (-bottom, length)])


def compose(*matrices: np.ndarray) -> np.ndarray:
    """Product of 2x3 affine matrices, the last one applied first."""
    result = matrices[0]
    for matrix in matrices[1:]:
        product = result[:, :2] @ matrix
        product[:, 2] += result[:, 2]
        result = product
    return result


def shift(x: float, y: float) -> np.ndarray:
    """Translation matrix."""
    return np.array([[1.0, 0, x], [0, 1, y]])


def turn(angle: float, cx: float = 0.0, cy: float = 0.0) -> np.ndarray:
    """Rotation by ``angle`` radians (clockwise on screen) about a point."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, cx - c * cx + s * cy], [s, c, cy - s * cx - c * cy]])


def stretch(sx: float, sy: float) -> np.ndarray:
    """Scaling matrix."""
    return np.array([[sx, 0, 0.0], [0, sy, 0]])


def lean(amount: float, y0: float) -> np.ndarray:
    """Horizontal shear that grows below ``y0``: a skirt that swings."""
    return np.array([[1.0, amount, -amount * y0], [0, 1, 0]])


def to_pixels(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Fixed-point pixel coordinates for OpenCV."""
    pixels = points @ matrix[:, :2].T + matrix[:, 2]
    return np.round(pixels * (1 << SUBPIXEL_BITS)).astype(np.int32)


def fill(canvas: np.ndarray, points: np.ndarray, matrix: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Fill a polygon given in head units."""
    cv2.fillPoly(canvas, [to_pixels(points, matrix)], colour, cv2.LINE_AA, SUBPIXEL_BITS)


def stroke(
    canvas: np.ndarray, points: np.ndarray, matrix: np.ndarray, colour: tuple[int, int, int], width: float
) -> None:
    """Draw an open line given in head units; ``width`` in canvas pixels."""
    line = to_pixels(np.asarray(points, np.float64), matrix)
    cv2.polylines(canvas, [line], False, colour, max(1, round(width)), cv2.LINE_AA, SUBPIXEL_BITS)


def fill_textured(
    canvas: np.ndarray,
    points: np.ndarray,
    matrix: np.ndarray,
    texture: np.ndarray,
    texture_to_units: np.ndarray,
    mask: np.ndarray | None = None,
) -> None:
    """Fill a polygon with a texture that moves with ``matrix``.

    Args:
        canvas: uint8 [H, W, 3], changed in place.
        points: Polygon in head units.
        matrix: Head units to pixels.
        texture: uint8 [h, w, 3].
        texture_to_units: Texture pixels to head units.
        mask: uint8 [H, W] that collects the coverage of the polygon, when given.
    """
    polygon = to_pixels(points, matrix)
    low = np.maximum(polygon.min(0) >> SUBPIXEL_BITS, 0) - 1
    high = (polygon.max(0) >> SUBPIXEL_BITS) + 2
    x0, y0 = np.maximum(low, 0)
    x1, y1 = np.minimum(high, (canvas.shape[1], canvas.shape[0]))
    if x0 >= x1 or y0 >= y1:
        return
    size = (int(x1 - x0), int(y1 - y0))
    coverage = np.zeros(size[::-1], np.uint8)
    offset = np.array([x0, y0]) << SUBPIXEL_BITS
    cv2.fillPoly(coverage, [(polygon - offset).astype(np.int32)], 255, cv2.LINE_AA, SUBPIXEL_BITS)
    place = compose(shift(-float(x0), -float(y0)), matrix, texture_to_units)
    cloth = cv2.warpAffine(texture, place, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    region = canvas[y0:y1, x0:x1]
    alpha = cv2.merge([coverage] * 3)
    inside = cv2.multiply(cloth, alpha, scale=1 / 255)
    region[:] = cv2.add(cv2.multiply(region, 255 - alpha, scale=1 / 255), inside)
    if mask is not None:
        np.maximum(mask[y0:y1, x0:x1], coverage, out=mask[y0:y1, x0:x1])


def vertical_gradient(height: int, width: int, stops: list[tuple[float, tuple[int, int, int]]]) -> np.ndarray:
    """RGB picture uint8 [height, width, 3] that blends colours at relative heights 0..1."""
    y = np.linspace(0, 1, height)
    positions = [p for p, _ in stops]
    rows = np.stack([np.interp(y, positions, [c[k] for _, c in stops]) for k in range(3)], 1)
    return np.repeat(np.round(rows).astype(np.uint8)[:, None], width, 1)


def darker(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    """A colour scaled towards black (factor < 1) or, above 1, lifted towards white."""
    if factor <= 1:
        return tuple(round(c * factor) for c in colour)
    return tuple(round(255 - (255 - c) / factor) for c in colour)


def average_down(canvas: np.ndarray, width: int, height: int) -> np.ndarray:
    """Average a supersampled canvas down to the frame."""
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
