"""People-like figures that wear garments and move, rendered frame by frame.

A clip is a pure function of (figure, look): two looks on one figure share every pose, so an edited clip differs from
its source only where the look differs.
"""

import math
from dataclasses import dataclass

import numpy as np

from loomvideo.pipelines.sample_data import backgrounds
from loomvideo.pipelines.sample_data import canvas as cv
from loomvideo.pipelines.sample_data.garments import (
    COLOURS,
    HIP,
    LOWER,
    OUTFIT_SHARES,
    OUTFITS,
    WAIST,
    Garment,
    cloth,
    draw_details,
    outline,
    sleeve_length,
)

SKINS = ((255, 220, 196), (240, 192, 158), (208, 150, 112), (158, 104, 72), (108, 68, 48))
HAIR_COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (36, 30, 34),
    "brown": (98, 60, 38),
    "red": (168, 72, 36),
    "blond": (232, 192, 112),
    "grey": (172, 170, 172),
}
HAIR_STYLES: dict[str, tuple[str, ...]] = {
    "woman": ("long", "bob", "bun", "curly"),
    "man": ("short", "curly"),
}
MOTIONS = {"walk": "walking", "sway": "swaying", "turn": "turning", "pan": "standing"}
FPS = 24
# Height of the frame in head units, and how much wider than the frame a background is.
VIEW_HEIGHT = 5.5
PANORAMA = 1.3


@dataclass(frozen=True)
class Person:
    """Everything about a person and a take that an edit leaves alone."""

    person: str
    skin: int
    hair: str
    hair_style: str
    outfit: str
    motion: str
    phase: float
    speed: float
    zoom: float
    offset: float
    flare: float
    background_seed: int

    def attributes(self) -> dict[str, str]:
        """For `extra.person`."""
        return {"kind": self.person, "hair": f"{self.hair_style} {self.hair}", "motion": self.motion}


@dataclass(frozen=True)
class Look:
    """What an edit may change."""

    garments: tuple[Garment, ...]
    background: str

    def garment(self, garment_type: str) -> Garment:
        """The worn garment of a type."""
        return next(g for g in self.garments if g.type == garment_type)

    def wearing(self, garment: Garment) -> "Look":
        """This look with the garment of the same type replaced."""
        return Look(tuple(garment if g.type == garment.type else g for g in self.garments), self.background)


@dataclass(frozen=True)
class Pose:
    """Angles in radians, lengths in head units, at one moment."""

    x: float
    y: float
    lean: float
    head: float
    arms: tuple[float, float]
    elbows: tuple[float, float]
    swing: float
    step: float
    yaw: float
    camera: float


def random_figure(random: np.random.Generator) -> Person:
    """Draw a figure."""
    outfit = str(random.choice(list(OUTFITS), p=OUTFIT_SHARES))
    person = "woman" if outfit in ("dress", "blouse") or random.random() < 0.5 else "man"
    return Person(
        person=person,
        skin=int(random.integers(len(SKINS))),
        hair=str(random.choice(list(HAIR_COLOURS))),
        hair_style=str(random.choice(HAIR_STYLES[person])),
        outfit=outfit,
        motion=str(random.choice(list(MOTIONS))),
        phase=float(random.uniform(0, 2 * math.pi)),
        speed=float(random.uniform(0.8, 1.15)),
        zoom=float(random.uniform(0.97, 1.06)),
        offset=float(random.uniform(-0.25, 0.25)),
        flare=float(random.uniform(0.2, 1.0)),
        background_seed=int(random.integers(2**31)),
    )


