"""Audit of source/target pairs for editing: are they the same take, in step, and is there an edit?

All functions are pure. Frames are uint8 ``[frames, height, width, 3]``; source and target may differ in size and
length. What is compared survives an edit: where and when things move, and where edges are; colours and texture may
change.
"""

import cv2
import numpy as np

from loomvideo.pipelines.media.fragments import Fragment, split_fragment, with_fragment
from loomvideo.pipelines.media.windows import same_frames
from loomvideo.pipelines.prepare.curation.options import PairLimits
from loomvideo.pipelines.prepare.curation.quality import block_means, motion

GRID = 4
SIDE = 64
MAX_LAG_S = 1.0
# A cut changes the picture by this many levels, and this many times more than the frames around it do.
CUT_LEVELS = 12.0
CUT_RATIO = 4.0
# What correlation of movement a shift in time must gain to be believed.
CLEAR_GAIN = 0.15
# Below a hundredth of a frame height a second nothing in the source moves that could stop.
MOVES = 0.01


def pair_scores(
    source: np.ndarray,
    target: np.ndarray,
    source_fps: float,
    target_fps: float,
    durations_s: tuple[float, float] | None = None,
    files: tuple[tuple[int, float], tuple[int, float]] | None = None,
) -> dict[str, float]:
    """Compare two clips, or two pictures (one frame each).

    Args:
        source: Frames, or the frames of a part of the file.
        target: Frames of the same part.
        source_fps: Frames a second.
        target_fps: Frames a second.
        durations_s: The durations of the files, when the frames are a part of them.
        files: Numbers of frames and rates of the files, likewise.

    Returns:
        Of clips: ``pair_fps_difference``; ``pair_by_frame`` (1 where both hold the same frames under different rates:
        they are compared, as they are encoded, frame by frame); ``pair_length_difference`` (share of the longer);
        ``pair_offset_frames``
        (positive: the target is late; 0 unless it is clear); ``pair_offset_gain``; ``pair_cuts_source``,
        ``pair_cuts_target``, ``pair_one_sided_cuts``; ``pair_motion_source``, ``pair_motion_ratio``. Of both:
        ``pair_mirrored``, ``pair_change`` (levels, in the part that changes most), ``pair_change_share`` (of the
        frame), ``pair_relation``.
    """
    colours_a, colours_b = _square(source), _square(target)
    scores: dict[str, float] = {}
    clips = len(source) > 1 and len(target) > 1
    if clips:
        lengths = durations_s or (len(source) / source_fps, len(target) / target_fps)
        scores["pair_fps_difference"] = abs(source_fps - target_fps)
        counts, rates = zip(*(files or ((len(source), source_fps), (len(target), target_fps))), strict=True)
        if same_frames(counts, rates):
            scores["pair_by_frame"] = 1.0
            lengths = (lengths[0], lengths[0] * counts[1] / counts[0])
            target_fps *= rates[0] / rates[1]
        scores["pair_length_difference"] = abs(lengths[0] - lengths[1]) / max(lengths)
        colours_b = _at_rate(colours_b, target_fps, source_fps)
    a, b = _luma(colours_a), _luma(colours_b)
    # To mirror a video is an edit too: it is undone before anything is compared by place.
    scores["pair_mirrored"] = float(relation(*_in_step(a, b[:, :, ::-1], 0)) > relation(*_in_step(a, b, 0)) + 0.1)
    if scores["pair_mirrored"]:
        b = np.ascontiguousarray(b[:, :, ::-1])
    lag = 0
    if clips:
        lag, gain = temporal_offset(a, b, round(MAX_LAG_S * source_fps))
        lag = lag if gain >= CLEAR_GAIN else 0
        cuts_a, cuts_b = cuts(a), cuts(b)
        # A cut in what only one side shows can have no counterpart.
        both = range(max(-lag, 0), min(len(a), len(b) - lag))
        shared_a, shared_b = ([cut for cut in found if cut in both] for found in (cuts_a, [c - lag for c in cuts_b]))
        moves = motion(a, source_fps)
        scores |= {
            "pair_offset_frames": float(lag),
            "pair_offset_gain": gain,
            "pair_cuts_source": float(len(cuts_a)),
            "pair_cuts_target": float(len(cuts_b)),
            "pair_one_sided_cuts": float(_one_sided(shared_a, shared_b)),
            "pair_motion_source": moves,
            "pair_motion_ratio": min(motion(b, source_fps) / max(moves, 1e-4), 100.0),
        }
    # In colour: a garment may change its hue and keep its luma.
    pairs = zip(*_in_step(colours_a, colours_b, lag), strict=True)
    change = np.stack([_change(x, y) for x, y in pairs]).mean(0)
    scores |= {"pair_change": float(change.max()), "pair_change_share": float(np.mean(change > 4.0))}
    scores["pair_relation"] = relation(*_in_step(a, b, lag))
    return {name: round(value, 4) for name, value in scores.items()}


