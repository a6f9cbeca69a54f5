"""Films of any length: edited in overlapping windows that agree where they meet, within the memory of one window.

A window is encoded, denoised and decoded by itself, as the model was trained. What holds two of them together is the
source, which Scale-and-Add gives both alike, and three things in the frames that they share: the same noise; an anchor,
which draws the later window's latents to the encoded end of the earlier one, fully at its first latent and less with
each further one; and a crossfade of the decoded frames.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loomvideo.model.codec import LatentGrid
from loomvideo.model.conditions import Conditions
from loomvideo.model.pipeline import LoomVideoPipeline
from loomvideo.model.sampler import Anchor
from loomvideo.platform.errors import UserError

ReadFrames = Callable[[int, int], np.ndarray]
"""Frames of the source, uint8 [frames, height, width, 3], from a first to before a last."""
SampleWindow = Callable[[Conditions, Tensor, Anchor | None], Tensor]
"""Latents of a window from its conditions, noise and anchor."""


@dataclass(frozen=True)
class Window:
    """Frames of a film that are edited together.

    Attributes:
        start: First frame.
        num_frames: Frames the model is given, a whole number of latents; past the film's end its last one repeats.
        shared: Frames at its start that the window before has too.
    """

    start: int
    num_frames: int
    shared: int


def film_windows(total: int, num_frames: int, overlap: int, grid: LatentGrid) -> list[Window]:
    """Windows that cover a film.

    Args:
        total: Frames of the film.
        num_frames: Frames of a window.
        overlap: Frames that neighbours share; 0 takes about a sixth of a window.
        grid: How the model's codec and patches divide pixels and frames.

    Raises:
        UserError: if a window is none the model can make, or neighbours share too much.
    """
    grid.check_frames("num_frames", num_frames)
    if not overlap:
        least = grid.covering_frames(2)
        overlap = min(max(grid.covering_frames(num_frames // 6), least), grid.whole_frames(num_frames - 1))
    grid.check_frames("overlap", overlap)
    if not 1 <= overlap < num_frames:
        raise UserError(f"overlap={overlap}: at least 1 and less than num_frames={num_frames}")
    windows = [Window(0, num_frames, 0)]
    while windows[-1].start + num_frames < total:
        windows.append(Window(windows[-1].start + num_frames - overlap, num_frames, overlap))
    last = windows[-1]
    if len(windows) == 1:
        return [Window(0, min(num_frames, grid.covering_frames(total)), 0)]
    # The last one begins earlier in place of being shorter: a model edits few frames otherwise than many.
    back = (last.start + num_frames - total) // grid.temporal_stride * grid.temporal_stride
    windows[-1] = Window(last.start - back, num_frames, last.shared + back)
    return windows


def edit_film(
    pipeline: LoomVideoPipeline,
    read: ReadFrames,
    total: int,
    windows: list[Window],
    encode: Callable[[np.ndarray], Conditions],
    sample: SampleWindow,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Edit a film; yields its frames in pieces, ``total`` in all.

    A film of one window is what the pipeline makes of it alone.

    Args:
        pipeline: The model.
        read: The source at the size of the model.
        total: Frames of the source.
        windows: What :func:`film_windows` gave.
        encode: Conditions of a window's source frames.
        sample: Denoises a window.
        seed: The seed of the noise.
    """
    grid, generator = pipeline.grid, torch.Generator().manual_seed(seed)
    noise: Tensor | None = None
    tail: np.ndarray | None = None
    source: np.ndarray | None = None
    for window, following in zip(windows, [*windows[1:], None], strict=True):
        source = _source(read, total, window, source)
        conditions = encode(source)
        noise = _next_noise(conditions, noise, window, grid, generator)
        anchor = None if tail is None else Anchor.fading(pipeline.latents(tail))
        frames = pipeline.decode(sample(conditions, noise, anchor))
        if tail is not None:
            frames[: len(tail)] = _crossfade(tail, frames[: len(tail)])
        kept = total - window.start if following is None else window.num_frames - following.shared
        tail = None if following is None else frames[kept:].copy()
        yield frames[:kept]


def _source(read: ReadFrames, total: int, window: Window, before: np.ndarray | None) -> np.ndarray:
    """The window's source frames; those that the window before had are not read again."""
    end = window.start + window.num_frames
    parts = [] if before is None or not window.shared else [before[len(before) - window.shared :]]
    new = window.start + window.shared
    if new < total:
        parts.append(read(new, min(end, total)))
    if end > total:
        parts.append(np.repeat(parts[-1][-1:], end - total, axis=0))
    return np.concatenate(parts)


def _next_noise(
    conditions: Conditions, before: Tensor | None, window: Window, grid: LatentGrid, generator: torch.Generator
) -> Tensor:
    """Noise that is the same as the window before had in the latents that both have."""
    noise = torch.randn(conditions.latent_shape, generator=generator)
    if before is not None:
        shared = grid.latent_frames(window.shared)
        noise[:, :shared] = before[:, before.shape[1] - shared :]
    return noise


def _crossfade(earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
    """From the earlier frames to the later ones, uint8 [frames, height, width, 3]."""
    share = ((np.arange(len(earlier), dtype=np.float32) + 1) / (len(earlier) + 1))[:, None, None, None]
    return np.round(earlier + share * (later.astype(np.float32) - earlier)).astype(np.uint8)


def seam_energy(frames: np.ndarray, joints: list[int]) -> tuple[float, float]:
    """How visible joints are.

    Args:
        frames: uint8 [frames, height, width, 3].
        joints: Indices of the frames that come right after a joint.

    Returns:
        The largest mean absolute change onto such a frame, and the largest of all other changes between neighbours.
    """
    changes = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    at_joints = np.zeros(len(changes), bool)
    at_joints[[joint - 1 for joint in joints]] = True
    return float(changes[at_joints].max(initial=0.0)), float(changes[~at_joints].max(initial=0.0))
