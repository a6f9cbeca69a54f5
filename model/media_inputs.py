"""Pictures and clips as people have them, brought to what the codec takes."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from loomvideo.model.buckets import choose_bucket, resize_and_crop
from loomvideo.model.clips import clip_indices
from loomvideo.model.codec import LatentGrid
from loomvideo.platform.errors import UserError

Picture = np.ndarray | Image.Image
"""uint8 [height, width, 3], or a Pillow image."""
Clip = np.ndarray | Image.Image | Sequence[Picture]
"""uint8 [frames, height, width, 3], or pictures of one size; a single picture is a clip of one frame."""


def as_picture(picture: Picture) -> np.ndarray:
    """uint8 [height, width, 3].

    Raises:
        UserError: if it is something else.
    """
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise UserError(f"picture of {picture.dtype} {list(picture.shape)}: expected uint8 [height, width, 3]")
    return picture


def as_clip(clip: Clip) -> np.ndarray:
    """uint8 [frames, height, width, 3].

    Raises:
        UserError: if it is something else.
    """
    if isinstance(clip, np.ndarray) and clip.ndim == 4:
        pictures: Sequence[Picture] = list(clip)
    else:
        pictures = [clip] if isinstance(clip, (np.ndarray, Image.Image)) else list(clip)
    frames = [as_picture(picture) for picture in pictures]
    if not frames or len({frame.shape for frame in frames}) != 1:
        raise UserError(f"clip of {len(frames)} pictures: needs one or more, all of one size")
    return np.stack(frames)


def fit_clip(clip: Clip, buckets: Sequence[int], num_frames: int, fps: float, grid: LatentGrid) -> np.ndarray:
    """A clip at the published rate, cut to whole latents, resized and cropped to its bucket, as training saw clips.

    Args:
        clip: The source.
        buckets: Resolution classes.
        num_frames: Most frames.
        fps: Its frame rate.
        grid: The grid of the codec.
    """
    frames = as_clip(clip)
    frames = frames[clip_indices(fps, len(frames), num_frames, 0.0, grid)]
    kind = "image" if len(frames) == 1 else "video"
    return resize_and_crop(frames, choose_bucket(frames.shape[2], frames.shape[1], buckets, kind)).numpy()


def fit_picture(picture: Picture, buckets: Sequence[int]) -> np.ndarray:
    """A reference picture, resized and cropped to its bucket."""
    frames = as_clip(picture)
    return resize_and_crop(frames, choose_bucket(frames.shape[2], frames.shape[1], buckets, "image")).numpy()[0]