def pair_reasons(scores: dict[str, float], limits: PairLimits) -> list[str]:
    """Reason codes of the limits that a pair breaks; a limit of 0 is none."""
    reasons = []

    def check(reason: str, score: str, low: float = 0.0, high: float = 0.0) -> None:
        value = abs(scores.get(score, low))
        if (low and value < low) or (high and value > high):
            reasons.append(reason)

    check("length_mismatch", "pair_length_difference", high=limits.max_length_difference)
    # Rates are brought in step where frames or seconds agree; where neither does, nobody knows which were meant.
    if "length_mismatch" in reasons or not limits.realign:
        check("fps_mismatch", "pair_fps_difference", high=limits.max_fps_difference)
    reasons.sort(key=lambda reason: reason != "fps_mismatch")
    check("temporal_offset", "pair_offset_frames", high=limits.max_offset_frames)
    check("one_sided_cut", "pair_one_sided_cuts", high=limits.max_one_sided_cuts)
    if scores.get("pair_motion_source", 0.0) > MOVES:
        check("static_target", "pair_motion_ratio", low=limits.min_motion_ratio)
    check("no_op", "pair_change", low=limits.min_change)
    check("unrelated", "pair_relation", low=limits.min_relation)
    return reasons


def _square(frames: np.ndarray) -> np.ndarray:
    """Frames at 64 x 64: pairs of different size become comparable, uint8 [frames, 64, 64, 3]."""
    return np.stack([cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for frame in frames])


def _change(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Difference of colours [16, 16] of the parts of a frame; means first, so that noise and compression cancel."""
    difference = cv2.resize(a.astype(np.float32) - b, (16, 16), interpolation=cv2.INTER_AREA)
    return np.abs(difference).max(2)


def _luma(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


def _at_rate(frames: np.ndarray, fps: float, wanted: float) -> np.ndarray:
    if abs(fps - wanted) < 1e-3:
        return frames
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


def _one_sided(cuts_a: list[int], cuts_b: list[int]) -> int:
    """Number of cuts that have no counterpart within two frames."""

    def alone(some: list[int], others: list[int]) -> int:
        return sum(all(abs(cut - other) > 2 for other in others) for cut in some)

    return alone(cuts_a, cuts_b) + alone(cuts_b, cuts_a)


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


def in_step_paths(source: str, target: str, scores: dict[str, float], fps: float) -> tuple[str, str]:
    """Paths that leave out the start of whichever side is early, so that a shifted pair is in step.

    Args:
        source: Media path, or a part of one.
        target: The same.
        scores: The scores of :func:`pair_scores`, made of every frame.
        fps: Frames a second of both.
    """
    lag = int(scores.get("pair_offset_frames", 0))
    if lag > 0:
        return source, _without_start(target, lag, fps)
    if lag < 0:
        return _without_start(source, -lag, fps), target
    return source, target


def _without_start(path: str, frames: int, fps: float) -> str:
    _, part = split_fragment(path)
    if part is not None and part.seconds:
        start, end = part.seconds
        return with_fragment(path, Fragment(seconds=((start or 0.0) + frames / fps, end)))
    first, end = part.frames if part is not None and part.frames else (0, None)
    return with_fragment(path, Fragment(frames=(first + frames, end)))
