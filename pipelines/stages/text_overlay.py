"""How much of a clip is covered by text, by RapidOCR's detector (its models ship in the wheel; extra: curate)."""

import logging

import cv2
import numpy as np

from loomvideo.pipelines.stages.options import TextLimits
from loomvideo.platform.errors import UserError


class TextDetector:
    """Finds text in frames; loads its model once."""

    def __init__(self, limits: TextLimits):
        """Load the detector on one CPU thread.

        Raises:
            UserError: without the extra.
        """
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise UserError("text.enabled=true needs RapidOCR: pip install 'loomvideo[curate]'") from error
        self.limits = limits
        self._engine = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,
                "Global.use_rec": False,
                "Det.limit_side_len": limits.side,
                "Det.limit_type": "max",
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )
        logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)

    def share(self, frames: np.ndarray) -> float:
        """Share of the frame that text covers, the mean over a few frames of a clip uint8 [frames, h, w, 3]."""
        chosen = np.unique(np.linspace(0, len(frames) - 1, self.limits.num_frames + 2)[1:-1].round().astype(int))
        return float(np.mean([self._covered(frames[i]) for i in chosen]))

    def _covered(self, frame: np.ndarray) -> float:
        found = self._engine(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), use_det=True, use_cls=False, use_rec=False)
        boxes = getattr(found, "boxes", None)
        if boxes is None or len(boxes) == 0:
            return 0.0
        mask = np.zeros(frame.shape[:2], np.uint8)
        cv2.fillPoly(mask, [np.round(box).astype(np.int32) for box in boxes], 1)
        return float(mask.mean())
