"""Named backgrounds, painted wider than the frame so that a camera can pan over them."""

import functools
from collections.abc import Callable

import cv2
import numpy as np

from loomvideo.pipelines.sample_data import canvas as cv

Painter = Callable[[int, int, np.random.Generator], np.ndarray]


def _polygon(picture: np.ndarray, points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
    """Fill a polygon whose coordinates are in heights of the picture."""
    height = picture.shape[0]
    cv.fill(picture, np.asarray(points, np.float64), cv.stretch(height, height), colour)


def _disc(picture: np.ndarray, x: float, y: float, radius: float, colour: tuple[int, int, int]) -> None:
    _polygon(picture, cv.ellipse(x, y, radius, radius, 40), colour)


def _ridge(
    picture: np.ndarray, base: float, amplitude: float, count: int, random: np.random.Generator, colour: tuple
) -> None:
    """A hilly silhouette down to the bottom edge."""
    aspect = picture.shape[1] / picture.shape[0]
    x = np.linspace(-0.05, aspect + 0.05, 60)
    waves = sum(np.sin(x * count * k + random.uniform(0, 6.28)) / k for k in (1, 2))
    points = [*zip(x, base - amplitude * waves, strict=True), (aspect + 0.05, 1.1), (-0.05, 1.1)]
    _polygon(picture, points, colour)


def beach(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """Blue sky, turquoise sea, warm sand."""
    picture = cv.vertical_gradient(
        height, width, [(0, (108, 190, 240)), (0.45, (205, 236, 250)), (0.46, (30, 160, 185)),
                        (0.66, (92, 208, 205)), (0.67, (250, 236, 200)), (1, (236, 205, 150))])  # fmt: skip
    _disc(picture, random.uniform(0.15, 0.3), 0.14, 0.075, (255, 246, 200))
    for _ in range(3):
        x, y = random.uniform(0, width / height), random.uniform(0.1, 0.28)
        for k in (-1, 0, 1):
            _disc(picture, x + 0.06 * k, y + 0.012 * abs(k), 0.05 - 0.012 * abs(k), (246, 251, 255))
    return picture


def forest(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """Rows of firs, lighter towards the horizon."""
    picture = cv.vertical_gradient(height, width, [(0, (186, 222, 176)), (0.7, (110, 170, 96)), (1, (52, 104, 52))])
    aspect = width / height
    for base, size, colour in ((0.62, 0.34, (92, 152, 92)), (0.76, 0.44, (58, 122, 68)), (0.95, 0.6, (30, 86, 46))):
        step = size * 0.42
        for x in np.arange(-0.1, aspect + 0.2, step) + random.uniform(0, step):
            for k in range(3):
                top = base - size * (1 - 0.27 * k)
                half = size * (0.14 + 0.055 * k)
                _polygon(picture, [(x, top), (x + half, top + size * 0.48), (x - half, top + size * 0.48)], colour)
    return picture


def sunset(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """A low sun in an orange sky over dark hills."""
    picture = cv.vertical_gradient(
        height, width, [(0, (122, 60, 130)), (0.35, (236, 96, 92)), (0.62, (255, 178, 74)), (1, (255, 214, 120))]
    )
    _disc(picture, random.uniform(0.25, 0.4), 0.5, 0.15, (255, 236, 168))
    _ridge(picture, 0.72, 0.05, 5, random, (164, 60, 84))
    _ridge(picture, 0.85, 0.04, 7, random, (104, 36, 74))
    return picture


def night_city(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """Dark towers with lit windows under a moon."""
    picture = cv.vertical_gradient(height, width, [(0, (14, 16, 46)), (1, (44, 44, 96))])
    _disc(picture, random.uniform(0.1, 0.25), 0.13, 0.07, (246, 240, 210))
    aspect = width / height
    x = -0.05
    while x < aspect:
        wide, top = random.uniform(0.16, 0.24), random.uniform(0.2, 0.5)
        tone = int(random.integers(22, 34))
        _polygon(picture, [(x, top), (x + wide, top), (x + wide, 1.1), (x, 1.1)], (tone, tone, tone + 26))
        for wx in np.arange(x + 0.03, x + wide - 0.03, 0.052):
            for wy in np.arange(top + 0.05, 1.0, 0.075):
                if random.random() < 0.55:
                    _polygon(picture, [(wx, wy), (wx + 0.026, wy), (wx + 0.026, wy + 0.04), (wx, wy + 0.04)],
                             (255, 214, 112))  # fmt: skip
        x += wide + 0.015
    return picture


def snowy_mountains(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """White peaks and a white field under a pale sky."""
    picture = cv.vertical_gradient(height, width, [(0, (150, 196, 232)), (0.6, (224, 238, 248)), (1, (255, 255, 255))])
    aspect = width / height
    for x in np.arange(-0.1, aspect + 0.3, 0.42) + random.uniform(0, 0.2):
        top, half = random.uniform(0.22, 0.36), 0.36
        _polygon(picture, [(x, top), (x + half, 0.75), (x - half, 0.75)], (134, 156, 186))
        _polygon(picture, [(x, top), (x + 0.13, top + 0.19), (x + 0.04, top + 0.15), (x - 0.04, top + 0.2),
                           (x - 0.13, top + 0.19)], (252, 254, 255))  # fmt: skip
    _ridge(picture, 0.74, 0.02, 6, random, (240, 246, 252))
    return picture


def lavender_field(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """Purple rows that meet at the horizon."""
    picture = cv.vertical_gradient(
        height, width, [(0, (198, 222, 250)), (0.39, (252, 240, 226)), (0.4, (150, 112, 200)), (1, (116, 72, 176))]
    )
    _ridge(picture[: round(height * 0.42)], 0.9, 0.08, 4, random, (126, 150, 140))
    centre = width / height / 2 + random.uniform(-0.1, 0.1)
    for k in np.arange(-9, 10):
        _polygon(picture, [(centre + 0.03 * k, 0.41), (centre + 0.03 * k + 0.008, 0.41),
                           (centre + 0.34 * k + 0.12, 1.05), (centre + 0.34 * k, 1.05)], (92, 128, 92))  # fmt: skip
    return picture


def brick_wall(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """Warm bricks."""
    picture = np.full((height, width, 3), (206, 186, 170), np.uint8)
    aspect = width / height
    for row, y in enumerate(np.arange(0, 1.0, 0.1)):
        for x in np.arange(-0.3, aspect, 0.22) + 0.11 * (row % 2):
            tone = random.uniform(0.9, 1.08)
            colour = tuple(min(255, round(c * tone)) for c in (172, 84, 62))
            _polygon(picture, [(x, y), (x + 0.205, y), (x + 0.205, y + 0.087), (x, y + 0.087)], colour)
    return picture


def studio(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """A grey photo studio with a soft light."""
    picture = cv.vertical_gradient(height, width, [(0, (168, 170, 174)), (0.8, (206, 207, 208)), (1, (178, 178, 180))])
    light = np.zeros((height, width), np.float32)
    cv2.circle(light, (round(width * random.uniform(0.45, 0.55)), round(height * 0.4)), round(height * 0.36), 1, -1)
    light = cv2.GaussianBlur(light, (0, 0), height * 0.14)[..., None]
    return np.round(picture + (250.0 - picture) * light * 0.8).astype(np.uint8)


BACKGROUNDS: dict[str, tuple[str, Painter]] = {
    "beach": ("a beach", beach),
    "forest": ("a forest", forest),
    "sunset": ("a sunset", sunset),
    "night city": ("a night city", night_city),
    "snowy mountains": ("snowy mountains", snowy_mountains),
    "lavender field": ("a lavender field", lavender_field),
    "brick wall": ("a brick wall", brick_wall),
    "studio": ("a studio", studio),
}


def phrase(name: str) -> str:
    """For prompts: "a beach"."""
    return BACKGROUNDS[name][0]


@functools.lru_cache(maxsize=8)
def paint(name: str, width: int, height: int, seed: int) -> np.ndarray:
    """Background picture uint8 [height, width, 3], slightly out of focus."""
    picture = BACKGROUNDS[name][1](width, height, np.random.default_rng(seed))
    return cv2.GaussianBlur(picture, (0, 0), height * 0.006)