def pose_at(figure: Person, seconds: float) -> Pose:
    """The pose of a figure at a time in seconds."""
    angle = figure.phase + 2 * math.pi * figure.speed * seconds
    s, c = math.sin(angle), math.cos(angle)
    if figure.motion == "walk":
        return Pose(0.07 * s, 0.05 * abs(c), 0.02 * s, -0.03 * s, (0.20 + 0.24 * s, 0.20 - 0.24 * s),
                    (0.25 + 0.2 * s, 0.25 - 0.2 * s), 0.07 * s, s, 0.0, 0.0)  # fmt: skip
    if figure.motion == "sway":
        return Pose(0.16 * s, 0.02 * abs(s), 0.05 * s, 0.06 * s, (0.62 + 0.08 * c, 0.24 + 0.10 * s),
                    (-1.35, 0.2), -0.09 * c, 0.0, 0.0, 0.0)  # fmt: skip
    if figure.motion == "turn":
        return Pose(0.03 * s, 0.0, 0.0, 0.0, (0.24 - 0.05 * c, 0.24 + 0.05 * c), (0.15, 0.15), 0.08 * c, 0.0,
                    0.62 * s, 0.0)  # fmt: skip
    return Pose(0.02 * s, 0.012 * c, 0.01 * s, 0.04 * s, (0.58, 0.56), (-1.25, -1.2), 0.02 * s, 0.0, 0.0, 0.28 * s)


