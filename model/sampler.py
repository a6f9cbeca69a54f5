"""Generation: guided denoising with UniPC.

What does not change over the steps is computed once a generation: each branch's packing plan, its cross-attention keys
and values (and with them the MLLM embedder), and the timesteps' modulation.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loomvideo.model.blocks import Context
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.flow import NUM_TRAIN_TIMESTEPS
from loomvideo.model.guidance import FULL, NUM_STEPS, Guidance
from loomvideo.model.packing import DiTSample, PackedBatch, pack, to_patches
from loomvideo.model.parallel import Ranks, Shard
from loomvideo.model.shortcuts import BlockCache, Shortcuts, Taylor

if TYPE_CHECKING:
    from diffusers import UniPCMultistepScheduler


OnStep = Callable[[int, Tensor], Tensor | None]
"""Called after each step with its index and the latents; may return others to go on with."""


@dataclass(frozen=True)
class SchedulerConfig:
    """UniPC's settings."""

    flow_shift: float = 5.0
    solver_order: int = 2

    def build(self, steps: int) -> "Solver":
        """The scheduler, for velocities along the flow, set to a number of steps."""
        solver = self.scheduler()
        # Given explicitly (before the shift): the library's own default has changed between versions.
        solver.set_timesteps(device="cpu", sigmas=flow_sigmas(steps))
        solver.set_begin_index(0)
        return cast("Solver", solver)

    def scheduler(self) -> "UniPCMultistepScheduler":
        """The scheduler before it is set to a number of steps."""
        from diffusers import UniPCMultistepScheduler  # slow to import, and needed for whole generations alone

        return UniPCMultistepScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=self.flow_shift,
            solver_order=self.solver_order,
        )


class Solver(Protocol):
    """What integrates velocities along the flow: a scheduler of diffusers, set to a number of steps."""

    timesteps: Tensor
    sigmas: Tensor

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool) -> tuple[Tensor, ...]:
        """The latents after a step, first of a tuple."""
        ...


class SolverChoice(Protocol):
    """Settings of a solver."""

    def build(self, steps: int) -> Solver:
        """A solver that has made no step yet."""
        ...


def flow_sigmas(steps: int) -> np.ndarray:
    """Noise levels of the steps before the scheduler's shift: evenly spaced from the noisiest that was trained."""
    return np.linspace(1 - 1 / NUM_TRAIN_TIMESTEPS, 0, steps + 1)[:-1]


class StopDenoising(Exception):  # noqa: N818 - no error
    """Raised by ``on_step``: the latents stay as they are after that step."""


@dataclass
class Branch:
    """Conditioning of one guidance branch."""

    mllm_states: Tensor
    """[layers, tokens, mllm dim]"""
    source: Tensor | None = None
    """Source latents [channels, frames, height, width]; None counts as zeros."""
    references: Sequence[Tensor] = field(default_factory=tuple)
    """Reference latents [channels, 1, height, width]."""


@dataclass(frozen=True)
class Anchor:
    """Latents that some frames are drawn to.

    The velocity of a frame is mixed with the one that leads straight to the target, ``(z - target) / t``: where the
    target has all the weight, every solver ends on it.

    Attributes:
        latents: Targets of the first frames [channels, frames, height, width].
        weights: The weight of each of these frames, in [0, 1].
    """

    latents: Tensor
    weights: Tensor

    @classmethod
    def fading(cls, latents: Tensor) -> "Anchor":
        """Full weight for the first frame, less with each further one."""
        count = latents.shape[1]
        return cls(latents, 1 - torch.arange(count, dtype=torch.float32) / count)

    def mix(self, velocity: Tensor, latents: Tensor, level: float) -> Tensor:
        """The velocity at a noise level in (0, 1], drawn to the targets."""
        count = self.latents.shape[1]
        first = velocity[:, :count]
        straight = (latents[:, :count] - self.latents.to(latents)) / level
        weights = self.weights.to(velocity)[None, :, None, None]
        return torch.cat([first + weights * (straight - first), velocity[:, count:]], dim=1)

    def pull(self, clean: Tensor) -> Tensor:
        """What a step predicts as latents, drawn to the targets."""
        count = self.latents.shape[1]
        first, weights = clean[:, :count], self.weights.to(clean)[None, :, None, None]
        return torch.cat([first + weights * (self.latents.to(clean) - first), clean[:, count:]], dim=1)


@dataclass
class _Group:
    """Branches that pass the model together."""

    names: tuple[str, ...]
    shard: Shard
    contexts: list[Context]
    cache: BlockCache | None


