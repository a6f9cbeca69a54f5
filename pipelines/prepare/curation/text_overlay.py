"""How much of a clip is covered by text, by RapidOCR (its models ship in the wheel; extra: curate).

The detector alone takes stripes, buttons and leaves for writing; so what it finds is read, and counts only when the
reading is sure and has letters or digits.
"""

import logging

import cv2
import numpy as np

from loomvideo.pipelines.prepare.curation.options import TextLimits
from loomvideo.platform.errors import UserError, how_to_add


class TextDetector:
    """Finds text in frames; loads its models once."""

    def __init__(self, limits: TextLimits):
        """Load detector and reader on one CPU thread.

        Raises:
            UserError: without the extra.
        """
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise UserError(f"text.enabled=true needs RapidOCR: {how_to_add('curate')}") from error
        self.limits = limits
        self._engine = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,
                "Global.text_score": limits.min_confidence,
                "Det.limit_side_len": limits.side,
                "Det.limit_type": "max",
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )
        logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)

    def share(self, frames: list[np.ndarray]) -> float:
        """Share of the frame that text covers, the mean over frames uint8 [h, w, 3] of a clip."""
        return float(np.mean([self._covered(frame) for frame in frames]))

    def _covered(self, frame: np.ndarray) -> float:
        found = self._engine(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), use_det=True, use_cls=False, use_rec=True)
        mask = np.zeros(frame.shape[:2], np.uint8)
        # Without a reading the library answers with another class.
        texts = getattr(found, "txts", None) or ()
        for box, text in zip(found.boxes if texts else (), texts, strict=True):
            if sum(character.isalnum() for character in text) >= 2:
                cv2.fillPoly(mask, [np.round(box).astype(np.int32)], 1)
        return float(mask.mean())
