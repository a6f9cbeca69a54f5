"""Scores of one clip or picture, and the limits they are held against.

All functions are pure: frames in, numbers out. Frames are uint8 ``[frames, height, width, 3]``, RGB.
"""

import cv2
import numpy as np

from loomvideo.pipelines.prepare.curation.options import QualityLimits

THUMBNAIL = 160
SHARPNESS_SIDE = 320
# Frame pairs for optical flow and frames for sharpness: more do not change a clip's score much.
MAX_SAMPLES = 8


def grey_thumbnails(frames: np.ndarray, side: int = THUMBNAIL) -> np.ndarray:
    """Luma of all frames with the longer side reduced to ``side``, uint8 [frames, h, w]."""
    height, width = frames.shape[1:3]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = (cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames)
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in small])


def clip_scores(frames: np.ndarray, fps: float) -> dict[str, float]:
    """Scores of a clip; of a picture (one frame) those without motion.

    Returns:
        ``duration_s``; ``motion``: mean optical flow in frame heights a second; ``frozen_share``: of frames equal to
        the one before; ``black_share``; ``sharpness``: median variance of the Laplacian at 320 pixels; ``brightness``,
        ``contrast``: mean and spread of luma; ``dark_share``, ``bright_share``: of pixels below 10 or above 245.
    """
    luma = grey_thumbnails(frames)
    scores = {
        "black_share": float(np.mean([np.mean(frame < 20) > 0.98 for frame in luma])),
        "sharpness": sharpness(frames),
        "brightness": float(luma.mean()),
        "contrast": float(np.median(luma.std((1, 2)))),
        "dark_share": float(np.mean(luma < 10)),
        "bright_share": float(np.mean(luma > 245)),
    }
    if len(frames) > 1:
        scores["duration_s"] = len(frames) / fps
        scores["motion"] = motion(luma, fps)
        scores["frozen_share"] = float(np.mean(frozen(luma)))
    return scores


def sharpness(frames: np.ndarray) -> float:
    """Median variance of the Laplacian (Pech-Pacheco et al. 2000) of luma at a longer side of 320 pixels at most."""
    chosen = frames[_spread(len(frames), MAX_SAMPLES)]
    return float(np.median([cv2.Laplacian(f, cv2.CV_32F).var() for f in grey_thumbnails(chosen, SHARPNESS_SIDE)]))


def blockiness(frames: list[np.ndarray]) -> float:
    """Steps of luma at the borders of 8x8 blocks over steps elsewhere; 1 where no coder left its grid.

    ``max over offsets o of mean |d_x| at x = o (mod 8) / mean |d_x| elsewhere``, averaged over both axes and the median
    of frames uint8 [h, w, 3] in full size: a picture that was cropped has its grid somewhere. After Wang, Sheikh and
    Bovik (2002), who take the grid as known.
    """
    found = []
    for frame in frames:
        luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
        ratios = []
        for steps in (np.abs(np.diff(luma, axis=1)).mean(0), np.abs(np.diff(luma, axis=0)).mean(1)):
            if len(steps) < 16:
                continue
            columns = np.array([steps[offset::8].mean() for offset in range(8)])
            best = int(columns.argmax())
            ratios.append(columns[best] / max(float(np.delete(columns, best).mean()), 1e-3))
        found.append(float(np.mean(ratios)) if ratios else 1.0)
    return float(np.median(found))


def motion(luma: np.ndarray, fps: float) -> float:
    """Mean dense optical flow (DIS, Kroeger et al. 2016) in frame heights a second, over neighbouring frames."""
    # DIS needs some pixels for its pyramid.
    if min(luma.shape[1:]) < 32:
        luma = np.stack([cv2.resize(f, (64, 64), interpolation=cv2.INTER_LINEAR) for f in luma])
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    lengths = [
        np.linalg.norm(flow.calc(luma[i], luma[i + 1], None), axis=-1).mean()
        for i in _spread(len(luma) - 1, MAX_SAMPLES)
    ]
    return float(np.mean(lengths)) * fps / luma.shape[1]


def frozen(luma: np.ndarray) -> np.ndarray:
    """Which frames repeat the one before them, bool [frames - 1]: no part of the picture changes by a level."""
    changes = np.abs(np.diff(luma.astype(np.int16), axis=0))
    return np.array([block_means(change, 8).max() < 1.0 for change in changes])


def block_means(picture: np.ndarray, blocks: int) -> np.ndarray:
    """Means over a grid of ``blocks`` x ``blocks`` parts of a picture [h, w]."""
    return cv2.resize(picture.astype(np.float32), (blocks, blocks), interpolation=cv2.INTER_AREA)


def _spread(total: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(int))


def quality_reasons(scores: dict[str, float], width: int, height: int, limits: QualityLimits) -> list[str]:
    """Reason codes of the limits that a clip or picture breaks; a limit of 0 is none."""
    reasons = []

    def check(reason: str, score: str, low: float = 0.0, high: float = 0.0) -> None:
        value = scores.get(score)
        if value is not None and ((low and value < low) or (high and value > high)):
            reasons.append(reason)

    if limits.min_short_side and min(width, height) < limits.min_short_side:
        reasons.append("too_small")
    if limits.max_aspect and max(width, height) > limits.max_aspect * min(width, height):
        reasons.append("extreme_aspect")
    check("too_short", "duration_s", low=limits.min_duration_s)
    check("too_long", "duration_s", high=limits.max_duration_s)
    check("still", "motion", low=limits.min_motion)
    check("shaky", "motion", high=limits.max_motion)
    check("frozen", "frozen_share", high=limits.max_frozen_share)
    check("black", "black_share", high=limits.max_black_share)
    check("blurred", "sharpness", low=limits.min_sharpness)
    check("underexposed", "brightness", low=limits.min_brightness)
    check("overexposed", "brightness", high=limits.max_brightness)
    check("flat", "contrast", low=limits.min_contrast)
    check("blocky", "blockiness", high=limits.max_blockiness)
    return reasons