class Renderer:
    """Draws a figure in a look; textures and the background are made once a clip."""

    def __init__(self, figure: Person, look: Look, width: int, height: int):
        """Prepare to draw frames of ``width`` x ``height`` pixels."""
        self.figure, self.look, self.width, self.height = figure, look, width, height
        self.canvas_width, self.canvas_height = width * cv.SUPERSAMPLING, height * cv.SUPERSAMPLING
        self.scale = self.canvas_height / VIEW_HEIGHT * figure.zoom
        self.cloths = {g.type: cloth(g, self.scale) for g in look.garments}
        self.panorama = backgrounds.paint(
            look.background, round(self.canvas_width * PANORAMA), self.canvas_height, figure.background_seed
        )
        self.mask: np.ndarray | None = None
        self.masked_type = ""

    def frame(self, index: int) -> np.ndarray:
        """Frame ``index`` at 24 frames a second, uint8 [height, width, 3]."""
        return cv.average_down(self._draw(pose_at(self.figure, index / FPS)), self.width, self.height)

    def empty_scene(self) -> np.ndarray:
        """The background alone, as the resting camera sees it, uint8 [height, width, 3]."""
        left = (self.panorama.shape[1] - self.canvas_width) // 2
        return cv.average_down(self.panorama[:, left : left + self.canvas_width], self.width, self.height)

    def garment_mask(self, index: int, garment_type: str) -> np.ndarray:
        """Where a garment shows or is covered by an arm of its own, uint8 [height, width], 255 inside."""
        self.mask, self.masked_type = np.zeros((self.canvas_height, self.canvas_width), np.uint8), garment_type
        self._draw(pose_at(self.figure, index / FPS))
        mask, self.mask, self.masked_type = self.mask, None, ""
        return cv.average_down(mask, self.width, self.height)

    def _draw(self, pose: Pose) -> np.ndarray:
        figure = self.figure
        slack = self.panorama.shape[1] - self.canvas_width
        left = round(slack * (0.5 + 0.5 * pose.camera / 0.28 * 0.9))
        picture = np.ascontiguousarray(self.panorama[:, left : left + self.canvas_width])
        squeeze = math.cos(pose.yaw) * 0.35 + 0.65
        centre = self.canvas_width / 2 + (figure.offset + pose.x - pose.camera * 0.4) * self.scale
        root = cv.compose(cv.shift(centre, (0.24 + pose.y) * self.scale), cv.stretch(self.scale * squeeze, self.scale))
        torso = cv.compose(root, cv.turn(pose.lean, 0, HIP))
        hips = cv.compose(root, cv.lean(pose.swing, WAIST))
        head = cv.compose(torso, cv.turn(pose.head, 0, 1.2))
        self._hair_behind(picture, head)
        self._legs(picture, root, pose)
        neck = cv.smooth([(-0.17, 0.8), (0.17, 0.8), (0.2, 1.3), (0.62, 1.46), (0.5, 1.9), (-0.5, 1.9), (-0.62, 1.46),
                          (-0.2, 1.3)])  # fmt: skip
        cv.fill(picture, neck, torso, cv.darker(SKINS[figure.skin], 0.93))
        for garment in sorted(self.look.garments, key=lambda g: g.type not in LOWER):
            matrix = hips if garment.type in ("dress", "coat", "skirt") else torso
            points = outline(garment.type, figure.flare)
            self._textured(picture, garment.type, points, matrix)
            draw_details(picture, garment, matrix, self.scale, figure.flare)
        self._arms(picture, torso, pose)
        self._head(picture, head, math.sin(pose.yaw))
        return picture

    def _textured(self, picture: np.ndarray, garment_type: str, points: np.ndarray, matrix: np.ndarray) -> None:
        mask = self.mask if garment_type == self.masked_type else None
        cv.fill_textured(picture, points, matrix, *self.cloths[garment_type], mask)

    def _legs(self, picture: np.ndarray, root: np.ndarray, pose: Pose) -> None:
        covered = "trousers" in self.cloths
        for side in (-1, 1):
            lift = 0.12 * max(0.0, side * pose.step)
            matrix = cv.compose(root, cv.shift(side * 0.36, 3.9 - lift), cv.turn(-side * 0.03))
            cv.fill(picture, cv.limb(3.4, 0.3, 0.2), matrix, cv.darker(SKINS[self.figure.skin], 0.95))
            if covered:
                leg = cv.smooth([(-0.38, -0.3), (0.38, -0.3), (0.36, 3.4), (-0.36, 3.4)])
                frame = cv.shift(side * 0.36, 3.9)
                texture, to_units = self.cloths["trousers"]
                mask = self.mask if self.masked_type == "trousers" else None
                anchored = cv.compose(cv.shift(-side * 0.36, -3.9), to_units)
                cv.fill_textured(picture, leg, matrix, texture, anchored, mask)
                crease = [(0.02 * side, 0.3), (0.02 * side, 3.0)]
                colour = COLOURS[self.look.garment("trousers").colour]
                cv.stroke(picture, crease, cv.compose(root, frame), cv.darker(colour, 0.8), self.scale * 0.03)

    def _arms(self, picture: np.ndarray, torso: np.ndarray, pose: Pose) -> None:
        upper_garment = next(g for g in self.look.garments if g.type not in LOWER)
        upper, fore = sleeve_length(upper_garment.type)
        texture, to_units = self.cloths[upper_garment.type]
        mask = self.mask if self.masked_type == upper_garment.type else None
        skin = SKINS[self.figure.skin]
        for side, angle, bend in ((-1, pose.arms[0], pose.elbows[0]), (1, pose.arms[1], pose.elbows[1])):
            shoulder = cv.compose(torso, cv.shift(side * 0.72, 1.66), cv.turn(-side * angle))
            elbow = cv.compose(shoulder, cv.shift(0, 1.22), cv.turn(side * bend * -1))
            cv.fill(picture, cv.limb(1.22, 0.2, 0.16), shoulder, cv.darker(skin, 0.97))
            cv.fill(picture, cv.limb(1.05, 0.16, 0.11), elbow, skin)
            cv.fill(picture, cv.ellipse(0, 1.18, 0.15, 0.2, 16), elbow, skin)
            # The arm's own frame starts at x = 0, y = 0: take cloth from the chest so that patterns stay in scale.
            anchored = cv.compose(cv.shift(-side * 0.3, -1.9), to_units)
            edge = cv.darker(COLOURS[upper_garment.colour], 0.8)
            if fore:
                sleeve = cv.limb(1.05 * fore, 0.235, 0.2)
                cv.fill_textured(picture, sleeve, elbow, texture, anchored, mask)
            sleeve = cv.limb(1.22 * upper, 0.29 if upper < 1 else 0.27, 0.32 if upper < 1 else 0.235)
            cv.fill_textured(picture, sleeve, shoulder, texture, anchored, mask)
            inner = [(-side * 0.25, 0.35), (-side * 0.22, 1.2 * upper)]
            cv.stroke(picture, inner, shoulder, edge, self.scale * 0.03)

    def _hair_behind(self, picture: np.ndarray, head: np.ndarray) -> None:
        colour = cv.darker(HAIR_COLOURS[self.figure.hair], 0.85)
        style = self.figure.hair_style
        if style == "long":
            points = cv.mirrored([(0.2, -0.08), (0.52, 0.2), (0.56, 0.9), (0.66, 1.7), (0.4, 2.1)])
            cv.fill(picture, cv.smooth(points), head, colour)
        elif style == "bob":
            points = cv.mirrored([(0.2, -0.08), (0.54, 0.2), (0.6, 0.8), (0.5, 1.12)])
            cv.fill(picture, cv.smooth(points), head, colour)
        elif style == "bun":
            cv.fill(picture, cv.ellipse(0, -0.1, 0.26, 0.24), head, colour)
        elif style == "curly":
            for angle in np.linspace(-0.3, math.pi + 0.3, 11):
                x, y = 0.46 * math.cos(angle), 0.42 - 0.44 * math.sin(angle)
                cv.fill(picture, cv.ellipse(x, y, 0.2, 0.2, 16), head, colour)

    def _head(self, picture: np.ndarray, head: np.ndarray, side: float) -> None:
        figure = self.figure
        skin, hair = SKINS[figure.skin], HAIR_COLOURS[figure.hair]
        for ear in (-1, 1):
            cv.fill(picture, cv.ellipse(ear * 0.42, 0.56, 0.08, 0.12, 14), head, cv.darker(skin, 0.92))
        jaw = 0.30 if figure.person == "woman" else 0.34
        face = cv.smooth(cv.mirrored([(0.15, 0.04), (0.42, 0.3), (0.42, 0.6), (jaw, 0.88), (0.1, 1.03)]))
        cv.fill(picture, face, head, skin)
        features = cv.compose(head, cv.shift(0.16 * side, 0))
        for eye in (-1, 1):
            cv.fill(picture, cv.ellipse(eye * 0.24, 0.72, 0.085, 0.05, 12), features, _blush(skin))
            cv.fill(picture, cv.ellipse(eye * 0.17, 0.54, 0.05, 0.065, 12), features, (44, 34, 40))
            brow = [(eye * 0.25, 0.42), (eye * 0.16, 0.39), (eye * 0.09, 0.41)]
            cv.stroke(picture, brow, features, cv.darker(hair, 0.7), self.scale * 0.035)
        cv.stroke(picture, [(0.0, 0.6), (0.03, 0.7), (-0.01, 0.715)], features, cv.darker(skin, 0.78), 1)
        lips = (196, 62, 78) if figure.person == "woman" else cv.darker(skin, 0.66)
        cv.fill(picture, cv.smooth([(-0.1, 0.83), (0, 0.81), (0.1, 0.83), (0, 0.895)]), features, lips)
        if figure.hair_style == "short":
            fringe = [(-0.46, 0.55), (-0.5, 0.2), (-0.25, -0.1), (0.2, -0.12), (0.5, 0.16), (0.46, 0.55), (0.38, 0.28),
                      (0.05, 0.2), (-0.3, 0.27)]  # fmt: skip
        elif figure.hair_style == "curly":
            fringe = [(-0.45, 0.4), (-0.36, 0.0), (0, -0.12), (0.36, 0.0), (0.45, 0.4), (0.25, 0.2), (0, 0.26),
                      (-0.25, 0.2)]  # fmt: skip
        else:
            fringe = [(-0.47, 0.72), (-0.52, 0.25), (-0.25, -0.1), (0.2, -0.12), (0.52, 0.2), (0.47, 0.72),
                      (0.38, 0.36), (-0.12, 0.16), (-0.36, 0.4)]  # fmt: skip
        cv.fill(picture, cv.smooth(fringe), head, hair)
        cv.stroke(picture, [(-0.2, 0.02), (0.05, -0.02), (0.25, 0.06)], head, cv.darker(hair, 1.35), self.scale * 0.04)


def _blush(skin: tuple[int, int, int]) -> tuple[int, int, int]:
    return (min(255, skin[0] + 6), round(skin[1] * 0.84), round(skin[2] * 0.84))
