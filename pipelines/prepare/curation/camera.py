"""What the camera does, from points followed between neighbouring frames."""

import itertools

import cv2
import numpy as np

from loomvideo.pipelines.prepare.curation.quality import grey_thumbnails

_SIDE = 320
_POINTS = 200
_FEWEST = 8
MAX_PAIRS = 48
"""Neighbouring frames that are looked at, in one stretch from the middle of a clip."""


def camera_scores(frames: np.ndarray, fps: float) -> dict[str, float]:
    """Scores of a clip uint8 [frames, h, w, 3]; none where too little can be followed.

    Corners (Shi and Tomasi 1994) are followed by pyramidal Lucas-Kanade flow, and the similarity transform that most of
    them agree on (RANSAC) is the camera's: shift ``(x, y)`` of the middle of the frame, scale ``s``, angle ``a``.

    Returns:
        ``camera_pan``: ``|mean(x, y)| fps / height``, frame heights a second, so that shaking to and fro is no pan;
        ``camera_zoom``: ``|mean(log s)| fps``, 0.1 is 10 % a second; ``camera_roll``: ``|mean(a)| fps``, degrees a
        second; ``camera_shake``: median of ``|(x, y)[t+1] - 2 (x, y)[t] + (x, y)[t-1]| / height`` of the path, the
        sudden part of the shift from frame to frame, in frame heights; ``camera_followed``: share of points that agree.
    """
    start = max(0, (len(frames) - MAX_PAIRS - 1) // 2)
    luma = grey_thumbnails(frames[start : start + MAX_PAIRS + 1], _SIDE)
    height, width = luma.shape[1:]
    moves, agreeing = [], []
    for before, after in itertools.pairwise(luma):
        found = _similarity(before, after)
        if found is None:
            continue
        matrix, share = found
        middle = np.array([width / 2, height / 2])
        shift = matrix[:, :2] @ middle + matrix[:, 2] - middle
        scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
        angle = float(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))
        moves.append((*shift, np.log(scale), angle))
        agreeing.append(share)
    if len(moves) < max(1, (len(luma) - 1) // 2):
        return {}
    path = np.array(moves)
    scores = {
        "camera_pan": float(np.linalg.norm(path[:, :2].mean(0))) * fps / height,
        "camera_zoom": float(abs(path[:, 2].mean())) * fps,
        "camera_roll": float(abs(path[:, 3].mean())) * fps,
        "camera_followed": float(np.mean(agreeing)),
    }
    if len(path) > 1:
        scores["camera_shake"] = float(np.median(np.linalg.norm(np.diff(path[:, :2], axis=0), axis=1))) / height
    return scores


def _similarity(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, float] | None:
    """The transform [2, 3] of one frame to the next, and the share of points that follow it."""
    points = cv2.goodFeaturesToTrack(before, _POINTS, 0.01, 7)
    if points is None or len(points) < _FEWEST:
        return None
    moved, followed, _ = cv2.calcOpticalFlowPyrLK(before, after, points, None)
    good = followed.ravel() == 1
    if good.sum() < _FEWEST:
        return None
    cv2.setRNGSeed(0)
    matrix, inliers = cv2.estimateAffinePartial2D(points[good], moved[good], ransacReprojThreshold=1.0)
    return None if matrix is None else (matrix, float(inliers.mean()))
