"""Audit of source/target pairs for editing: are they the same take, in step, and is there an edit?

All functions are pure. Frames are uint8 ``[frames, height, width, 3]``; source and target may differ in size and
length. What is compared survives an edit: where and when things move, and where edges are; colours and texture may
change.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from loomvideo.pipelines.fragments import Fragment, with_fragment
from loomvideo.pipelines.stages.options import PairLimits
from loomvideo.pipelines.stages.quality import block_means, motion

GRID = 4
SIDE = 64
MAX_LAG_S = 1.0
# A cut changes the picture by this many levels, and this many times more than the frames around it do.
CUT_LEVELS = 12.0
CUT_RATIO = 4.0


@dataclass(frozen=True)
class PairReport:
    """What the audit found.

    Attributes:
        scores: For the index: ``pair_offset_frames`` (positive: the target is late), ``pair_offset_gain``,
            ``pair_mirrored``,
            ``pair_change`` (levels, in the part that changes most), ``pair_change_share`` (of the frame),
            ``pair_relation``, ``pair_motion_ratio``, ``pair_cuts_source``, ``pair_cuts_target``.
        reasons: Codes of the limits that are broken.
    """

    scores: dict[str, float]
    reasons: tuple[str, ...]

    @property
    def offset_frames(self) -> int:
        """How many frames the target is late."""
        return int(self.scores.get("pair_offset_frames", 0))


def audit_pair(
    source: np.ndarray, target: np.ndarray, source_fps: float, target_fps: float, limits: PairLimits
) -> PairReport:
    """Audit a pair of clips, or of pictures (one frame each)."""
    colours_a, colours_b = _square(source), _square(target)
    a, b = _luma(colours_a), _luma(colours_b)
    # To mirror a video is an edit too: it is undone before anything is compared by place.
    mirrored = relation(*_in_step(a, b[:, :, ::-1], 0)) > relation(*_in_step(a, b, 0)) + 0.1
    if mirrored:
        b = np.ascontiguousarray(b[:, :, ::-1])
    scores: dict[str, float] = {"pair_mirrored": float(mirrored)}
    reasons = []
    lag = 0
    if len(a) > 1 and len(b) > 1:
        reasons += _timing(len(a) / source_fps, len(b) / target_fps, source_fps, target_fps, limits)
        if abs(source_fps - target_fps) > limits.max_fps_difference:
            colours_b = _at_rate(colours_b, target_fps, source_fps)
            b = _at_rate(b, target_fps, source_fps)
        lag, gain = temporal_offset(a, b, round(MAX_LAG_S * source_fps))
        believed = gain >= limits.min_offset_gain
        scores |= {"pair_offset_frames": float(lag if believed else 0), "pair_offset_gain": gain}
        lag = lag if believed else 0
        if abs(lag) > limits.max_offset_frames:
            reasons.append("temporal_offset")
        cuts_a, cuts_b = cuts(a), cuts(b)
        scores |= {"pair_cuts_source": float(len(cuts_a)), "pair_cuts_target": float(len(cuts_b))}
        if _one_sided(cuts_a, cuts_b, lag):
            reasons.append("one_sided_cut")
        moves_a, moves_b = motion(a, source_fps), motion(b, source_fps)
        scores["pair_motion_ratio"] = min(moves_b / max(moves_a, 1e-4), 100.0)
        # Below a hundredth of a height a second nothing in the source moves that could stop.
        if moves_a > 0.01 and scores["pair_motion_ratio"] < limits.min_motion_ratio:
            reasons.append("static_target")
    a, b = _in_step(a, b, lag)
    # In colour: a garment may change its hue and keep its luma.
    pairs = zip(*_in_step(colours_a, colours_b, lag), strict=True)
    change = np.stack([_change(x, y) for x, y in pairs]).mean(0)
    scores |= {"pair_change": float(change.max()), "pair_change_share": float(np.mean(change > 4.0))}
    if limits.min_change and scores["pair_change"] < limits.min_change:
        reasons.append("no_op")
    # A mirrored video is an edit too.
    scores["pair_relation"] = max(relation(a, b), relation(a, b[:, :, ::-1]))
    if scores["pair_relation"] < limits.min_relation:
        reasons.append("unrelated")
    return PairReport({name: round(value, 4) for name, value in scores.items()}, tuple(reasons))


def _square(frames: np.ndarray) -> np.ndarray:
    """Frames at 64 x 64: pairs of different size become comparable, uint8 [frames, 64, 64, 3]."""
    return np.stack([cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for frame in frames])


def _change(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Difference of colours [16, 16] of the parts of a frame; means first, so that noise and compression cancel."""
    difference = cv2.resize(a.astype(np.float32) - b, (16, 16), interpolation=cv2.INTER_AREA)
    return np.abs(difference).max(2)


