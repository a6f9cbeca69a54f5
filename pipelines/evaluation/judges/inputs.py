"""The media of one sample as a judge is shown them."""

from collections.abc import Sequence

import numpy as np

from loomvideo.pipelines.vlm.requests import FrameSampling, VLMMedia, encode_media


def given_media(
    sampling: FrameSampling, source: np.ndarray | None, references: Sequence[np.ndarray]
) -> tuple[VLMMedia, ...]:
    """What a sample was made from: its source, then its reference pictures [height, width, 3]."""
    before = () if source is None else (encode_media("Before editing", source, sampling),)
    pictures = (encode_media(f"Reference picture {n}", r[None], sampling) for n, r in enumerate(references, 1))
    return (*before, *pictures)


def media_for_item(
    sampling: FrameSampling, result: np.ndarray, source: np.ndarray | None, references: Sequence[np.ndarray]
) -> tuple[VLMMedia, ...]:
    """What a sample was made from, and then its result."""
    label = "After editing" if source is not None else "Generated result"
    return (*given_media(sampling, source, references), encode_media(label, result, sampling))
