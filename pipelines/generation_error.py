"""What approximations cost: the same request made exactly, with each approximation alone, and with all."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loomvideo.model.shortcuts import Shortcuts
from loomvideo.pipelines.evaluation.metrics import psnr_db
from loomvideo.pipelines.generation import FileGenerator, Prepared


@dataclass(frozen=True)
class ShortcutError:
    """One way of making a request against the exact one.

    Attributes:
        name: The approximation, such as ``step_cache=0.1``.
        seconds: Of denoising.
        speedup: Exact seconds over these.
        latent_error: Root mean square difference of the latents over their root mean square.
        psnr_db: Of the frames against the exact ones.
    """

    name: str
    seconds: float
    speedup: float
    latent_error: float
    psnr_db: float


def measure_shortcuts(
    generator: FileGenerator, prepared: Prepared, on_run: Callable[[str], None] = lambda name: None
) -> tuple[torch.Tensor, list[ShortcutError]]:
    """Denoise a request exactly, with each of the generator's shortcuts alone, and with all of them.

    Args:
        generator: With shortcuts in its settings.
        prepared: The request.
        on_run: Called with the name of each run before it starts.

    Returns:
        The latents with all shortcuts, and one row a run.
    """
    shortcuts = generator.settings.shortcuts
    runs = shortcuts.alone()
    if len(runs) > 1:
        runs["all together"] = shortcuts
    generator.sample(prepared, Shortcuts(steps=1))  # compiles and checks kernels, so that no run pays for it
    on_run("exact")
    exact, exact_seconds = _timed(generator, prepared, Shortcuts())
    frames = generator.pipeline.decode(exact)
    rows, latents = [ShortcutError("exact", exact_seconds, 1.0, 0.0, float("inf"))], exact
    for name, run in runs.items():
        on_run(name)
        if run.fp8:
            generator.sample(prepared, Shortcuts(steps=1, fp8=True))  # quantises
        latents, seconds = _timed(generator, prepared, run)
        error = ((latents - exact).square().mean() / exact.square().mean()).sqrt().item()
        psnr = psnr_db(generator.pipeline.decode(latents), frames)
        rows.append(ShortcutError(name, seconds, exact_seconds / seconds, error, psnr))
    return latents, rows


def _timed(generator: FileGenerator, prepared: Prepared, shortcuts: Shortcuts) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    latents = generator.sample(prepared, shortcuts).cpu()  # waits for the device
    return latents, time.perf_counter() - start
