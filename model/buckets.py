"""Resolution buckets: which size a picture or clip is resized and cropped to.

Sizes are ``(width, height)``, all multiples of 32: 16 of the published codec times 2 of the DiT's patches, and so of
every finer codec's. A class is named after the side of its square bucket; 256, 640 and 960 are the published ones, 64
to 128 serve the small models.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from loomvideo.platform.errors import UserError

Kind = Literal["image", "video"]
Size = tuple[int, int]


def _with_portraits(square: int, *landscapes: Size) -> tuple[Size, ...]:
    sizes = [(square, square)]
    for width, height in landscapes:
        sizes += [(width, height), (height, width)]
    return tuple(sizes)


IMAGE_BUCKETS: dict[int, tuple[Size, ...]] = {
    64: _with_portraits(64, (96, 64)),
    96: _with_portraits(96, (128, 96)),
    128: _with_portraits(128, (160, 128), (160, 96), (192, 96)),
    256: _with_portraits(256, (288, 224), (320, 224), (352, 192), (384, 160)),
    640: _with_portraits(640, (704, 544), (768, 512), (832, 480), (960, 416)),
    960: _with_portraits(960, (1088, 864), (1152, 800), (1280, 704), (1472, 608)),
}
VIDEO_BUCKETS: dict[int, tuple[Size, ...]] = IMAGE_BUCKETS | {960: (*IMAGE_BUCKETS[960], (960, 704), (704, 960))}


def buckets(kind: Kind) -> dict[int, tuple[Size, ...]]:
    """Every class and its ``(width, height)`` sizes for images or videos."""
    return IMAGE_BUCKETS if kind == "image" else VIDEO_BUCKETS


def choose_bucket(width: int, height: int, classes: Sequence[int | str], kind: Kind) -> Size:
    """The bucket of the nearest area class, then of the nearest aspect ratio.

    Args:
        width: The width of the picture or clip, in pixels.
        height: The height of the picture or clip, in pixels.
        classes: The classes to choose from, such as ``[256, 640]``.
        kind: Images and videos differ in class 960.

    Raises:
        UserError: if a class does not exist or a side is not positive.
    """
    table = buckets(kind)
    keys = [int(key) if str(key).isdigit() else key for key in classes]
    unknown = [key for key in keys if key not in table]
    if unknown or not keys:
        raise UserError(f"bucket classes {list(classes)}: choose from {', '.join(map(str, table))}")
    if width < 1 or height < 1:
        raise UserError(f"size {width}x{height}: both sides must be positive")
    key = min(keys, key=lambda key: abs(width * height - key * key))
    return min(table[key], key=lambda size: abs(size[0] / size[1] - width / height))


def resize_and_crop(frames: torch.Tensor, bucket: Size) -> torch.Tensor:
    """Scale the short side to the bucket and cut the centre.

    Args:
        frames: uint8 ``[frames, height, width, 3]`` (numpy arrays are accepted).
        bucket: ``(width, height)``.

    Returns:
        uint8 ``[frames, bucket height, bucket width, 3]``.
    """
    frames = torch.as_tensor(frames)
    height, width = frames.shape[1:3]
    bucket_width, bucket_height = bucket
    scale = max(bucket_width / width, bucket_height / height)
    scaled = max(round(height * scale), bucket_height), max(round(width * scale), bucket_width)
    frames = resize_frames(frames, *scaled)
    top, left = (scaled[0] - bucket_height) // 2, (scaled[1] - bucket_width) // 2
    return frames[:, top : top + bucket_height, left : left + bucket_width].contiguous()


def resize_frames(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Antialiased bicubic resize of uint8 ``[frames, height, width, 3]``, rounded to uint8 as Pillow does."""
    if tuple(frames.shape[1:3]) == (height, width):
        return frames
    planes = frames.permute(0, 3, 1, 2)
    planes = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return planes.permute(0, 2, 3, 1).contiguous()
