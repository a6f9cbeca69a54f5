"""The media of one sample as a judge is shown them."""

from collections.abc import Sequence

import numpy as np

from loomvideo.pipelines.vlm.requests import FrameSampling, VLMMedia, encode_media


def media_for_item(
    sampling: FrameSampling,
    result: np.ndarray,
    source: np.ndarray | None,
    references: Sequence[np.ndarray],
) -> tuple[VLMMedia, ...]:
    """The inputs of one sample in a fixed order: source, references, result."""
    media = []
    if source is not None:
        media.append(encode_media("Before editing", source, sampling))
    for number, reference in enumerate(references, 1):
        media.append(encode_media(f"Reference picture {number}", reference, sampling))
    label = "After editing" if source is not None else "Generated result"
    return (*media, encode_media(label, result, sampling))
