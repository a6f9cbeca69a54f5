"""Sampling in a handful of steps with a transformer that was distilled to do so.

Such a transformer predicts, from latents at one of the few noise levels it knows, where they end: x0. Between two
levels x0 is noised again with fresh noise (Yin et al., 2024, "Improved Distribution Matching Distillation", section
4.4), exactly as its training simulated it. Guidance is folded into its weights, so the full branch runs alone.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.flow import EPS, NUM_TRAIN_TIMESTEPS, shift_time
from loomvideo.model.guidance import FULL
from loomvideo.model.parallel import Ranks
from loomvideo.model.sampler import Anchor, Branch, Denoiser, OnStep, StopDenoising
from loomvideo.model.sizes import stated_note
from loomvideo.platform.errors import UserError

FEW_STEPS_KEY = "few_steps"
"""Of an exported folder's ``pipeline.json``."""
MAX_STEPS = 8


@dataclass(frozen=True)
class FewSteps:
    """The noise levels that a distilled transformer knows.

    Attributes:
        timesteps: The timesteps that are fed, falling from 1000; one pass each.
        guidance: The teacher's scales that are folded in, by name, for the record.
        generate_timesteps: Those of tasks without a source, equally many; None for the same.
    """

    timesteps: tuple[float, ...]
    guidance: tuple[tuple[str, float], ...] = ()
    generate_timesteps: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls,
        schedule: Sequence[float],
        shift: float,
        guidance: dict[str, float] | None = None,
        generate_shift: float | None = None,
    ) -> "FewSteps":
        """Levels from a schedule that is shifted towards noise like the sampler's sigmas.

        Args:
            schedule: Timesteps from 1000 down.
            shift: What moves them; 1 moves nothing.
            guidance: The teacher's scales.
            generate_shift: What moves them for tasks without a source; None for the same.

        Raises:
            UserError: if the schedule does not fall from 1000, or has more than eight steps.
        """
        levels = list(schedule)
        falls = all(a > b > 0 for a, b in itertools.pairwise(levels))
        if not 1 <= len(levels) <= MAX_STEPS or levels[0] != NUM_TRAIN_TIMESTEPS or not falls:
            raise UserError(
                f"schedule={levels}: give 1 to {MAX_STEPS} timesteps that fall from {NUM_TRAIN_TIMESTEPS} and stay "
                "above 0, such as [1000, 750, 500, 250]"
            )
        for key, value in (("shift", shift), ("generate_shift", generate_shift)):
            if value is not None and value < 1:
                raise UserError(f"{key}={value}: must be at least 1, which shifts nothing")

        def shifted(by: float) -> tuple[float, ...]:
            return tuple(NUM_TRAIN_TIMESTEPS * shift_time(level / NUM_TRAIN_TIMESTEPS, by) for level in levels)

        generated = None if generate_shift is None else shifted(generate_shift)
        return cls(shifted(shift), tuple(sorted((guidance or {}).items())), generated)

    @property
    def num_steps(self) -> int:
        """Passes of a generation."""
        return len(self.timesteps)

    def timesteps_of(self, has_source: bool) -> tuple[float, ...]:
        """The timesteps of a video that is made with or without a source."""
        return self.timesteps if has_source or self.generate_timesteps is None else self.generate_timesteps

    def times_of(self, has_source: bool) -> tuple[float, ...]:
        """The same as t, from 1 (noise) down."""
        return tuple(timestep / NUM_TRAIN_TIMESTEPS for timestep in self.timesteps_of(has_source))

    def first(self, steps: int) -> "FewSteps":
        """The first of the steps alone."""
        generated = self.generate_timesteps and self.generate_timesteps[:steps]
        return replace(self, timesteps=self.timesteps[:steps], generate_timesteps=generated)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        own = {} if self.generate_timesteps is None else {"generate_timesteps": list(self.generate_timesteps)}
        return {"timesteps": list(self.timesteps), "guidance": dict(self.guidance)} | own

    def describe(self) -> str:
        """For people."""
        levels = ", ".join(f"{timestep:g}" for timestep in self.timesteps)
        if self.generate_timesteps is not None:
            levels += "; without a source " + ", ".join(f"{timestep:g}" for timestep in self.generate_timesteps)
        return f"{self.num_steps} steps (timesteps {levels}) with guidance folded in"


def stated_few_steps(weights: str | Path) -> FewSteps | None:
    """The steps that an exported weights folder was distilled to; None for an ordinary one.

    Args:
        weights: The folder, or anything else that holds weights.
    """
    stated = stated_note(weights).get(FEW_STEPS_KEY)
    return few_steps_of(stated) if stated else None


def few_steps_of(stated: Mapping[str, Any]) -> FewSteps:
    """From what a folder states."""
    generated = stated.get("generate_timesteps")
    return FewSteps(
        tuple(stated["timesteps"]), tuple(sorted(stated.get("guidance", {}).items())), generated and tuple(generated)
    )


def clean_from_velocity(noised: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """x0 of noised latents and their velocity: ``(1 - eps) z_t - (eps + (1 - eps) t) v``.

    That solves ``z_t = (1 - t) x0 + (eps + (1 - eps) t) n`` and ``v = (1 - eps) n - x0`` for x0.
    """
    return (1 - EPS) * noised - (EPS + (1 - EPS) * t) * velocity


def noised_again(clean: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """Clean latents at level t of :mod:`loomvideo.model.flow`; at t = 1 the noise itself."""
    return (1 - t) * clean + (EPS + (1 - EPS) * t) * noise


@torch.no_grad()
def sample_few_steps(
    model: LoomVideoDiT,
    noises: Sequence[Tensor],
    branch: Branch,
    few_steps: FewSteps,
    ranks: Ranks | None = None,
    on_step: OnStep | None = None,
    anchor: Anchor | None = None,
) -> Tensor:
    """Denoise one video in the steps that the transformer was distilled to.

    Args:
        model: The transformer, on the device and in the dtype to compute in.
        noises: Standard normal [channels, frames, height, width], one a step; the first is where it starts.
        branch: The full conditioning.
        few_steps: The levels.
        ranks: Ranks that share this generation; None for this one alone.
        on_step: What :func:`loomvideo.model.sampler.sample` takes, called with what a step predicts as latents.
        anchor: What the first frames are drawn to; None for nothing.

    Returns:
        Latents, fp32, like a noise, on the model's device.
    """
    has_source = branch.source is not None
    timesteps = torch.tensor(few_steps.timesteps_of(has_source), dtype=torch.float32)
    denoiser = Denoiser(model, noises[0], {FULL: branch}, timesteps, ranks=ranks)
    latents = noises[0].to(denoiser.device, torch.float32)
    for step, t in enumerate(few_steps.times_of(has_source)):
        if step:
            latents = noised_again(latents, noises[step].to(latents), t)
        velocity = denoiser.velocities(latents, step)[FULL]
        latents = clean_from_velocity(latents, velocity, t)
        if anchor is not None:
            latents = anchor.pull(latents)
        if on_step is not None:
            try:
                replaced = on_step(step, latents)
            except StopDenoising:
                break
            latents = latents if replaced is None else replaced.to(latents)
    return latents
