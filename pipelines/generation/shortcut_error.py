"""What approximations cost: the same request made exactly, with each approximation alone, and with all."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loomvideo.model.shortcuts import Shortcuts
from loomvideo.pipelines.evaluation.metrics import psnr_db
from loomvideo.pipelines.generation.generator import FileGenerator, Prepared


@dataclass(frozen=True)
class ShortcutError:
    """One way of making a request against the exact one.

    Attributes:
        name: The approximation, such as ``step_cache=0.1``.
        seconds: The seconds of denoising.
        speedup: Exact seconds over these.
        latent_error: Root mean square difference of the latents over their root mean square.
        psnr_db: The PSNR of the frames against the exact ones.
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
        generator: A generator with shortcuts in its settings.
        prepared: The request.
        on_run: Called with the name of each run after it.

    Returns:
        The latents with all shortcuts, and one row a run.
    """
    runs = _runs(generator.settings.shortcuts)
    generator.sample(prepared, Shortcuts(steps=1))  # compiles and checks kernels, so that no run pays for it
    exact, exact_seconds = _timed(generator, prepared, Shortcuts())
    on_run("exact")
    frames = generator.pipeline.decode(exact)
    rows, latents = [ShortcutError("exact", exact_seconds, 1.0, 0.0, float("inf"))], exact
    for name, run in runs.items():
        if run.fp8:
            generator.sample(prepared, Shortcuts(steps=1, fp8=True))  # quantises
        latents, seconds = _timed(generator, prepared, run)
        error = ((latents - exact).square().mean() / exact.square().mean()).sqrt().item()
        psnr = psnr_db(generator.pipeline.decode(latents), frames)
        rows.append(ShortcutError(name, seconds, exact_seconds / seconds, error, psnr))
        on_run(name)
    return latents, rows


def num_runs(shortcuts: Shortcuts) -> int:
    """How many times :func:`measure_shortcuts` makes a request."""
    return 1 + len(_runs(shortcuts))


def _runs(shortcuts: Shortcuts) -> dict[str, Shortcuts]:
    runs = shortcuts.alone()
    return runs if len(runs) < 2 else {**runs, "all together": shortcuts}


def _timed(generator: FileGenerator, prepared: Prepared, shortcuts: Shortcuts) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    latents = generator.sample(prepared, shortcuts).cpu()  # waits for the device
    return latents, time.perf_counter() - start
