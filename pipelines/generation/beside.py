"""Decoding and writing of results in a thread of its own, while the next one is denoised."""

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from loomvideo.pipelines.generation.generator import FileGenerator, Prepared


class WriterBeside:
    """Writes results of a generator one after another, on a CUDA stream of its own.

    It pays where denoising leaves something free: with distilled checkpoints of few steps, whose decoding is a large
    share of the whole, and for the encoding of the file, which a GPU has no part in.

    Args:
        generator: Its weights must be resident: what decodes and what denoises are used at once.
    """

    def __init__(self, generator: FileGenerator):
        self._generator = generator
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-result")
        device = generator.pipeline.parts.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def write(self, prepared: Prepared, latents: Tensor) -> Future[Path]:
        """Begin to write a result; the errors of :meth:`FileGenerator.write` are the future's.

        Args:
            prepared: What was asked for.
            latents: Its latents [channels, frames, height, width].
        """
        if self._stream is not None:
            # Whoever denoises next gets the stream at once, so the latents must be there, not only ordered.
            torch.cuda.current_stream(latents.device).synchronize()
        return self._thread.submit(self._write, prepared, latents)

    def close(self) -> None:
        """Wait for what was begun."""
        self._thread.shutdown()

    def _write(self, prepared: Prepared, latents: Tensor) -> Path:
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            return self._generator.write(prepared, latents)
