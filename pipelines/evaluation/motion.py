"""Motion of videos by classical optical flow: temporal consistency, and whether an edit kept the source's motion.

DIS flow (Kroeger et al. 2016, OpenCV) needs no weights. Flow runs at no more than 256 pixels on the long side, and
distances are reported in pixels of that size, so that resolutions compare.
"""

import itertools
from dataclasses import dataclass

import cv2
import numpy as np

from loomvideo.pipelines.evaluation.metrics import check_pair, check_video

FLOW_SIDE = 256
_MIN_MOTION = 0.5


@dataclass(frozen=True)
class MotionFidelity:
    """How an edited video moves compared with its source.

    Attributes:
        endpoint_error: Mean distance of flow vectors, pixels a frame.
        direction_cosine: Mean cosine between flow vectors where the source moves; NaN for a still source.
        magnitude_ratio: Mean flow length of the edit over that of the source; NaN for a still source.
    """

    endpoint_error: float
    direction_cosine: float
    magnitude_ratio: float


def flow_sequence(video: np.ndarray) -> np.ndarray:
    """Forward flow ``[frames - 1, height, width, 2]`` at flow resolution."""
    check_video(video)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in _shrunk(video)]
    return np.stack([_flow(a, b) for a, b in itertools.pairwise(grey)])


def warp_error(video: np.ndarray) -> float:
    """Mean absolute difference, in grey levels, of each frame and the next one warped back by flow.

    Pixels whose forward and backward flow disagree (occlusions; Lai et al. 2018) and those that leave the frame do not
    count. Low for still or smoothly moving content, high for flicker and boiling textures. 0 for one frame.
    """
    check_video(video)
    frames = _shrunk(video)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    errors = []
    for i in range(len(frames) - 1):
        forward, backward = _flow(grey[i], grey[i + 1]), _flow(grey[i + 1], grey[i])
        positions = _positions(forward) + forward
        warped = _sample(frames[i + 1], positions)
        visible = _consistent(forward, _sample(backward, positions)) & _inside(positions)
        if visible.any():
            errors.append(np.abs(warped.astype(np.float32) - frames[i])[visible].mean())
    return float(np.mean(errors)) if errors else 0.0


def motion_fidelity(video: np.ndarray, source: np.ndarray) -> MotionFidelity:
    """Compare the flow of an edited video with that of its source (same shape)."""
    check_pair(video, source)
    if len(video) < 2:
        return MotionFidelity(0.0, float("nan"), float("nan"))
    edited, original = flow_sequence(video), flow_sequence(source)
    lengths, source_lengths = (np.linalg.norm(flow, axis=-1) for flow in (edited, original))
    moving = source_lengths > _MIN_MOTION
    error = float(np.linalg.norm(edited - original, axis=-1).mean())
    if not moving.any():
        return MotionFidelity(error, float("nan"), float("nan"))
    dot = (edited * original).sum(-1)[moving]
    cosine = dot / np.maximum(lengths[moving] * source_lengths[moving], 1e-6)
    return MotionFidelity(error, float(cosine.mean()), float(lengths[moving].mean() / source_lengths[moving].mean()))


def motion_amount(video: np.ndarray) -> float:
    """Mean flow length in pixels a frame; 0 for one frame."""
    return float(np.linalg.norm(flow_sequence(video), axis=-1).mean()) if len(video) > 1 else 0.0


def _shrunk(video: np.ndarray) -> np.ndarray:
    height, width = video.shape[1:3]
    scale = FLOW_SIDE / max(height, width)
    if scale >= 1:
        return video
    size = (max(16, round(width * scale)), max(16, round(height * scale)))
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in video])


def _flow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # DIS needs a pyramid of patches; Farnebäck works down to thumbnails.
    if min(a.shape) < 64:
        return cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 9, 3, 5, 1.1, 0)
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(a, b, None)


def _positions(flow: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[0 : flow.shape[0], 0 : flow.shape[1]].astype(np.float32)
    return np.stack([x, y], -1)


def _sample(image: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return cv2.remap(image, positions.astype(np.float32), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _inside(positions: np.ndarray) -> np.ndarray:
    height, width = positions.shape[:2]
    x, y = positions[..., 0], positions[..., 1]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def _consistent(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    gap = np.square(forward + backward).sum(-1)
    return gap <= 0.01 * (np.square(forward).sum(-1) + np.square(backward).sum(-1)) + 0.5
