"""Which frames of a file make a training clip, and which of those the MLLM sees."""

from loomvideo.model.codec.grid import LatentGrid
from loomvideo.platform.errors import UserError

TARGET_FPS = 24.0


def clip_indices(
    fps: float,
    total_frames: int,
    num_frames: int,
    relative_start: float,
    grid: LatentGrid,
    target_fps: float = TARGET_FPS,
) -> list[int]:
    """Indices of the frames of one clip, resampled to ``target_fps`` and cut to what the codec takes.

    A source and its target use the same ``relative_start``, and the shorter one's ``total_frames``.

    Args:
        fps: Frame rate of the file.
        total_frames: Frames in the file.
        num_frames: Frames wanted; fewer come back from a shorter file.
        relative_start: Where in the slack the clip starts, in [0, 1].
        grid: The grid of the codec: says which numbers of frames exist.
        target_fps: Frame rate of the clip.

    Raises:
        UserError: if the file has no frames or no frame rate.
    """
    if total_frames < 1 or not fps > 0:
        raise UserError(f"video has {total_frames} frames at {fps} fps: it needs at least one frame and a frame rate")
    if num_frames < 1 or not 0 <= relative_start <= 1:
        raise UserError(f"clip of {num_frames} frames from {relative_start}: need num_frames >= 1, start in [0, 1]")
    span = min(int(fps * (num_frames - 1) / target_fps) + 1, total_frames)
    start = round((total_frames - span) * relative_start)
    indices = []
    # The position is accumulated, as published: halves round by the accumulated error.
    position, step = float(start), fps / target_fps
    while len(indices) < num_frames and round(position) < start + span:
        indices.append(round(position))
        position += step
    return indices[: grid.whole_frames(len(indices))]


def mllm_frame_indices(num_frames: int) -> list[int]:
    """Which of a clip's frames the MLLM is shown: about one in 15 with both ends, or all of up to 15."""
    if num_frames <= 15:
        return list(range(num_frames))
    shown = num_frames // 15
    return [0] if shown == 1 else [int(i * (num_frames - 1) / (shown - 1)) for i in range(shown)]