class Denoiser:
    """Velocities of guidance branches, with what does not change over the steps computed once.

    Args:
        model: The transformer, on the device and in the dtype to compute in.
        latents: Latents of the shape to denoise [channels, frames, height, width], or several videos of one
            conditioning that pass the model together: [videos, channels, frames, height, width].
        branches: Conditioning by branch name.
        timesteps: All timesteps, fp32 [steps].
        batch_branches: Pack the branches into one forward pass.
        step_cache: Threshold of :class:`~loomvideo.model.shortcuts.BlockCache`; 0 for none.
        ranks: Ranks that share this generation; None for this one alone.
    """

    def __init__(
        self,
        model: LoomVideoDiT,
        latents: Tensor,
        branches: Mapping[str, Branch],
        timesteps: Tensor,
        batch_branches: bool = False,
        step_cache: float = 0.0,
        ranks: Ranks | None = None,
    ) -> None:
        parameter = next(model.parameters())
        self.model, self.device, self.dtype = model, parameter.device, parameter.dtype
        self._branches, self._batch_branches = branches, batch_branches
        self._step_cache, self._ranks = step_cache, ranks or Ranks()
        self._like = latents.to(self.device, torch.float32)
        self._videos = self._like if latents.ndim == 5 else self._like[None]
        self._timesteps = timesteps.to(self.device)
        self._embedding, self._modulation = model.embed_time(self._timesteps, self.dtype)
        self._groups: dict[tuple[str, ...], _Group] = {}
        for names in self._groups_of(list(branches)):
            self._group(names)

    def velocities(self, latents: Tensor, step: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Velocity of branches (all of them by default), fp32, for latents at a step's timestep.

        With several ranks each calls this alike and gets the same.
        """
        names = list(self._branches) if names is None else list(names)
        velocities: dict[str, Tensor] = {}
        for group in self._groups_of(names):
            velocities |= self._run(self._group(group), latents, step)
        return self._ranks.all_branches(velocities, names, self._like)

    def _groups_of(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """How this rank's share of branches passes the model."""
        own = self._ranks.own_branches(names)
        if self._batch_branches and own:
            return [tuple(own)]
        return [(name,) for name in own]

    def _run(self, group: _Group, latents: Tensor, step: int) -> dict[str, Tensor]:
        whole, num_videos = group.shard.whole, len(self._videos)
        count = len(group.names) * num_videos
        videos = latents.reshape(self._videos.shape)
        patches = torch.cat([to_patches(video, self.model.config.patch_size) for video in videos])
        video = patches.to(self.dtype).repeat(len(group.names), 1)
        if whole.video_index is not None:
            video = whole.patches.index_copy(0, whole.video_index, video)
        rows = self._modulation[:, step, None].expand(-1, count, -1)
        batch = dataclasses.replace(
            group.shard.local,
            patches=video[group.shard.tokens],
            source_scale=(self._timesteps[step] / NUM_TRAIN_TIMESTEPS).expand(count),
        )
        velocity = self.model(
            batch,
            contexts=group.contexts,
            time=(self._embedding[step].expand(count, -1), F.pad(rows, (0, 0, 0, 1))),
            cache=group.cache,
        )
        made = torch.stack(whole.unpack(group.shard.join(velocity.float())))
        return dict(zip(group.names, made.reshape(len(group.names), *self._like.shape), strict=True))

    def _group(self, names: tuple[str, ...]) -> _Group:
        if names not in self._groups:
            batch = self._pack([self._branches[name] for name in names])
            contexts = self._shared_contexts(names) or self._contexts(names)
            shard = self._ranks.shard(
                dataclasses.replace(batch, mllm_states=batch.mllm_states[:0]), self.model.config.num_attention_heads
            )
            cache = BlockCache(self._step_cache, self._ranks.total) if self._step_cache else None
            self._groups[names] = _Group(names, shard, contexts, cache)
        return self._groups[names]

    def _contexts(self, names: tuple[str, ...]) -> list[Context]:
        """Keys and values of branches, computed once for all videos."""
        states = [self._branches[name].mllm_states.to(self.device, self.dtype) for name in names]
        lengths, num_videos = [state.shape[1] for state in states], len(self._videos)

        def for_each(tensor: Tensor) -> Tensor:
            if num_videos == 1:
                return tensor
            return torch.cat([part for branch in tensor.split(lengths) for part in [branch] * num_videos])

        pairs = self.model.keys_values(torch.cat(states, dim=1))
        return [(for_each(key), for_each(value)) for key, value in pairs]

    def _shared_contexts(self, names: tuple[str, ...]) -> list[Context] | None:
        """Keys and values of one branch as a part of those of a group that holds it."""
        for group in self._groups.values():
            if len(names) == 1 and names[0] in group.names:
                lengths, count = group.shard.whole.cross_plan.key_lengths, len(self._videos)
                index = group.names.index(names[0]) * count
                start = sum(lengths[:index])
                part = slice(start, start + sum(lengths[index : index + count]))
                return [(key[part], value[part]) for key, value in group.contexts]
        return None

    def _pack(self, branches: Sequence[Branch]) -> PackedBatch:
        """Pack branches that share latents, each with every video."""

        def on_device(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.device, torch.float32)

        samples = [
            DiTSample(
                latents=video,
                timestep=NUM_TRAIN_TIMESTEPS,
                mllm_states=branch.mllm_states.to(self.device, self.dtype),
                source=on_device(branch.source),
                references=[on_device(reference) for reference in branch.references],
            )
            for branch in branches
            for video in self._videos
        ]
        return pack(samples, self.model.config.patch_size).to(self.device, self.dtype)


class GuidedVelocity:
    """The guided velocity of a step, with the approximations that leave branches out.

    Args:
        denoiser: Gives the velocities of the branches that ``guidance`` and ``shortcuts`` need.
        guidance: Scales.
        timesteps: All timesteps [steps].
        shortcuts: Approximations.
    """

    def __init__(self, denoiser: Denoiser, guidance: Guidance, timesteps: Tensor, shortcuts: Shortcuts) -> None:
        self.denoiser, self.guidance, self.shortcuts = denoiser, guidance, shortcuts
        self._timesteps = timesteps.tolist()
        self._difference = Taylor(shortcuts.branch_order)
        self._age = 0

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """fp32, like ``latents`` [channels, frames, height, width]."""
        if not self.shortcuts.guides(self._timesteps[step]):
            return self.denoiser.velocities(latents, step, [FULL])[FULL]
        refresh = self.shortcuts.branch_refresh
        if 0 < self._age < refresh:
            self._age += 1
            return self.denoiser.velocities(latents, step, [FULL])[FULL] + self._difference.at(step)
        names = used_branches(self.guidance, self.shortcuts)
        velocities = self.denoiser.velocities(latents, step, names)
        guided = self.guidance.combine(velocities)
        if refresh > 1:
            self._difference.add(step, guided - velocities[FULL])
            self._age = 1
        return guided


def used_branches(guidance: Guidance, shortcuts: Shortcuts) -> list[str]:
    """The branches that a generation runs."""
    alone = shortcuts.branch_refresh > 1 or (shortcuts.guidance_from, shortcuts.guidance_to) != (1.0, 0.0)
    return list(dict.fromkeys([*([FULL] if alone else ()), *guidance.weights()]))


@torch.no_grad()
def sample(
    model: LoomVideoDiT,
    initial_noise: Tensor,
    branches: Mapping[str, Branch],
    guidance: Guidance,
    steps: int = NUM_STEPS,
    scheduler: SolverChoice | None = None,
    batch_branches: bool = False,
    on_step: OnStep | None = None,
    shortcuts: Shortcuts | None = None,
    ranks: Ranks | None = None,
    anchor: Anchor | None = None,
) -> Tensor:
    """Denoise one video, or several of one conditioning together.

    Args:
        model: The transformer, on the device and in the dtype to compute in.
        initial_noise: Standard normal [channels, frames, height, width], or with an axis of videos before.
        branches: Conditioning by branch name; those of ``guidance.weights()`` are used.
        guidance: Scales.
        steps: Denoising steps; ``shortcuts.steps`` takes their place where it is set.
        scheduler: Settings; None for the published ones.
        batch_branches: Pack the branches into one forward pass: faster for short sequences, more memory.
        on_step: Called after each step with its index and the latents; may return others to go on with, or raise
            :class:`StopDenoising`.
        shortcuts: Approximations; None for none. ``fp8`` is the model's own matter
            (:func:`loomvideo.model.float8.float8_blocks`).
        ranks: Ranks that share this generation, each calling this with the same noise; None for this one alone.
        anchor: What the first frames of one video are drawn to; None for nothing.

    Returns:
        Latents, fp32, like ``initial_noise``, on the model's device; with ``ranks`` the same on each.

    Raises:
        UserError: for approximations that make no sense, or heads that do not divide among the ranks.
    """
    shortcuts = shortcuts or Shortcuts()
    shortcuts.check()
    solver = (scheduler or SchedulerConfig()).build(shortcuts.steps or steps)
    used = {name: branches[name] for name in used_branches(guidance, shortcuts)}
    timesteps = solver.timesteps.float()
    denoiser = Denoiser(model, initial_noise, used, timesteps, batch_branches, shortcuts.step_cache, ranks)
    guided = GuidedVelocity(denoiser, guidance, timesteps, shortcuts)
    latents = initial_noise.to(denoiser.device, torch.float32)
    for step, timestep in enumerate(solver.timesteps):
        velocity = guided(latents, step)
        if anchor is not None:
            velocity = anchor.mix(velocity, latents, float(solver.sigmas[step]))
        latents = solver.step(velocity, timestep, latents, return_dict=False)[0]
        if on_step is not None:
            try:
                replaced = on_step(step, latents)
            except StopDenoising:
                break
            latents = latents if replaced is None else replaced.to(denoiser.device, torch.float32)
    return latents
