"""A benchmark item's media as the model gets them: the conditioned window, in the bucket's size.

Everything downstream (generator, metrics, judge, review page) sees the same source frames, so that nothing is compared
with seconds or pixels that the model never saw.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from loomvideo.model.buckets import choose_bucket
from loomvideo.model.clips import TARGET_FPS
from loomvideo.model.codec import LatentGrid
from loomvideo.model.sizes import PUBLISHED, model_size
from loomvideo.model.tasks import Medium, task
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.pipelines.media.decode import OpenMedia, open_media
from loomvideo.pipelines.media.windows import MediaWindow, media_window, picture_window


@dataclass(frozen=True)
class InputOptions:
    """Sizes of what is generated.

    Attributes:
        bucket_classes: Area classes to choose from, such as ``(640,)``.
        reference_classes: Area classes of reference pictures.
        grid: The grid of the model's codec.
        num_frames: Frames of a video, whole latents.
        fps: Frames a second of sources after resampling, and of results.
        text_size: ``(width, height)`` where there is no source or reference to take it from.
    """

    bucket_classes: tuple[int, ...] = (640,)
    reference_classes: tuple[int, ...] = (640,)
    grid: LatentGrid = field(default_factory=lambda: model_size(PUBLISHED).grid)
    num_frames: int = 97
    fps: float = TARGET_FPS
    text_size: tuple[int, int] = (832, 480)


@dataclass(frozen=True)
class LoadedItem:
    """An item with its media decoded.

    Attributes:
        item: The manifest's row.
        source: uint8 ``[frames, height, width, 3]`` of the conditioned window, or None.
        references: uint8 ``[height, width, 3]`` each.
        target: Ground truth of the source's window and size, or None.
        mask: Boolean ``[1 or frames, height, width]`` of the region the edit may change, or None.
        size: ``(width, height)`` to generate.
        num_frames: Frames to generate.
        fps: Frames a second.
        frame_indices: Which frames of the source file are the window.
        block_periods: Pixels from one edge of a latent cell to the next, and of a token.
    """

    item: EvalItem
    source: np.ndarray | None
    references: tuple[np.ndarray, ...]
    target: np.ndarray | None
    mask: np.ndarray | None
    size: tuple[int, int]
    num_frames: int
    fps: float
    frame_indices: tuple[int, ...] = ()
    block_periods: tuple[int, ...] = (16, 32)

    def with_item(self, item: EvalItem) -> "LoadedItem":
        """The same media with another row of the manifest, such as another text."""
        return dataclasses.replace(self, item=item)


def load_item(item: EvalItem, root: Path, options: InputOptions) -> LoadedItem:
    """Decode an item's media.

    The window starts at the first frame: unlike a random start, judge and model then see the same seconds.

    Raises:
        DecodeError: for a file that cannot be used.
    """
    kind = task(item.task).makes
    wanted = 1 if kind == "image" else options.num_frames
    size: tuple[int, int] | None = None
    references = []
    for path in item.references:
        media = open_media(str(root / path))
        references.append(_frames(media, picture_window(media.info, options.reference_classes)).numpy()[0])
        if size is None:
            size = choose_bucket(media.info.width, media.info.height, options.bucket_classes, kind)
    source, indices = None, ()
    if item.source:
        media = open_media(str(root / item.source))
        window = _window(media, kind, wanted, options)
        source, indices, size = _frames(media, window).numpy(), window.indices, window.size
        wanted = len(source)
    target = None
    if item.target:
        media = open_media(str(root / item.target))
        window = _window(media, kind, wanted, options, indices)
        size = window.size if size is None or source is None else size
        target = _frames(media, dataclasses.replace(window, size=size)).numpy()
        shared = options.grid.whole_frames(min(len(target), wanted))
        target, wanted = target[:shared], shared
        source = None if source is None else source[:shared]
    mask = None
    if item.mask and size is not None:
        media = open_media(str(root / item.mask))
        window = dataclasses.replace(_window(media, kind, wanted, options, indices), size=size)
        mask = _frames(media, window).numpy().max(-1) > 127
    size = size or choose_bucket(*options.text_size, options.bucket_classes, kind)
    periods = options.grid.spatial_stride, min(options.grid.side_multiples)
    return LoadedItem(item, source, tuple(references), target, mask, size, wanted, options.fps, tuple(indices), periods)


def _window(
    media: OpenMedia, kind: Medium, num_frames: int, options: InputOptions, aligned: Sequence[int] = ()
) -> MediaWindow:
    """A file's window; the source's ``aligned`` frame numbers are kept where the file has them."""
    window = media_window(media.info, kind, options.bucket_classes, num_frames, options.grid, options.fps)
    # Another few frames asked of the same file may be other frames: the window depends on how many are wanted.
    fits = len(aligned) >= num_frames > 1 and media.info.kind == "video" and max(aligned) < media.info.num_frames
    return dataclasses.replace(window, indices=tuple(aligned)) if fits else window


def _frames(media: OpenMedia, window: MediaWindow) -> torch.Tensor:
    return window.fit(torch.from_numpy(np.concatenate(list(media.read(window.indices)))))
