"""From decoded clips to the encoders' device: those of one shape together, copied while others are encoded.

On CUDA the pixels go through page-locked memory on a stream of their own; whoever encodes them waits for the copy on
the device, not on the host. Elsewhere they stay where they are. Copies change no byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CopiedClips:
    """Clips of one shape on their way to the device.

    Attributes:
        numbers: Which of the clips they are.
        frames: uint8 [clips, frames, height, width, 3] there.
        copied: The event behind the copy; None where nothing was copied.
    """

    numbers: list[int]
    frames: Tensor
    copied: Any = None


class PixelCopier:
    """Copies clips to a device ahead of their encoding; any thread may call it.

    Args:
        device: Where they are encoded.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None

    def copy(self, clips: Sequence[Tensor], numbers: Sequence[int]) -> CopiedClips:
        """Begin to copy those of the clips, uint8 [frames, height, width, 3] each, that have one shape."""
        some = [clips[number] for number in numbers]
        if self._stream is None:
            return CopiedClips(list(numbers), torch.stack(some).to(self.device))
        host = _page_locked(some)
        with torch.cuda.stream(self._stream):
            frames = host.to(self.device, non_blocking=True)
            copied = self._stream.record_event()
        return CopiedClips(list(numbers), frames, copied)

    def video(self, clips: CopiedClips, dtype: torch.dtype) -> Tensor:
        """The clips as [clips, 3, frames, height, width] in [-1, 1], normalised in float32 on the device."""
        if clips.copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(clips.copied)
            # Made on the other stream: its memory must not be given to a copy before this stream has read it.
            clips.frames.record_stream(current)
        return (clips.frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(dtype)


def _page_locked(clips: Sequence[Tensor]) -> Tensor:
    """Clips of one shape as one, from torch's pool of page-locked memory, which waits for copies out of a block."""
    host = torch.empty((len(clips), *clips[0].shape), dtype=clips[0].dtype, pin_memory=True)
    return torch.stack(list(clips), out=host)
