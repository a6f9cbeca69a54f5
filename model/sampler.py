"""Generation: guided denoising with UniPC.

What does not change over the steps is computed once a generation: each branch's packing plan, its cross-attention keys
and values (and with them the MLLM embedder), and the timesteps' modulation.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from loomvideo.model.dit import Context, LoomVideoDiT
from loomvideo.model.flow import NUM_TRAIN_TIMESTEPS
from loomvideo.model.guidance import NUM_STEPS, Guidance
from loomvideo.model.packing import DiTSample, PackedBatch, pack, to_patches


@dataclass(frozen=True)
class SchedulerConfig:
    """UniPC's settings."""

    flow_shift: float = 5.0
    solver_order: int = 2

    def build(self, steps: int) -> UniPCMultistepScheduler:
        """The scheduler, for velocities along the flow, set to a number of steps."""
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


@torch.inference_mode()
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
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    solver = (scheduler or SchedulerConfig()).build(steps)
    device_timesteps = solver.timesteps.float().to(device)
    embedding, modulation = model.embed_time(device_timesteps, dtype)

    latents = initial_noise.to(device, torch.float32)
    names = list(guidance.weights())
    groups = [names] if batch_branches else [[name] for name in names]
    prepared = [
        _prepare(model, latents, [branches[name] for name in group], device, dtype, NUM_TRAIN_TIMESTEPS)
        for group in groups
    ]
    for step, timestep in enumerate(solver.timesteps):
        patches = to_patches(latents, model.config.patch_size).to(dtype)
        velocities = {}
        for group, (batch, contexts) in zip(groups, prepared, strict=True):
            batch = _at_step(batch, patches, device_timesteps[step])
            time = _repeat_time(embedding[step], modulation[:, step], len(group))
            velocity = model(batch, contexts=contexts, time=time)
            velocities.update(zip(group, batch.unpack(velocity), strict=True))
        guided = guidance.combine({name: velocity.float() for name, velocity in velocities.items()})
        latents = solver.step(guided, timestep, latents, return_dict=False)[0]
        if on_step is not None:
            on_step(step, latents)
    return latents


def _prepare(
    model: LoomVideoDiT,
    latents: Tensor,
    branches: Sequence[Branch],
    device: torch.device,
    dtype: torch.dtype,
    timestep: float,
) -> tuple[PackedBatch, list[Context]]:
    """Pack branches that share latents, and what they attend to."""

    def on_device(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, torch.float32)

    samples = [
        DiTSample(
            latents=latents,
            timestep=timestep,
            mllm_states=branch.mllm_states.to(device, dtype),
            source=on_device(branch.source),
            references=[on_device(reference) for reference in branch.references],
        )
        for branch in branches
    ]
    batch = pack(samples, model.config.patch_size).to(device, dtype)
    contexts = model.keys_values(batch.mllm_states)
    return dataclasses.replace(batch, mllm_states=batch.mllm_states[:0]), contexts


def _at_step(batch: PackedBatch, patches: Tensor, timestep: Tensor) -> PackedBatch:
    """The batch with every sample's video patches [tokens, patch dim] and timestep replaced."""
    patches = patches.repeat(batch.num_samples, 1)
    if batch.video_index is not None:
        patches = batch.patches.index_copy(0, batch.video_index, patches)
    source_scale = (timestep / NUM_TRAIN_TIMESTEPS).expand(batch.num_samples)
    return dataclasses.replace(batch, patches=patches, source_scale=source_scale)


def _repeat_time(embedding: Tensor, modulation: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """One step's ``LoomVideoDiT.embed_time`` for samples that share the timestep."""
    rows = modulation[:, None].expand(-1, num_samples, -1)
    return embedding.expand(num_samples, -1), F.pad(rows, (0, 0, 0, 1))
