"""Generation: guided denoising with UniPC.

What does not change over the steps is computed once a generation: each branch's packing plan, its cross-attention keys
and values (and with them the MLLM embedder), and the timesteps' modulation.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loomvideo.model.dit import Context, LoomVideoDiT
from loomvideo.model.flow import NUM_TRAIN_TIMESTEPS
from loomvideo.model.guidance import NUM_STEPS, Guidance
from loomvideo.model.packing import DiTSample, PackedBatch, pack, to_patches

if TYPE_CHECKING:
    from diffusers import UniPCMultistepScheduler


@dataclass(frozen=True)
class SchedulerConfig:
    """UniPC's settings."""

    flow_shift: float = 5.0
    solver_order: int = 2

    def build(self, steps: int) -> "UniPCMultistepScheduler":
        """The scheduler, for velocities along the flow, set to a number of steps."""
        from diffusers import UniPCMultistepScheduler  # slow to import, and needed for whole generations alone

        solver = UniPCMultistepScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=self.flow_shift,
            solver_order=self.solver_order,
        )
        # Given explicitly (before the shift): the library's own default has changed between versions.
        solver.set_timesteps(device="cpu", sigmas=np.linspace(1 - 1 / NUM_TRAIN_TIMESTEPS, 0, steps + 1)[:-1])
        solver.set_begin_index(0)
        return solver


@dataclass
class Branch:
    """Conditioning of one guidance branch."""

    mllm_states: Tensor
    """[layers, tokens, mllm dim]"""
    source: Tensor | None = None
    """Source latents [channels, frames, height, width]; None counts as zeros."""
    references: Sequence[Tensor] = field(default_factory=tuple)
    """Reference latents [channels, 1, height, width]."""


class Denoiser:
    """Velocities of every guidance branch, with what does not change over the steps computed once.

    Args:
        model: On the device and in the dtype to compute in.
        latents: Latents of the shape to denoise [channels, frames, height, width].
        branches: Conditioning by branch name.
        timesteps: All timesteps, fp32 [steps].
        batch_branches: Pack the branches into one forward pass.
    """

    def __init__(
        self,
        model: LoomVideoDiT,
        latents: Tensor,
        branches: Mapping[str, Branch],
        timesteps: Tensor,
        batch_branches: bool = False,
    ) -> None:
        parameter = next(model.parameters())
        self.model, self.device, self.dtype = model, parameter.device, parameter.dtype
        self._timesteps = timesteps.to(self.device)
        self._embedding, self._modulation = model.embed_time(self._timesteps, self.dtype)
        names = list(branches)
        groups = [names] if batch_branches else [[name] for name in names]
        self._groups = [(group, *self._prepare(latents, [branches[name] for name in group])) for group in groups]

    def velocities(self, latents: Tensor, step: int) -> dict[str, Tensor]:
        """Velocity of each branch, fp32, for latents [channels, frames, height, width] at a step's timestep."""
        patches = to_patches(latents, self.model.config.patch_size).to(self.dtype)
        velocities = {}
        for names, batch, contexts in self._groups:
            video = patches.repeat(len(names), 1)
            if batch.video_index is not None:
                video = batch.patches.index_copy(0, batch.video_index, video)
            source_scale = (self._timesteps[step] / NUM_TRAIN_TIMESTEPS).expand(len(names))
            rows = self._modulation[:, step, None].expand(-1, len(names), -1)
            velocity = self.model(
                dataclasses.replace(batch, patches=video, source_scale=source_scale),
                contexts=contexts,
                time=(self._embedding[step].expand(len(names), -1), F.pad(rows, (0, 0, 0, 1))),
            )
            velocities.update(zip(names, batch.unpack(velocity.float()), strict=True))
        return velocities

    def _prepare(self, latents: Tensor, branches: Sequence[Branch]) -> tuple[PackedBatch, list[Context]]:
        """Pack branches that share latents, and compute the keys and values they attend to."""

        def on_device(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.device, torch.float32)

        samples = [
            DiTSample(
                latents=on_device(latents),
                timestep=NUM_TRAIN_TIMESTEPS,
                mllm_states=branch.mllm_states.to(self.device, self.dtype),
                source=on_device(branch.source),
                references=[on_device(reference) for reference in branch.references],
            )
            for branch in branches
        ]
        batch = pack(samples, self.model.config.patch_size).to(self.device, self.dtype)
        contexts = self.model.keys_values(batch.mllm_states)
        return dataclasses.replace(batch, mllm_states=batch.mllm_states[:0]), contexts


@torch.no_grad()
def sample(
    model: LoomVideoDiT,
    initial_noise: Tensor,
    branches: Mapping[str, Branch],
    guidance: Guidance,
    steps: int = NUM_STEPS,
    scheduler: SchedulerConfig | None = None,
    batch_branches: bool = False,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Denoise one video.

    Args:
        model: On the device and in the dtype to compute in.
        initial_noise: Standard normal [channels, frames, height, width].
        branches: Conditioning by branch name; those of ``guidance.weights()`` are used.
        guidance: Scales.
        steps: Denoising steps.
        scheduler: Settings; None for the published ones.
        batch_branches: Pack the branches into one forward pass: faster for short sequences, more memory.
        on_step: Called after each step with its index and the latents.

    Returns:
        Latents, fp32, like ``initial_noise``, on the model's device.
    """
    solver = (scheduler or SchedulerConfig()).build(steps)
    used = {name: branches[name] for name in guidance.weights()}
    denoiser = Denoiser(model, initial_noise, used, solver.timesteps.float(), batch_branches)
    latents = initial_noise.to(denoiser.device, torch.float32)
    for step, timestep in enumerate(solver.timesteps):
        guided = guidance.combine(denoiser.velocities(latents, step))
        latents = solver.step(guided, timestep, latents, return_dict=False)[0]
        if on_step is not None:
            on_step(step, latents)
    return latents
