"""Whether a picture from words wears what its caption names: a check without a judge, for figures of the sample world.

The codec's scene reader (:mod:`loomvideo.model.codec.scene`) says which cells are an upper garment (a dress or a coat
is one) and which a lower one. A drawing is right if it has those that the caption names, each in its colour by most of
its pixels; a skirt is not told from trousers, nor a coat from a dress. The reader knows pictures with a figure alone:
in one without it may take a wall for cloth, which then seldom has the colour.
"""

import functools
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch

from loomvideo.model.codec.learned import SPATIAL_STRIDE, TEMPORAL_STRIDE
from loomvideo.model.codec.scene import CLASSES, SceneReader
from loomvideo.pipelines.evaluation.editing import nearest_colour
from loomvideo.pipelines.evaluation.metrics import check_video
from loomvideo.pipelines.sample_data.garments import COLOURS, LOWER

SIDE = 96
"""Pixels of the shorter side at which the reader has seen figures."""
LEAST_SHARE = 0.1
"""Of all garment cells; what is less is a cell misread at an edge."""
LEAST_CELLS = 2
"""In a frame; a garment of the sample world covers at least five."""
LEAST_AREA = 0.15
"""Of the picture, for all together; figures of the sample world wear a quarter to a third."""
UPPER_CLASS, LOWER_CLASS = CLASSES.index("upper garment"), CLASSES.index("lower garment")


def drawn_garments(video: np.ndarray) -> dict[int, np.ndarray]:
    """Which pixels are garments, by their number in :data:`~loomvideo.model.codec.scene.CLASSES`.

    Args:
        video: uint8 ``[frames, height, width, 3]``; larger ones are looked at in small.

    Returns:
        Masks ``[frames, height, width]`` of an upper and a lower garment, those that are there.
    """
    check_video(video)
    classes = np.stack([_cells(frame) for frame in video])
    masks = {number: classes == number for number in (UPPER_CLASS, LOWER_CLASS)}
    least = max(LEAST_CELLS * len(video), LEAST_SHARE * sum(mask.sum() for mask in masks.values()))
    if sum(mask.mean() for mask in masks.values()) < LEAST_AREA:
        return {}
    return {number: _grown(mask, video.shape[1:3]) for number, mask in masks.items() if mask.sum() >= least}


def garments_right(video: np.ndarray, garments: Sequence[Mapping[str, str]]) -> bool:
    """Whether a video shows upper and lower garments as named, each in its colour.

    Args:
        video: uint8 ``[frames, height, width, 3]``.
        garments: ``type``, ``colour`` and, of a patterned one, ``accent`` of each, as in a sample's ``extra.garments``.
    """
    masks = drawn_garments(video)
    wanted = {LOWER_CLASS if garment["type"] in LOWER else UPPER_CLASS: garment for garment in garments}
    return set(masks) == set(wanted) and all(
        nearest_colour(video, masks[number], COLOURS, without=garment.get("accent"), mixed=True) == garment["colour"]
        for number, garment in wanted.items()
    )


def _cells(frame: np.ndarray) -> np.ndarray:
    """Classes of a frame's cells [rows, columns], the frame standing still for as long as a latent lasts."""
    height, width = frame.shape[:2]
    scale = SIDE / min(height, width)
    columns, rows = (max(round(side * scale / SPATIAL_STRIDE), 1) for side in (width, height))
    small = cv2.resize(frame, (columns * SPATIAL_STRIDE, rows * SPATIAL_STRIDE), interpolation=cv2.INTER_AREA)
    picture = torch.from_numpy(small).permute(2, 0, 1).float() / 127.5 - 1
    # Three colours of four frames, as the codec stacks them.
    stacked = picture[:, None].expand(-1, TEMPORAL_STRIDE, -1, -1).flatten(0, 1)
    with torch.no_grad():
        return _reader()(stacked[None])[0].argmax(0).numpy()


def _grown(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask of cells as one of pixels, of (height, width)."""
    frames = [cv2.resize(cells.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST) for cells in mask]
    return np.stack(frames) > 0


@functools.cache
def _reader() -> SceneReader:
    return SceneReader.load()