def _luma(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


def _timing(length_a: float, length_b: float, fps_a: float, fps_b: float, limits: PairLimits) -> list[str]:
    reasons = []
    if limits.max_fps_difference and abs(fps_a - fps_b) > limits.max_fps_difference:
        reasons.append("fps_mismatch")
    longer = max(length_a, length_b)
    if limits.max_length_difference and abs(length_a - length_b) > limits.max_length_difference * longer:
        reasons.append("length_mismatch")
    return reasons


def _at_rate(frames: np.ndarray, fps: float, wanted: float) -> np.ndarray:
    count = max(2, int(len(frames) / fps * wanted))
    return frames[np.minimum((np.arange(count) * fps / wanted).round().astype(int), len(frames) - 1)]


def movement(luma: np.ndarray) -> np.ndarray:
    """Where and when things change: [frames - 1, 16], one row a step, one column a part of the frame, standardised."""
    changes = np.abs(np.diff(luma.astype(np.float32), axis=0))
    # Square roots, or one flash would decide.
    parts = np.sqrt(np.stack([block_means(change, GRID).ravel() for change in changes]))
    return (parts - parts.mean(0)) / np.maximum(parts.std(0), 0.05)


def temporal_offset(source: np.ndarray, target: np.ndarray, max_lag: int) -> tuple[int, float]:
    """Shift at which the movements of two clips agree best.

    Args:
        source: Luma [frames, h, w].
        target: Luma [frames, h, w], same size.
        max_lag: Largest shift tried, in frames.

    Returns:
        Frames that the target is late, and the correlation this gains over no shift.
    """
    a, b = movement(source), movement(target)
    # At least half of the shorter clip must overlap, or chance decides.
    max_lag = min(max_lag, min(len(a), len(b)) // 2)
    correlation = {lag: _correlation(*_in_step(a, b, lag)) for lag in range(-max_lag, max_lag + 1)}
    best = max(correlation, key=lambda lag: (correlation[lag], -abs(lag)))
    return best, correlation[best] - correlation[0]


def _in_step(a: np.ndarray, b: np.ndarray, lag: int) -> tuple[np.ndarray, np.ndarray]:
    """The overlapping parts of two sequences when the second is ``lag`` late."""
    a, b = a[max(-lag, 0) :], b[max(lag, 0) :]
    length = min(len(a), len(b))
    return a[:length], b[:length]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-6))


def cuts(luma: np.ndarray) -> list[int]:
    """First frames of new shots: the picture changes at once, and much more than before and after."""
    changes = np.abs(np.diff(luma.astype(np.float32), axis=0)).mean((1, 2))
    found = []
    for i, change in enumerate(changes):
        around = np.concatenate([changes[max(0, i - 4) : i], changes[i + 1 : i + 5]])
        usual = float(np.median(around)) if len(around) else 0.0
        if change > CUT_LEVELS and change > CUT_RATIO * max(usual, 1.0):
            found.append(i + 1)
    return found


def _one_sided(cuts_a: list[int], cuts_b: list[int], lag: int) -> bool:
    """Whether a cut has no counterpart within two frames."""
    moved = [cut - lag for cut in cuts_b]

    def alone(cut: int, others: list[int]) -> bool:
        return all(abs(cut - other) > 2 for other in others)

    return any(alone(cut, moved) for cut in cuts_a) or any(alone(cut, cuts_a) for cut in moved)


def relation(source: np.ndarray, target: np.ndarray) -> float:
    """Agreement of edges, 0..1, in the quarter of the frame's parts that agree best, over all frames.

    An edit of the background leaves the figure's edges, an edit of the figure those of the background, a change of
    style most; another video leaves none.
    """
    a, b = _edges(source), _edges(target)
    size = SIDE // GRID
    agreements = []
    for row in range(GRID):
        for column in range(GRID):
            part = (slice(None), slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size))
            x, y = a[part], b[part]
            # A part without edges in either says nothing.
            if x.std() > 1.0 and y.std() > 1.0:
                agreements.append(_correlation(x, y))
    if not agreements:
        return 1.0 if np.abs(source.astype(int) - target).mean() < 8 else 0.0
    best = sorted(agreements, reverse=True)[: max(1, GRID * GRID // 4)]
    return float(np.clip(np.mean(best), 0, 1))


def _edges(luma: np.ndarray) -> np.ndarray:
    """Strength of edges [frames, 64, 64], compressed so that strong ones do not decide alone."""
    strength = []
    for frame in luma:
        x, y = (cv2.Sobel(frame, cv2.CV_32F, *order) for order in ((1, 0), (0, 1)))
        strength.append(np.sqrt(cv2.GaussianBlur(np.hypot(x, y), (0, 0), 0.7)))
    return np.stack(strength)


def in_step_paths(source: str, target: str, report: PairReport) -> tuple[str, str]:
    """Paths that leave out the start of whichever side is early, so that a shifted pair is in step."""
    lag = report.offset_frames
    if lag > 0:
        return source, with_fragment(target, Fragment(frames=(lag, None)))
    if lag < 0:
        return with_fragment(source, Fragment(frames=(-lag, None))), target
    return source, target
